"""What goes into a model beside 1-bit layers: few-bit inputs on them, other feed-forward functions, 1-bit attention."""

from __future__ import annotations

from torch import nn

from .architecture import base_relative, blocks, layout_of
from .attention import ATTENTION_OF, IMPLEMENTATION, use_binary_attention
from .binarizers import RPReLU, binarizer_of
from .config import ReBNNConfig


def add_activations(model: nn.Module, config: ReBNNConfig, names: list[str]) -> None:
    """Insert what the config says, in place of what an earlier stage inserted.

    Args:
        model: with its 1-bit layers.
        config: as `targets.record` left it.
        names: full names of the 1-bit layers.
    """
    _add_inputs(model, config, names)
    _add_ffn_functions(model, config)
    _add_attention(model, config)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _add_inputs(model: nn.Module, config: ReBNNConfig, names: list[str]) -> None:
    unsigned = _unsigned_inputs(model, config)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            binarizer = binarizer_of(config.activation_rule(), module.in_features, signed=name not in unsigned)
        elif isinstance(module, nn.Conv2d):  # behind a ReLU, or in a network built for signs
            binarizer = binarizer_of(config.activation_rule(), module.in_channels, signed=False)
        else:
            continue
        module.input_binarizer = None if binarizer is None else _like(binarizer, module)


def _unsigned_inputs(model: nn.Module, config: ReBNNConfig) -> set[str]:
    """Layers behind a feed-forward function that is (nearly) never negative: ReLU and GELU, but not RPReLU."""
    layout = layout_of(model)
    if layout is None or config.ffn_activation == "rprelu":
        return set()
    return {f"{block}.{layout.ffn_output}" for block, _ in blocks(model)}


def _add_ffn_functions(model: nn.Module, config: ReBNNConfig) -> None:
    for block in _changed_blocks(model, config.converted_ffn):
        layout = layout_of(model)
        width = block.get_submodule(layout.ffn_output).in_features
        function = nn.ReLU() if config.ffn_activation == "relu" else RPReLU(width)
        if type(block.get_submodule(layout.ffn_activation)) is not type(function):  # a trained one stays
            replace_module(block, layout.ffn_activation, _like(function, block))


def _add_attention(model: nn.Module, config: ReBNNConfig) -> None:
    for block in _changed_blocks(model, config.converted_attention):
        attention = ATTENTION_OF[config.attention](config.activation_rule())
        use_binary_attention(block.get_submodule(layout_of(model).attention), _like(attention, block))
    if config.converted_attention:
        model.set_attn_implementation(IMPLEMENTATION)


def _changed_blocks(model: nn.Module, changed: list[str]) -> list[nn.Module]:
    """Blocks that contain one of these modules, which the config names relative to the base model."""
    return [
        block
        for name, block in blocks(model)
        if any(part.startswith(f"{base_relative(model, name)}.") for part in changed)
    ]


def _like(module: nn.Module, neighbour: nn.Module) -> nn.Module:
    """A new module in the mode of another, with the device and float type of its parameters, frozen if they are."""
    tensors = [tensor for tensor in neighbour.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    module = module.to_empty(device="meta") if tensors[0].is_meta else module.to(tensors[0].device)
    trainable = any(tensor.requires_grad for tensor in tensors)
    return module.to(tensors[0].dtype).train(neighbour.training).requires_grad_(trainable)
