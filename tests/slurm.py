"""A SLURM cluster of one node in the background, with its own configuration, key and ports."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
TOOLS = (*DAEMONS, "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONFIG = """
ClusterName=vitrim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=20
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=256000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the programs of SLURM and MUNGE that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]


@dataclass(frozen=True)
class Slurm:
    """The cluster in `folder`; `start` and `stop` it."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]]

    @property
    def env(self) -> dict[str, str]:
        """The environment in which SLURM's tools find this cluster."""
        return os.environ | {
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start the daemons and wait until the node is idle."""
        self._configure()
        munged = [
            *("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"),
            *(f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")),
            f"--socket={self.folder}/munge.socket",
        ]
        self._daemon(munged)
        wait("munged", (self.folder / "munge.socket").exists)
        self._daemon(["slurmctld", "-D"])
        self._daemon(["slurmd", "-D"])
        wait("an idle node", lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T"))

    def stop(self) -> None:
        """Cancel every job, wait for an empty queue, and stop the daemons."""
        try:
            self.run("scancel", f"--user={getpass.getuser()}")
            wait("an empty queue", lambda: not self.run("squeue", "--noheader"))
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                daemon.wait(timeout=20)

    def run(self, *command: str) -> str:
        """Run a tool of SLURM and return its output, empty where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def jobs(self, name: str) -> list[dict[str, str]]:
        """Return the jobs of this name as `scontrol show job` describes them."""
        shown = [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in self.run("scontrol", "show", "job", "--oneliner").splitlines()
        ]
        return [job for job in shown if job.get("JobName") == name]

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        control_port, node_port = _free_ports()
        text = CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            control_port=control_port,
            node_port=node_port,
        )
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, command: list[str]) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            program = shutil.which(command[0], path=PATH) or command[0]
            self.daemons.append(
                subprocess.Popen(
                    [program, *command[1:]], env=self.env, stdout=out, stderr=subprocess.STDOUT
                )
            )


def wait(what: str, done: Callable[[], bool], *, seconds: float = 300.0) -> None:
    """Return once `done` returns true.

    Raises:
        TimeoutError: it did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def _free_ports() -> tuple[int, int]:
    with closing(socket.socket()) as one, closing(socket.socket()) as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
