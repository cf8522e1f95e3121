"""What a type checker sees of the package: run by `mypy --strict tests/typed_usage.py`, never by Python.

Strict checking reports every `type: ignore` without an error behind it, so mistakes that users make have to be found.
"""

from typing import assert_type

import torch
from huggingface_hub import ModelCard
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
    assert_type(rebnn_hf.stage_conflict(config, rebnn_hf.ReBNNConfig()), str | None)
    assert_type(rebnn_hf.is_fused(model), bool)
    assert_type(rebnn_hf.model_card(model, license="mit"), ModelCard)
    arguments = rebnn_hf.ReBNNTrainingArguments(output_dir="runs", relation_weight=1.0)
    assert_type(arguments.activation_learning_rate, float | None)


def misuse(model: PreTrainedModel) -> None:
    """Mistakes."""
    rebnn_hf.pack("model")  # type: ignore[type-var]
    rebnn_hf.binarize(model, "rebnn-w1a32")  # type: ignore[arg-type]
    rebnn_hf.binarise(model)  # type: ignore[attr-defined]
    rebnn_hf.rebinarize(model)  # type: ignore[call-arg]
    print(rebnn_hf.selected_modules(model).packed)  # type: ignore[attr-defined]
    len(rebnn_hf.stage_conflict(rebnn_hf.ReBNNConfig(), rebnn_hf.ReBNNConfig()))  # type: ignore[arg-type]
    flips: int = rebnn_hf.is_fused(model) + "0"  # type: ignore[operator]
    print(flips)
