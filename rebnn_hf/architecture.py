"""Where things are in a transformers model, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockLayout:
    """Names inside a block of the encoder, for what needs to know more than that there are linear layers.

    Attributes:
        attention: the module that calls transformers' attention interface.
        ffn_activation: the function between the linear layers of the feed-forward block.
        ffn_output: the linear layer that reads what that function gives.
        activation_field: what the model's config calls the function.
    """

    attention: str
    ffn_activation: str
    ffn_output: str
    activation_field: str


_BERT = BlockLayout("attention.self", "intermediate.intermediate_act_fn", "output.dense", "hidden_act")
_DISTILBERT = BlockLayout("attention", "ffn.activation", "ffn.lin2", "activation")

LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}
"""Layout of the blocks by `model_type`: 1-bit attention and other feed-forward functions work on these."""


@dataclass(frozen=True)
class BlockParts:
    """The modules of one block of a post-LayerNorm encoder."""

    attention: nn.Module
    heads: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    output_norm: nn.Module
    inner: nn.Module
    activation: nn.Module
    outer: nn.Module
    outer_norm: nn.Module


@dataclass(frozen=True)
class EncoderLayout:
    """Where the parts of an encoder are: for what computes a whole block by itself.

    Attributes:
        encoder: name of the module in the base model whose `layer` holds the blocks.
        attention, query, key, value, output, output_norm: names in a block: the attention and its projections.
        inner, activation, outer, outer_norm: the feed-forward block.
        heads: name of the number of heads in the attention module.
    """

    encoder: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    output_norm: str
    inner: str
    activation: str
    outer: str
    outer_norm: str
    heads: str

    def of(self, block: nn.Module) -> BlockParts:
        """The modules of a block."""
        names = {field.name for field in fields(BlockParts)} - {"heads"}
        modules = {name: block.get_submodule(getattr(self, name)) for name in names}
        return BlockParts(heads=getattr(modules["attention"], self.heads), **modules)


_BERT_ENCODER = EncoderLayout(
    encoder="encoder",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    output_norm="attention.output.LayerNorm",
    inner="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    outer="output.dense",
    outer_norm="output.LayerNorm",
    heads="num_attention_heads",
)

ENCODERS = {name: _BERT_ENCODER for name, layout in LAYOUTS.items() if layout is _BERT} | {
    "distilbert": EncoderLayout(
        encoder="transformer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        output_norm="sa_layer_norm",
        inner="ffn.lin1",
        activation="ffn.activation",
        outer="ffn.lin2",
        outer_norm="output_layer_norm",
        heads="n_heads",
    )
}
"""Layout of the encoders by `model_type`: the fused encoder works on these."""


def require_transformers_model(model: object, function: str) -> None:
    """Refuse what only holds a transformers model, or none at all.

    Args:
        model: what was passed.
        function: the name of what it was passed to, for the message.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{function}() expects a transformers PreTrainedModel, got {type(model).__name__}; pass the model inside "
            "the wrapper (model[0].auto_model of a SentenceTransformer, accelerator.unwrap_model(model) of DDP, "
            "peft_model.get_base_model())."
        )


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that holds the blocks, None where `ENCODERS` does not know the architecture."""
    layout = ENCODERS.get(model.config.model_type)
    return None if layout is None else model.base_model.get_submodule(layout.encoder)


def layout_of(model: PreTrainedModel) -> BlockLayout | None:
    """Layout of the model's blocks, None where it is not known."""
    return LAYOUTS.get(model.config.model_type)


def base_relative(model: PreTrainedModel, name: str) -> str | None:
    """Name of a module relative to the base model, None for a module outside of it."""
    if model.base_model is model:
        return name
    prefix = model.base_model_prefix + "."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def head_modules(model: PreTrainedModel) -> set[str]:
    """Names of what makes up the task head: all outside the base model, and the classifier inside one of timm."""
    classifier = getattr(model.base_model, "get_classifier", tuple)()
    parts = classifier if isinstance(classifier, tuple) else (classifier,)  # of distilled ones there are two
    inside = {module for part in parts for module in part.modules()}
    return {
        name
        for name, module in model.named_modules()
        if name and (base_relative(model, name) is None or module in inside)
    }


def block_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the lists of equal blocks in the base model: the encoder, whatever the architecture calls it."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and base_relative(model, name) is not None
        and len({type(block) for block in module}) == 1
        and (isinstance(module, nn.ModuleList) or any(True for _ in module[0].children()))  # timm's are Sequential
    )


STEMS = ("stem", "embedder", "patch_embed", "patch_embeddings")
"""Names of what turns an image into features."""

SHORTCUTS = ("downsample", "downsampling_layer", "shortcut")
"""Names of what makes a shortcut fit where a network halves its resolution."""


def inner_convolutions(model: PreTrainedModel) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of an image model that can be 1-bit: see `float_convolutions` for all others."""
    float_ones = float_convolutions(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in float_ones:
            yield name, module


def float_convolutions(model: PreTrainedModel) -> dict[str, str]:
    """Names of the convolutions of an image model that always stay float, and why: those of the head, of the stem, on
    shortcuts, and with groups.

    The stem is the first convolution, with all that is in one `nn.Sequential` with it, and whatever is named so.
    """
    head = head_modules(model)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    stem = _stem(model, next((name for name in convolutions if name not in head), ""))
    reasons = {}
    for name, module in convolutions.items():
        parts = set(name.split("."))
        if name in head:
            reasons[name] = "convolution of the head"
        elif name.startswith(stem) or parts & set(STEMS):
            reasons[name] = "stem"
        elif parts & set(SHORTCUTS):
            reasons[name] = "shortcut"
        elif module.groups > 1:
            reasons[name] = "convolution with groups"
    return reasons


def _stem(model: PreTrainedModel, first: str) -> str:
    """What the names of the stem start with, given that of the first convolution."""
    parent = first.rpartition(".")[0]
    return f"{parent}." if type(model.get_submodule(parent)) is nn.Sequential else first


def blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block of the encoder."""
    for prefix in block_prefixes(model):
        for index, block in enumerate(model.get_submodule(prefix.removesuffix("."))):
            yield f"{prefix}{index}", block
