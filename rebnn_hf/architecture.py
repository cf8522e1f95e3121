"""Where things are in a model, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import takewhile

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


def require_model(model: object, function: str) -> None:
    """Refuse what is no model, or only holds one: there the layers have other names than in the model itself.

    Args:
        model: what was passed.
        function: the name of what it was passed to, for the message.

    Raises:
        TypeError: neither a transformers model nor a module without one inside.
    """
    if not isinstance(model, nn.Module) or _is_wrapper(model):
        raise TypeError(
            f"{function}() expects a transformers PreTrainedModel or a plain torch.nn.Module, got "
            f"{type(model).__name__}; pass the model inside the wrapper (model[0].auto_model of a SentenceTransformer, "
            "accelerator.unwrap_model(model) of DDP, peft_model.get_base_model()), and a transformers model as a whole."
        )


def _is_wrapper(model: nn.Module) -> bool:
    """DDP and its like, torch.compile, PEFT, what other libraries put around a transformers model, or a part of one."""
    if isinstance(model, PreTrainedModel):
        return False
    if type(model).__module__.startswith("transformers."):
        return True
    children = [name for name, _ in model.named_children()]
    around = children in (["module"], ["_orig_mod"], ["_fsdp_wrapped_module"]) or hasattr(model, "get_base_model")
    return around or any(isinstance(module, PreTrainedModel) for module in model.modules())


def model_type(model: nn.Module) -> str:
    """What transformers calls the architecture; of a plain module the name of its class."""
    return model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__


def is_base(model: nn.Module) -> bool:
    """Whether a model is its own base model, as every plain module is."""
    return not isinstance(model, PreTrainedModel) or model.base_model is model


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that holds the blocks, None where `ENCODERS` does not know the architecture."""
    layout = ENCODERS.get(model.config.model_type)
    return None if layout is None else model.base_model.get_submodule(layout.encoder)


def layout_of(model: nn.Module) -> BlockLayout | None:
    """Layout of the model's blocks, None where it is not known."""
    return LAYOUTS.get(model.config.model_type) if isinstance(model, PreTrainedModel) else None


def base_relative(model: nn.Module, name: str) -> str | None:
    """Name of a module relative to the base model, None for a module outside of it."""
    if is_base(model):
        return name
    prefix = model.base_model_prefix + "."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


HEADS = ("head", "heads", "classifier", "fc")
"""Names of what makes classes of features; in transformers models it is also what lies outside the base model."""

STEMS = ("stem", "embedder", "patch_embed", "patch_embeddings")
"""Names of what turns an image into features."""

SHORTCUTS = ("downsample", "downsampling_layer", "shortcut")
"""Names of what makes a shortcut fit where a network halves its resolution."""


def is_named(name: str, names: tuple[str, ...]) -> bool:
    """Whether a module, or one that holds it, is called one of these."""
    return not set(names).isdisjoint(name.split("."))


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the lists of equal blocks in the base model: the encoder, whatever the architecture calls it."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and base_relative(model, name) is not None
        and not is_named(name, HEADS)
        and len({type(block) for block in module}) == 1
        and (isinstance(module, nn.ModuleList) or any(True for _ in module[0].children()))  # timm's are Sequential
    )


def head_modules(model: nn.Module) -> set[str]:
    """Names of what makes up the task head.

    That is all outside the base model; what timm calls the classifier; outside the blocks, what is named like a head
    and, in a plain module, every linear layer.
    """
    plain, prefixes = not isinstance(model, PreTrainedModel), block_prefixes(model)
    classifier = getattr(model if plain else model.base_model, "get_classifier", tuple)()
    parts = classifier if isinstance(classifier, tuple) else (classifier,)  # of distilled ones there are two
    classifying = {module for part in parts for module in part.modules()}

    def belongs(name: str, module: nn.Module) -> bool:
        if base_relative(model, name) is None or module in classifying:
            return True
        behind = is_named(name, HEADS) or (plain and isinstance(module, nn.Linear))
        return behind and not name.startswith(prefixes)

    return {name for name, module in model.named_modules() if name and belongs(name, module)}


def inner_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of an image model that `kept_convolutions` does not keep float."""
    kept = kept_convolutions(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in kept:
            yield name, module


def kept_convolutions(model: nn.Module) -> dict[str, str]:
    """Full names of the convolutions that stay float by what they are, and what that is.

    `head`: see `head_modules`. `stem`: the first convolution; those beside it in one `nn.Sequential`,
    up to its first child with children, unless the network has no others; and what is named so. `shortcut`: what is
    named so, and what sees each pixel once at most while it makes the image smaller, such as 1x1 with stride 2.
    `groups`: with groups, such as depthwise ones.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    head = head_modules(model)
    stem = _stem(model, [name for name in every if name not in head])
    kept = {}
    for name, module in every.items():
        if name in head:
            kept[name] = "head"
        elif name in stem or is_named(name, STEMS):
            kept[name] = "stem"
        elif is_named(name, SHORTCUTS) or _only_halves(module):
            kept[name] = "shortcut"
        elif module.groups > 1:
            kept[name] = "groups"
    return kept


def _stem(model: nn.Module, convolutions: list[str]) -> set[str]:
    if not convolutions:
        return set()
    first = convolutions[0]
    parent, _, _ = first.rpartition(".")
    holder = model.get_submodule(parent)
    if type(holder) is not nn.Sequential:
        return {first}
    leading = takewhile(lambda child: not any(True for _ in child[1].children()), holder.named_children())
    stem = {f"{parent}.{name}".removeprefix(".") for name, _ in leading} & set(convolutions)
    return {first} if len(stem) == len(convolutions) else stem


def _only_halves(conv: nn.Conv2d) -> bool:
    """Whether the windows of a convolution that makes images smaller do not overlap."""
    return max(conv.stride) > 1 and all(size <= step for size, step in zip(conv.kernel_size, conv.stride, strict=True))


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block of the encoder."""
    for prefix in block_prefixes(model):
        for index, block in enumerate(model.get_submodule(prefix.removesuffix("."))):
            yield f"{prefix}{index}", block
