"""README's example code for image models runs as printed."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed (pip install 'rebnn_hf[vision]')")

from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_text, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    model = names["model"].eval()
    assert sum(isinstance(module, BinaryConv2d) for module in model.modules()) == 16
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10) and not torch.equal(logits[0], logits[1])
    assert sum(isinstance(module, PackedConv2d) for module in names["classifier"].modules()) == 16
