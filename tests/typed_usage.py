"""What a type checker sees of the package: run by `mypy tests/typed_usage.py`, never by Python."""

from typing import assert_type

import torch
from transformers import PreTrainedModel

import rebnn_hf


def use(model: PreTrainedModel, network: torch.nn.Conv2d, optimizer: torch.optim.Optimizer) -> None:
    """Calls as users write them."""
    config = rebnn_hf.ReBNNConfig.preset("rebnn-bit-w1a1", word_embeddings=True)
    assert_type(config, rebnn_hf.ReBNNConfig)
    assert_type(rebnn_hf.binarize(model, config), PreTrainedModel)
    assert_type(rebnn_hf.load_model(network, "model.safetensors"), torch.nn.Conv2d)
    assert_type(rebnn_hf.attach(optimizer, model), rebnn_hf.Resilience)
    assert_type(rebnn_hf.selected_modules(model), list[str])
    assert_type(rebnn_hf.is_fused(model), bool)
    rebnn_hf.pack("model")  # type: ignore[type-var]
