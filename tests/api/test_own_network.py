"""The examples of docs/own_network.md, as a user types them into a new interpreter."""

import re
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fresh import python

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_network.md"
SMALL = 'create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, '
SHORTER = {
    'create_model("vit_tiny_patch16_224", ': SMALL,
    "resolve_model_data_config(net)": '{"input_size": (3, 32, 32)}',
}
CHECKS = """
import sys
import torch
first = torch.stack([images[index][0] for index in range(4)])
with torch.no_grad():
    assert torch.equal(again(first), small.net(first))
assert small.report["kept"]["macs"] <= 0.6
assert "hydra" not in sys.modules
"""


def test_the_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for long, short in SHORTER.items():
        assert long in blocks[0]
        blocks[0] = blocks[0].replace(long, short)
    lines = blocks[0].strip().partition("\n\n")[2].splitlines()
    assert len(lines) == 5
    torch.manual_seed(0)
    args = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_classes": 2}
    net = timm.create_model("vit_tiny_patch16_224", **args)
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / "train" / label
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    script = "\n".join([blocks[0], CHECKS, *blocks[1:]])
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
