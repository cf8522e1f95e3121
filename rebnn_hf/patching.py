"""binarize, pack, unpack: the three verbs that change a model's state. Each checks everything before it changes
anything, is idempotent, and returns the model it was given."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import base_relative, block_prefixes
from .config import ReBNNConfig
from .layers import LATENT_OF, LATENT_TYPES, PACKED_OF, PACKED_TYPES, BinaryEmbedding


def binarize(model: PreTrainedModel, config: ReBNNConfig | None = None) -> PreTrainedModel:
    """Give a float model 1-bit weights that can be trained: float -> latent, in place.

    By default every `nn.Linear` inside the encoder's blocks; embeddings, LayerNorm, pooler and task head stay float
    (see `ReBNNConfig` for the switches). The forward pass uses `alpha * sign(W)` at once; to get accuracy back, train
    with `ReBNNTrainer`, or with any loop and `rebnn_hf.attach`.

    Args:
        model: a transformers model with floating point weights.
        config: default `ReBNNConfig()`; it is copied, and the copy saved as `model.config.quantization_config`.

    Returns:
        The same model. On a model that is latent already, nothing changes.

    Raises:
        TypeError: not a transformers model.
        ValueError: nothing matched; a packed, meta-device, quantized or otherwise not plainly float model; weights
            shared between modules; a model that is latent under other settings. The model is as it was.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")
        >>> rebnn_hf.binarize(model, ReBNNConfig(word_embeddings=True))
    """
    _require_transformers_model(model, "binarize")
    saved = saved_config(model)
    if saved is not None:
        _require_same_method(saved, config)
        return model
    config = copy.deepcopy(config) if config is not None else ReBNNConfig()
    targets = _select(model, config)
    _check_targets(model, targets, config)
    _record(model, config, targets)
    if isinstance(getattr(model.config, "quantization_config", None), ReBNNConfig):
        _own_config(model)
    for name, module in targets.items():
        _replace(model, name, LATENT_OF[type(module)].from_float(module, config.rule()))
    untie_binary_embeddings(model)
    model.config.quantization_config = config
    return model


def pack(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn latent weights into bits: latent -> packed, in place. Outputs stay the same.

    Args:
        model: made by `binarize` (and trained).
        dtype: type of everything that stays float (scales, biases, LayerNorm, embeddings), e.g. `torch.float16` for
            the smallest file; default: unchanged.

    Returns:
        The same model, ready for `save_pretrained`. Of a packed model only the type is changed, if one is given.

    Raises:
        TypeError: not a transformers model, or `dtype` is not floating point.
        ValueError: not a binarized model, or values that are not finite or do not fit into `dtype`.
    """
    _require_transformers_model(model, "pack")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} is not floating point; use torch.float32, torch.float16 or torch.bfloat16.")
    config = saved_config(model)
    if config is None:
        raise ValueError("pack() expects a model made by rebnn_hf.binarize(), got a float one; binarize and train it.")
    _check_values(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, LATENT_TYPES):
            _replace(model, name, module.pack())
    if dtype is not None:
        _cast_float(model, dtype)
    config.state = "packed"
    return model


def unpack(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a 1-bit model into a plain float one with weights `alpha * b`, in place, for export or merging.

    Args:
        model: packed or latent (whose latent values are lost: only their signs and scales remain).

    Returns:
        The same model, without any class of this package in it. A float model is returned unchanged.

    Raises:
        TypeError: not a transformers model.
    """
    _require_transformers_model(model, "unpack")
    if saved_config(model) is None:
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, LATENT_TYPES + PACKED_TYPES):
            _replace(model, name, module.to_float())
    forget_quantization(model)
    return model


def saved_config(model: nn.Module) -> ReBNNConfig | None:
    """The config a model was binarized with, or None for a float model.

    The layers decide: a float model may share its config object with a binarized one.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    one_bit = any(isinstance(module, LATENT_TYPES + PACKED_TYPES) for module in model.modules())
    return config if one_bit and isinstance(config, ReBNNConfig) else None


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove what marks a model as quantized for transformers."""
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)


def prepare_for_loading(model: PreTrainedModel, config: ReBNNConfig) -> None:
    """Give a model on the meta device the layers that a saved checkpoint describes.

    Raises:
        ValueError: a module named in the config does not exist in this architecture or is of another type.
    """
    for name in _names_to_load(model, config):
        module = model.get_submodule(name)
        if config.state == "packed":
            _replace(model, name, PACKED_OF[type(module)].like(module))
        else:
            _replace(model, name, LATENT_OF[type(module)].from_float(module, config.rule()))


def select_for_loading(model: PreTrainedModel, config: ReBNNConfig) -> None:
    """Choose and record the targets of a float checkpoint that is binarized while it loads (meta device).

    Raises:
        ValueError: as `binarize`.
    """
    targets = _select(model, config)
    _check_targets(model, targets, config, on_meta=True)
    _record(model, config, targets)


def untie_binary_embeddings(model: PreTrainedModel) -> None:
    """Where the word embeddings are binary, give each weight that transformers ties a float copy of its own.

    While a float checkpoint loads, this waits until the tied weights have their values.
    """
    if not any(isinstance(module, BinaryEmbedding) for module in model.modules()):
        return
    for name in _tied(model):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, nn.Parameter(getattr(owner, child).detach().clone()))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


# Step 1: list


def _select(model: PreTrainedModel, config: ReBNNConfig) -> dict[str, nn.Module]:
    skipped = _skipped(model, config)
    targets = {name: module for name, module in _candidates(model, config) if name not in skipped}
    if not targets:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ValueError(
            f"nothing to binarize in {type(model).__name__}: of its {len(linears)} linear layers none is in a block "
            f"of the encoder and selected by the config. Looked at: {', '.join(linears) or 'no linear layer'}. "
            f"Skipped by modules_to_not_convert: {', '.join(sorted(skipped)) or 'none'}."
        )
    return targets


def _candidates(model: PreTrainedModel, config: ReBNNConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the switches of the config choose, before names are looked at."""
    blocks = block_prefixes(model)
    if config.word_embeddings:
        yield _word_embeddings(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        inside = base_relative(model, name) is not None
        if "pooler" in name.split("."):
            chosen = config.pooler
        elif inside:
            chosen = name.startswith(blocks)
        else:
            chosen = config.head
        if chosen:
            yield name, module


def _word_embeddings(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    module = model.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        raise ValueError(
            f"word_embeddings=True, but the input embedding of {type(model).__name__} is a {type(module).__name__}; "
            "use word_embeddings=False."
        )
    return next(name for name, m in model.named_modules() if m is module), module


def _skipped(model: PreTrainedModel, config: ReBNNConfig) -> set[str]:
    """Names of modules matched by `modules_to_not_convert`, as full or as base-relative names."""
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


# Step 2: check


def _require_transformers_model(model, verb: str) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{verb}() expects a transformers PreTrainedModel, got {type(model).__name__}; pass the model inside "
            "the wrapper (for example accelerator.unwrap_model(model))."
        )


def _require_same_method(saved: ReBNNConfig, config: ReBNNConfig | None) -> None:
    if saved.state == "packed":
        raise ValueError(
            "the model is packed: its latent weights are gone and cannot be trained; "
            "use unpack() to go back to float, or load the latent checkpoint."
        )
    if config is None or config.method() == saved.method():
        return
    changed = [name for name, value in config.method().items() if value != saved.method()[name]]
    raise ValueError(
        f"the model is already binarized with other settings ({', '.join(changed)}); reload the float one."
    )


def _check_targets(model, targets: dict[str, nn.Module], config: ReBNNConfig, on_meta: bool = False) -> None:
    for name, module in targets.items():
        if type(module) not in LATENT_OF:
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear or "
                f"nn.Embedding: binarize the float model, or add {name!r} to modules_to_not_convert."
            )
        if not module.weight.is_floating_point():
            raise ValueError(f"{name}.weight is {module.weight.dtype}; expected floating point weights.")
        if module.weight.is_meta and not on_meta:
            raise ValueError(f"{name}.weight is on the meta device and has no values; load the model first.")
        if not module.weight.numel():
            raise ValueError(f"{name}.weight is empty ({tuple(module.weight.shape)}).")
        if getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False):
            raise ValueError(f"{name} uses max_norm or sparse gradients, which 1-bit embeddings do not support.")
    _check_unshared(model, targets, config)


def _check_values(model, dtype: torch.dtype | None) -> None:
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors hold NaN or infinity (first: {broken[0]}); training diverged, "
            "resume from an earlier checkpoint with a smaller learning rate."
        )
    for name, tensor in tensors.items():
        if dtype is not None and tensor.abs().max() > torch.finfo(dtype).max:
            raise ValueError(f"{name} has values that do not fit into {dtype}; use torch.bfloat16 or torch.float32.")


def _check_unshared(model, targets: dict[str, nn.Module], config: ReBNNConfig) -> None:
    uses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name)
    tied = _tied(model)
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


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Weights that transformers ties, {copy: original}; on the meta device they are not one parameter yet."""
    return model.all_tied_weights_keys if getattr(model.config, "tie_word_embeddings", False) else {}


# Step 3: swap


def _record(model, config: ReBNNConfig, targets: dict[str, nn.Module]) -> None:
    relative = {name: base_relative(model, name) for name in targets}
    config.converted = [short for short in relative.values() if short is not None]
    config.converted_head = [name for name, short in relative.items() if short is None]
    config.not_converted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in targets
    ]
    config.state = "latent"


def _own_config(model: PreTrainedModel) -> None:
    """Leave the config to the binarized model it was shared with, or copied from."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _cast_float(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is saved as float; buffers that are not saved (rotary frequencies) keep their type, as in a load."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _names_to_load(model: PreTrainedModel, config: ReBNNConfig) -> list[str]:
    """Full names, in this model, of the modules a config calls converted.

    Another head class, or none, may lack the pooler and the head.
    """
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    modules = dict(model.named_modules())
    names = [prefix + name for name in config.converted if "pooler" not in name.split(".") or prefix + name in modules]
    names += [name for name in config.converted_head if name in modules]
    if not names:
        raise ValueError("the rebnn config names no converted module; the checkpoint's config.json was damaged.")
    for name in names:
        if name not in modules:
            raise ValueError(
                f"the checkpoint's config calls {name!r} a 1-bit module, but {type(model).__name__} has none of that "
                "name; config and architecture do not belong together."
            )
        if type(modules[name]) not in LATENT_OF:
            raise ValueError(
                f"the checkpoint's config calls {name!r} a 1-bit module, but in {type(model).__name__} it is a "
                f"{type(modules[name]).__name__}."
            )
    return names
