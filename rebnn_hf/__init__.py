"""1-bit Hugging Face encoders: resilient binarization (ReBNN), packed checkpoints, plain `from_pretrained`.

Importing the package registers its checkpoint format with transformers, and lets PEFT know of its layers and timm of
its image models, if and when these are imported.
"""

from __future__ import annotations

import importlib

from .integrations import transformers as _registers_the_quantizer  # noqa: F401
from .integrations.after_import import after_import

after_import("peft", "rebnn_hf.integrations.peft")
after_import("timm", "rebnn_hf.vision", oldest="1.0.20")

__version__ = "0.1.0"

_HOME = {
    "ReBNNConfig": "config",
    "WeightRule": "functional",
    "BalanceRule": "functional",
    "ActivationRule": "activations",
    "calibrate": "binarizers",
    "BinaryLinear": "layers",
    "BinaryEmbedding": "layers",
    "BinaryConv2d": "convolutions",
    "PackedLinear": "layers",
    "PackedEmbedding": "layers",
    "PackedConv2d": "convolutions",
    "binarize": "patching",
    "pack": "patching",
    "unpack": "patching",
    "rebinarize": "patching",
    "save_model": "saving",
    "load_model": "saving",
    "selected_modules": "patching",
    "stage_conflict": "patching",
    "fuse": "fusion",
    "is_fused": "fusion",
    "use_int8_inputs": "int8",
    "summary": "report",
    "packed_size": "report",
    "operations": "flops",
    "model_card": "card",
    "allow_loading_without_import": "hub",
    "compare": "comparison",
    "export_onnx": "integrations.onnx",
    "Resilience": "resilience",
    "attach": "resilience",
    "ReBNNTrainer": "trainer",
    "ReBNNTrainingArguments": "training_arguments",
    "plot_oscillation": "plotting",
    "plot_epoch_flips": "plotting",
    "plot_latent_weights": "plotting",
    "plot_tradeoff": "plotting",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
