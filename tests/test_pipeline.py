"""The pipeline called from Python, without Hydra and without a command."""

from pathlib import Path

from fresh import python

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from functools import partial
from pathlib import Path
from lightning import Trainer
import vitrim
from vitrim.budget.target import Target
from vitrim.data.digits import Digits
from vitrim.method.fskd import FSKD
from vitrim.model.source import Timm
from vitrim.measure import LatencySettings
from vitrim.trainer.recipe import Recipe

out = Path(sys.argv[1])
job = vitrim.Job(
    model=Timm(
        name="vit_tiny_patch16_224", pretrained=False, checkpoint=None, sha256=None,
        num_classes=10, reset_head=False, image_size=8, mean=None, std=None,
        args={"patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3},
        training=Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0),
    ),
    method=FSKD(
        levels=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5], sites=["mlp"], scope="site", round_to=1,
        images=64, samples_per_image=16, ridge=1e-3,
    ),
    target=Target(metric="macs", keep=0.8),
    data=Digits(batch_size=256, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.0),
    trainer=partial(Trainer, accelerator="cpu", devices=1, enable_model_summary=False,
                    log_every_n_steps=1, check_val_every_n_epoch=10),
    out=out,
    start=None,
    latency=LatencySettings(batch=1, repeats=1, device="cpu", blocks=False),
    latency_table=None,
    quantize=(),
    seed=0,
    tracking="none",
    progress=False,
    checkpoint_minutes=10,
    batchnorm_images=512,
)
identity = vitrim.Identity(
    method="fskd", strength=None, recipe={}, digest="0", dense_key="0", start_key="0",
    series="digits", name="run",
)
folder = out / "run"
folder.mkdir()
report = vitrim.run(job, identity, folder)
net, plan = vitrim.load(folder)
assert plan.method == "fskd"
assert report["kept"]["macs"] <= 0.8
assert sum(p.numel() for p in net.parameters()) == report["compact"]["params"]
assert not {"hydra", "omegaconf"} & sys.modules.keys()
"""


def test_python_compresses_without_hydra(tmp_path: Path) -> None:
    done = python("-c", SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report.json").is_file()
