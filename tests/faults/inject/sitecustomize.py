"""Lets a job of a sweep meet its fate: VITRIM_FATES says which, by seed.

Jobs are forks of one process that has imported vitrim, the server of multiprocessing's forkserver;
what is replaced in it is replaced in every job.
"""

import json
import os
import signal
import sys


def _meet(fate: str | None) -> None:
    match fate:
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise RuntimeError("as it was told to")


def _arm(fates: dict[str, str]) -> None:
    import vitrim.pipeline

    whole = vitrim.pipeline._runner

    def runner(*args: object) -> object:
        seeds = [word.removeprefix("seed=") for word in sys.argv if word.startswith("seed=")]
        _meet(next((fates[seed] for seed in seeds if seed in fates), None))
        return whole(*args)

    vitrim.pipeline._runner = runner


_fates = json.loads(os.environ.get("VITRIM_FATES", "{}"))
if _fates and any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    _arm(_fates)
