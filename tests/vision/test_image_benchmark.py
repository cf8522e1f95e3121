"""benchmarks/image_model.py measures what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="timm is not installed (pip install 'rebnn_hf[vision]')")

from rebnn_hf.convolutions import PackedConv2d

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("image_model", FOLDER / "image_model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "image_model", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "missing_for_onnx", lambda: ["onnx"])
    return module


def test_rows(benchmark, capsys):
    rows = benchmark.main(["--rounds", "1", "--size", "2x32"])
    assert [row["contender"] for row in rows] == ["rebnn_resnet18", "torch fp32", "torch fp32 channels last"]
    ours, floats, _ = rows
    assert ours["x torch fp32"] == pytest.approx(floats["median ms"] / ours["median ms"])
    assert all(row["batch x size"] == "2 x 32" for row in rows)
    assert capsys.readouterr().out.count("| rebnn_resnet18 ") == 1


def test_the_model_is_packed(benchmark):
    model = benchmark.packed_model("rebnn_resnet18")
    assert sum(isinstance(module, PackedConv2d) for module in model.modules()) == 16
