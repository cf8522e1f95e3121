"""The package without its extra."""

import importlib
import sys

import pytest


def test_import_without_timm_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rebnn_hf.vision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'rebnn_hf\[vision\]'"):
        importlib.import_module("rebnn_hf.vision")
    import rebnn_hf

    assert rebnn_hf.BinaryLinear(2, 2).weight_scale.shape == (2,)
