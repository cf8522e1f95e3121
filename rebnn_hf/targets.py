"""Which modules of a model become 1-bit, and whether they can: what the verbs of `patching` look at before they change
anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import NoneType

from torch import nn
from transformers import PreTrainedModel

from .architecture import (
    LAYOUTS,
    base_relative,
    block_prefixes,
    blocks,
    head_modules,
    inner_convolutions,
    is_base,
    layout_of,
    model_type,
)
from .binarizers import ClippedSign, ShiftedSign
from .config import ReBNNConfig
from .functional import shown
from .layers import LATENT_OF, LATENT_TYPES


def select(model: nn.Module, config: ReBNNConfig) -> dict[str, nn.Module]:
    """Full name and module of what the config chooses; in a model that was built of latent layers, these.

    Raises:
        ValueError: nothing is chosen, or a pattern is wrong.
    """
    built_in = latent_layers(model)
    if built_in:
        return built_in
    skipped = skipped_modules(model, config)
    targets = {name: module for name, module in _candidates(model, config) if name not in skipped}
    if not targets:
        found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        raise ValueError(
            f"nothing to binarize in {type(model).__name__}: of its {len(found)} linear layers and convolutions none "
            f"is in a block of the encoder, or a convolution behind the stem, and selected by the config. Looked at: "
            f"{', '.join(found) or 'nothing'}. "
            f"Skipped by modules_to_not_convert: {', '.join(sorted(skipped)) or 'none'}."
        )
    return targets


def latent_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Full name and module of what is latent."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LATENT_TYPES)}


INPUTS = {NoneType: "none", ShiftedSign: "rsign", ClippedSign: "sign"}
"""What a config calls the inputs of layers that models are built of, by the type of their binarizer."""


def built_in_config(layers: dict[str, nn.Module]) -> ReBNNConfig:
    """What a model that was built of latent layers (`rebnn_hf.vision`) would be called by a config.

    Raises:
        ValueError: the layers differ, or have inputs that a config cannot describe.
    """
    kinds = {(module.rule, type(module.input_binarizer)) for module in layers.values()}
    if len(kinds) != 1 or next(iter(kinds))[1] not in INPUTS:
        found = ", ".join(sorted(f"{binarizer.__name__} with {rule}" for rule, binarizer in kinds))
        raise ValueError(
            f"the model was built of latent layers that no single config describes ({found}); build it with one weight "
            f"rule and with inputs among {', '.join(INPUTS.values())}."
        )
    rule, binarizer = next(iter(kinds))
    return ReBNNConfig(
        weight_scale=rule.scale,
        scale_granularity=rule.granularity,
        scale_gradient=rule.scale_gradient,
        weight_center=rule.center,
        center_gradient=rule.center_gradient,
        weight_ste=rule.ste,
        ste_slope=rule.slope,
        ties=rule.ties,
        activation=INPUTS[binarizer],
        balance_rule="flip_maxgrad" if rule.scale == "learned" else "none",
    )


def _candidates(model: nn.Module, config: ReBNNConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the switches of the config choose, before names are looked at."""
    prefixes, head = block_prefixes(model), head_modules(model)
    if config.word_embeddings:
        yield _word_embeddings(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if "pooler" in name.split("."):
            chosen = config.pooler
        elif name in head:
            chosen = config.head
        else:
            chosen = name.startswith(prefixes)
        if chosen:
            yield name, module
    yield from inner_convolutions(model)


def _word_embeddings(model: nn.Module) -> tuple[str, nn.Embedding]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"word_embeddings=True needs a transformers model, which says where they are, and {type(model).__name__} "
            "is none; use word_embeddings=False."
        )
    module = model.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        raise ValueError(
            f"word_embeddings=True, but the input embedding of {type(model).__name__} is a {type(module).__name__}; "
            "use word_embeddings=False."
        )
    return next(name for name, m in model.named_modules() if m is module), module


def skipped_modules(model: nn.Module, config: ReBNNConfig) -> set[str]:
    """Names of modules matched by `modules_to_not_convert`, as full or as base-relative names.

    Raises:
        ValueError: a pattern is not a regular expression, or matches nothing.
    """
    skipped = set()
    for pattern in config.modules_to_not_convert or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} is not a regular expression ({error}); "
                "give a module's name, a part of it, or a valid expression."
            ) from error
        matched = {n for n, _ in model.named_modules() if n and _matches(pattern, n, base_relative(model, n))}
        if not matched:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} matches no module of {type(model).__name__}; "
                "print(model) shows the names."
            )
        skipped |= matched
    return skipped


def _matches(pattern: str, *names: str | None) -> bool:
    """A pattern is a run of whole parts of a name (`attention`, `layer.0`), or a regular expression for its start."""
    return any(
        f".{pattern}." in f".{name}." or re.match(rf"(?:{pattern})(?=\.|$)", name) for name in names if name is not None
    )


def check_targets(model, targets: dict[str, nn.Module], config: ReBNNConfig, on_meta: bool = False) -> None:
    """Raise a ValueError, in words, where a chosen module or the architecture cannot be binarized."""
    check_architecture(model, config)
    for name, module in targets.items():
        if type(module) not in (*LATENT_OF, *LATENT_TYPES):
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear, nn.Conv2d or "
                f"nn.Embedding: binarize the float model, or add {name!r} to modules_to_not_convert."
            )
        if type(module) is nn.Conv2d:
            _check_convolution(name, module, config)
        _check_called(model, name)
        if not module.weight.is_floating_point():
            raise ValueError(f"{name}.weight is {module.weight.dtype}; expected floating point weights.")
        if module.weight.is_meta and not on_meta:
            raise ValueError(f"{name}.weight is on the meta device and has no values; load the model first.")
        if not module.weight.numel():
            raise ValueError(f"{name}.weight is empty ({tuple(module.weight.shape)}).")
        if getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False):
            raise ValueError(f"{name} uses max_norm or sparse gradients, which 1-bit embeddings do not support.")
    _check_unshared(model, targets, config)


def _check_called(model: nn.Module, name: str) -> None:
    """Refuse a layer whose weight the module around it multiplies by itself: it would stay float without a word."""
    parent, _, child = name.rpartition(".")
    kind = type(model.get_submodule(parent))
    if kind.__module__.startswith("transformers."):  # which call the layer, and only look at the type of its weight
        return
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):  # defined where Python keeps no text
        return
    if re.search(rf"\bself\.{re.escape(child)}\.weight\b(?!\.(dtype|device|shape))", source):
        raise ValueError(
            f"{name} is not called: {kind.__name__}.forward() takes its weight and computes by itself, in float; add "
            f"{name!r} to modules_to_not_convert."
        )


def _check_convolution(name: str, conv: nn.Conv2d, config: ReBNNConfig) -> None:
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"{name} pads with padding_mode={conv.padding_mode!r}, which 1-bit convolutions do not; add {name!r} to "
            "modules_to_not_convert."
        )
    if config.activation in ("sign", "rsign"):
        raise ValueError(
            f"{name} reads what an activation function leaves, which is (nearly) never negative: activation="
            f"{config.activation!r} would see one sign only; use activation='elastic', or a network built for signs "
            "(rebnn_hf.vision)."
        )
    if config.activation == "token":
        raise ValueError(
            "activation='token' has a scale for each position, and a convolution sums over positions; use "
            "activation='elastic' with 8 bits."
        )


def check_architecture(model, config: ReBNNConfig) -> None:
    """Raise a ValueError where 1-bit attention or another feed-forward function meets unknown modelling code."""
    wanted = [f"attention={config.attention!r}"] if config.attention != "softmax" else []
    wanted += [f"ffn_activation={config.ffn_activation!r}"] if config.ffn_activation != "model" else []
    if wanted and layout_of(model) is None:
        raise ValueError(
            f"{' and '.join(wanted)} must know the modelling code, and {model_type(model)!r} is not among "
            f"{', '.join(LAYOUTS)}; attention='softmax' with ffn_activation='model' works on every architecture, as in "
            "the preset 'rebnn-elastic-w1a1'."
        )


def _check_unshared(model, targets: dict[str, nn.Module], config: ReBNNConfig) -> None:
    uses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name)
    tied = tied_weights(model)
    for name, module in targets.items():
        own = f"{name}.weight"
        partners = {target for target, source in tied.items() if source == own} | {tied.get(own, own)}
        others = (uses[id(module.weight)] | partners) - {own}
        remedy = f"add {name!r} to modules_to_not_convert"
        if config.untie_embeddings:
            others -= tied.keys()
        elif isinstance(module, nn.Embedding):
            remedy = "untie_embeddings=True gives the other a float copy of its own"
        if others:
            raise ValueError(f"{own} is shared with {', '.join(sorted(others))}, and bits cannot be tied: {remedy}.")


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Weights that transformers ties, {copy: original}; on the meta device they are not one parameter yet."""
    ties = isinstance(model, PreTrainedModel) and getattr(model.config, "tie_word_embeddings", False)
    return model.all_tied_weights_keys if ties else {}


def record(model, config: ReBNNConfig, targets: dict[str, nn.Module]) -> None:
    """Write into the config what is converted and what is not."""
    head = head_modules(model)
    config.converted = [base_relative(model, name) for name in targets if name not in head]
    config.converted_head = [name for name in targets if name in head]
    config.converted_attention, config.converted_ffn = _blocks_to_change(model, config)
    config.not_converted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and name not in targets
    ]
    config.state = "latent"


def _blocks_to_change(model, config: ReBNNConfig) -> tuple[list[str], list[str]]:
    """Base-relative names of attention modules and feed-forward functions that the config changes."""
    layout = layout_of(model)
    if layout is None:
        return [], []
    skipped = skipped_modules(model, config)
    names = {
        part: [base_relative(model, name) for block, _ in blocks(model) if (name := f"{block}.{part}") not in skipped]
        for part in (layout.attention, layout.ffn_activation)
    }
    attention = names[layout.attention] if config.attention != "softmax" else []
    return attention, names[layout.ffn_activation] if config.ffn_activation != "model" else []


def full_name(model: nn.Module, relative: str) -> str:
    """Name in this model of a module that the config names relative to the base model."""
    return relative if is_base(model) else f"{model.base_model_prefix}.{relative}"


def names_to_load(model: nn.Module, config: ReBNNConfig) -> list[str]:
    """Full names, in this model, of the modules a config calls converted.

    Another head class, or none, may lack the pooler and the head.

    Raises:
        ValueError: a name is that of no module, of one that cannot be 1-bit, or given twice.
    """
    modules = dict(model.named_modules())
    names = [full_name(model, name) for name in config.converted]
    names = [name for name in names if "pooler" not in name.split(".") or name in modules]
    names += [name for name in config.converted_head if not isinstance(modules.get(name), NoneType | nn.Identity)]
    if not names:
        raise ValueError("the rebnn config names no converted module; the checkpoint's config.json was damaged.")
    for name in names:
        if name not in modules:
            raise ValueError(
                f"the checkpoint's config calls {shown(name)} a 1-bit module, but {type(model).__name__} has none of "
                "that name; config and architecture do not belong together."
            )
        if type(modules[name]) not in (*LATENT_OF, *LATENT_TYPES):
            raise ValueError(
                f"the checkpoint's config calls {shown(name)} a 1-bit module, but in {type(model).__name__} it is a "
                f"{type(modules[name]).__name__}."
            )
    if len(set(names)) < len(names):
        raise ValueError("the rebnn config calls a module of the base model one of the head too; it was damaged.")
    return names


def check_saved(model: nn.Module, config: ReBNNConfig) -> None:
    """Whether a model has what the config of a saved one says was changed.

    Raises:
        ValueError: blocks that are not there, or bits for a weight that is shared.
    """
    check_architecture(model, config)
    layout = layout_of(model)
    for field_name, choice, float_choice in (
        ("converted_attention", "attention", "softmax"),
        ("converted_ffn", "ffn_activation", "model"),
    ):
        named, chosen = set(getattr(config, field_name)), getattr(config, choice)
        known = set()
        if layout is not None and chosen != float_choice:
            known = {base_relative(model, f"{block}.{getattr(layout, choice)}") for block, _ in blocks(model)}
        if named - known:
            raise ValueError(
                f"the checkpoint's config has {choice}={chosen!r} and {field_name} with {shown(min(named - known))}, "
                f"which {type(model).__name__} cannot have; config and architecture do not belong together."
            )
    tied = tied_weights(model)
    for name in (f"{full_name(model, name)}.weight" for name in config.converted):
        if name in tied or name in tied.values():
            raise ValueError(
                f"the checkpoint's config calls {shown(name)} 1-bit, and has tie_word_embeddings=True, which shares it "
                "with a float matrix; it was damaged."
            )
