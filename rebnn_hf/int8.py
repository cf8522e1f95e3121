"""Dynamic int8 inputs for packed models with float activations: fast on a CPU without training them again."""

from __future__ import annotations

from transformers import PreTrainedModel

from .binarizers import TokenInt8
from .layers import PackedConv2d, PackedLinear
from .patching import saved_config


def use_int8_inputs(model: PreTrainedModel, enabled: bool = True) -> PreTrainedModel:
    """Round the inputs of the 1-bit linear layers of a packed weight-only model to int8, in place.

    Each token gets the scale max|x| / 127 (see `activations.token_int8`), and the engine multiplies integers. Answers
    change a little: score the model before and after. Saved with the model, and taken back by `enabled=False`.

    Args:
        model: packed, with `activation="none"`.
        enabled: False gives float inputs back.

    Returns:
        The same model.

    Raises:
        ValueError: not packed, its inputs have few bits by training, or it has 1-bit convolutions (a convolution sums
            over positions, which then have scales of their own) or no 1-bit linear layer. The model is as it was.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("folder/packed")
        >>> rebnn_hf.use_int8_inputs(model)
    """
    config = saved_config(model)
    if config is None or config.state != "packed":
        raise ValueError("use_int8_inputs() expects a packed model; train a latent one, then rebnn_hf.pack(model).")
    if config.activation not in ("none", "token"):
        raise ValueError(
            f"the inputs of this model have few bits already (activation={config.activation!r}), which it was trained "
            "for; use_int8_inputs() is for models with activation='none'."
        )
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    convolution = next((name for name, module in model.named_modules() if isinstance(module, PackedConv2d)), None)
    if convolution is not None or not linears:
        found = "no 1-bit linear layer" if convolution is None else f"1-bit convolutions (first: {convolution})"
        raise ValueError(
            f"use_int8_inputs() is for models whose 1-bit layers are linear, and {type(model).__name__} has {found}; "
            "for a CNN with fast inputs binarize the float model with activation='elastic' (1 to 8 bits) and train it."
        )
    for module in linears:
        module.input_binarizer = TokenInt8() if enabled else None
    config.activation, config.activation_bits = ("token", 8) if enabled else ("none", 32)
    return model
