"""README's example code for image models runs as printed, and that of the page on images."""

import pytest
import torch
from pages import python_blocks, run_page

pytest.importorskip("timm", reason="timm is not installed (pip install 'rebnn_hf[vision]')")

from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _text, _adapters, *codes = python_blocks("README.md")
    names = {}
    for code in codes:
        exec(compile(code, "README.md", "exec"), names)
    model = names["model"].eval()
    assert sum(isinstance(module, BinaryConv2d) for module in model.modules()) == 16
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10) and not torch.equal(logits[0], logits[1])
    for packed in (names["classifier"], names["network"]):
        assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == 16


def test_the_page_on_images_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="needs the extra rebnn_hf[detection]")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 2} for index in range(16)]
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    boxes = torch.tensor([[10.0, 12, 40, 44], [50, 4, 60, 30]])
    labels = [{"boxes": boxes, "class_labels": torch.tensor([0, 1])} for _ in images]
    names = run_page("images.md", {"image_data": rows, "detection_data": [(images, labels)]})
    for loaded in (names["classifier"], names["detector"]):
        assert sum(isinstance(module, PackedConv2d) for module in loaded.modules()) == 16
    latent = names["AutoModelForImageClassification"].from_pretrained("images/latent").timm_model
    sign = torch.where(latent.stages[0][0].conv.weight >= 0, 1.0, -1.0)
    packed = names["classifier"].timm_model.stages[0][0].conv.binary_weight()
    torch.testing.assert_close(packed.sign(), sign.flatten(1), rtol=0, atol=0)
    assert "tensor(" in capsys.readouterr().out
