"""binarize, pack, unpack: the three verbs that change a model's state. Each checks everything before it changes
anything, is idempotent, and returns the model it was given."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import blocks, layout_of, require_model
from .binarizers import PARAMETRIC, Elastic
from .config import ReBNNConfig, config_of, give_config
from .functional import WeightRule
from .fusion import fuse
from .hub import guard, unguard
from .insertion import add_activations, replace_module
from .layers import LATENT_OF, LATENT_TYPES, PACKED_OF, PACKED_TYPES, BinaryEmbedding, float_type
from .shards import is_sharded
from .targets import (
    built_in_config,
    check_architecture,
    check_targets,
    latent_layers,
    names_to_load,
    record,
    select,
    tied_weights,
)

HUB_TAGS = ("rebnn", "1-bit")
"""Tags that every push of a 1-bit model to the Hub gives its card."""

Model = TypeVar("Model", bound=nn.Module)


def binarize(model: Model, config: ReBNNConfig | None = None) -> Model:
    """Give a float model 1-bit weights that can be trained: float -> latent, in place.

    By default every `nn.Linear` inside the encoder's blocks; embeddings, LayerNorm, pooler and task head stay float
    (see `ReBNNConfig` for the switches). Of image models also the convolutions, but for the stem, shortcuts, those
    with groups and the head (`architecture.kept_convolutions` says what these are). A model that was built of latent
    layers (`rebnn_hf.vision`) stays as it is and gets its config. The forward pass uses `alpha * sign(W)` at once; to
    get accuracy back, train with `ReBNNTrainer`, or with any loop and `rebnn_hf.attach`. Elastic activations take
    their scales from data first: `ReBNNTrainer` sees to it, other loops call `rebnn_hf.calibrate(model, batch)`.

    Args:
        model: a transformers model with floating point weights (of a SentenceTransformer it is `model[0].auto_model`),
            or a plain module, such as a network of torchvision or timm.
        config: default `ReBNNConfig()`; it is copied, and the copy kept as `model.config.quantization_config`, in a
            plain module as `model.quantization_config` (see `save_model`).

    Returns:
        The same model. On a model that is latent already, nothing changes.

    Raises:
        TypeError: not a model, or a wrapper of one.
        ValueError: nothing matched; a packed, meta-device, quantized or otherwise not plainly float model; weights
            shared between modules, or multiplied by another module than their layer; a model that is latent under
            other settings; 1-bit attention on an architecture that is not known. The model is as it was.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")
        >>> rebnn_hf.binarize(model, ReBNNConfig(word_embeddings=True))
        >>> rebnn_hf.binarize(torchvision.models.resnet18(weights="DEFAULT"), ReBNNConfig(activation="elastic"))
    """
    require_model(model, "binarize")
    saved = saved_config(model)
    if saved is not None:
        _require_same_method(saved, config)
        return model
    built_in = latent_layers(model)
    config = _config_for_built_in(built_in, config) if built_in else copy.deepcopy(config) or ReBNNConfig()
    targets = select(model, config)
    check_targets(model, targets, config)
    record(model, config, targets)
    if config_of(model) is not None:
        _own_config(model)
    if not built_in:
        for name, module in targets.items():
            replace_module(model, name, _latent(module, config))
        add_activations(model, config, list(targets))
        untie_binary_embeddings(model)
    remember_quantization(model, config)
    _tag(model)
    return model


def pack(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Turn latent weights into bits: latent -> packed, in place. Outputs stay the same.

    In another `dtype` they stay the same but for its rounding, which few-bit activations can make large: an input near
    a threshold may get another code. Score what you publish.

    Args:
        model: made by `binarize` (and trained).
        dtype: type of everything that stays float (scales, biases, LayerNorm, embeddings), e.g. `torch.float16` for
            the smallest file; default: unchanged.

    Returns:
        The same model, ready for `save_pretrained` (a plain module for `save_model`). Of a packed model only the type
        is changed, if one is given.

    Raises:
        TypeError: not a model, or a wrapper of one; or `dtype` is not floating point.
        ValueError: not a binarized model; values that are not finite or do not fit into `dtype`; scales of elastic
            activations that were never found from data; `ties="released"`, whose signs have three values; weights
            that are sharded over processes.
    """
    require_model(model, "pack")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} is not floating point; use torch.float32, torch.float16 or torch.bfloat16.")
    config = saved_config(model)
    if config is None:
        _require_no_layers(model, "pack")
        raise ValueError("pack() expects a model made by rebnn_hf.binarize(), got a float one; binarize and train it.")
    _require_whole_weights(model, "pack")
    _check_packable(model, config)
    _check_values(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, LATENT_TYPES):
            replace_module(model, name, module.pack())
    if dtype is not None:
        _cast_float(model, dtype)
    config.state = "packed"
    if isinstance(model, PreTrainedModel):
        fuse(model)
    return model


def unpack(model: Model) -> Model:
    """Turn a 1-bit model into a plain float one with weights `alpha * b`, in place, for export or merging.

    Adapters of PEFT around its layers stay, and can be merged then.

    Args:
        model: packed or latent (whose latent values are lost: only their signs and scales remain).

    Returns:
        The same model, without any class of this package in it. A float model is returned unchanged.

    Raises:
        TypeError: not a model, or a wrapper of one.
        ValueError: activations or attention have few bits too: no float model computes the same.
    """
    require_model(model, "unpack")
    config = saved_config(model)
    if config is None:
        _require_no_layers(model, "unpack")
        return model
    some_blocks = 0 < len(config.converted_ffn) < len(list(blocks(model)))  # a float config has one function for all
    trained = config.converted_attention or config.ffn_activation == "rprelu" or some_blocks
    if config.activation == "token" and config.state == "packed" and not trained:
        raise ValueError(
            "unpack() makes a plain float model, and the inputs of this one are rounded to 8 bits; undo that first: "
            "rebnn_hf.use_int8_inputs(model, enabled=False)."
        )
    if config.activation != "none" or trained:
        raise ValueError(
            f"unpack() makes a plain float model, which cannot compute activation={config.activation!r} with attention="
            f"{config.attention!r} and ffn_activation={config.ffn_activation!r}; single matrices are to be had from "
            "layer.binary_weight()."
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, LATENT_TYPES + PACKED_TYPES):
            replace_module(model, name, module.to_float())
    if config.converted_ffn:
        _own_config(model)
        setattr(model.config, layout_of(model).activation_field, "relu")
    forget_quantization(model)
    return model


def rebinarize(
    model: Model,
    config: ReBNNConfig,
    carry_weight_scales: bool = True,
    carry_activation_scales: bool = False,
) -> Model:
    """Continue a latent model under other rules, in place: the next stage of a staged distillation (BiT C7).

    Latent weights, biases and all that is float stay; the balance starts from 0. For example from 2-bit to 1-bit
    activations.

    Args:
        model: latent, of the stage before.
        config: of the next stage; it must choose the same modules.
        carry_weight_scales: keep learned weight scales where both stages have them; otherwise mean|w|.
        carry_activation_scales: keep scales and shifts of activations of the same kind, as BiT does, although a step of
            2 bits is not one of 1 bit; otherwise they are found from data anew (see `calibrate`), but for RPReLU, which
            stays where both have it.

    Returns:
        The same model.

    Raises:
        TypeError: not a model, or a wrapper of one.
        ValueError: not latent, the stages do not fit onto one another (`stage_conflict`), or 1-bit attention on an
            architecture that is not known. The model is as it was.
    """
    require_model(model, "rebinarize")
    saved = saved_config(model)
    if saved is None:
        _require_no_layers(model, "rebinarize")
    _require_latent(saved)
    conflict = stage_conflict(saved, config)
    if conflict:
        raise ValueError(conflict)
    check_architecture(model, config)
    config = copy.deepcopy(config)
    config.state = "latent"
    names = [name for name, module in model.named_modules() if isinstance(module, LATENT_TYPES)]
    record(model, config, {name: model.get_submodule(name) for name in names})
    old = {n: m for n, m in model.named_modules() if isinstance(m, PARAMETRIC)} if carry_activation_scales else {}
    for name in names:
        _change_rule(model.get_submodule(name), config, carry_weight_scales)
    add_activations(model, config, names)
    for name, module in model.named_modules():
        if isinstance(module, PARAMETRIC) and type(module) is type(old.get(name)):
            module.load_state_dict(old[name].state_dict())
    remember_quantization(model, config)
    return model


def stage_conflict(earlier: ReBNNConfig, later: ReBNNConfig) -> str | None:
    """Why `rebinarize` cannot go from one config to another; None if it can."""
    fixed = ("word_embeddings", "pooler", "head", "modules_to_not_convert")
    changed = [name for name in fixed if getattr(earlier, name) != getattr(later, name)]
    if earlier.ffn_activation not in ("model", later.ffn_activation):
        changed.append("ffn_activation")
    if changed:
        return (
            f"the stages differ in {', '.join(changed)}, which a later one cannot change; make them equal, or start "
            "from the float model."
        )
    if earlier.attention != "softmax" and later.attention == "softmax":
        return "a stage with attention='softmax' cannot follow one with 1-bit attention; reverse the order."
    return None


def selected_modules(model: nn.Module, config: ReBNNConfig | None = None) -> list[str]:
    """What `binarize` would convert, without changing anything; the model may be on the meta device.

    Raises:
        TypeError, ValueError: as `binarize` would.
    """
    require_model(model, "selected_modules")
    config = config or ReBNNConfig()
    targets = select(model, config)
    check_targets(model, targets, config, on_meta=True)
    return list(targets)


def saved_config(model: nn.Module) -> ReBNNConfig | None:
    """The config a model was binarized with, or None for a float model.

    The layers decide: a float model may share its config object with a binarized one.
    """
    return config_of(model) if _has_layers(model) else None


def remember_quantization(model: nn.Module, config: ReBNNConfig) -> None:
    """Put a config where it is saved with a model; a folder of transformers is then refused without this package."""
    give_config(model, config)
    if isinstance(model, PreTrainedModel):
        guard(model.config)


def forget_quantization(model: nn.Module) -> None:
    """Remove what marks a model as quantized for transformers and for this package."""
    if not isinstance(model, PreTrainedModel):
        del model.quantization_config
        return
    del model.config.quantization_config
    unguard(model.config)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)
    model.model_tags = [tag for tag in model.model_tags or () if tag not in HUB_TAGS] or None


def prepare_for_loading(model: nn.Module, config: ReBNNConfig) -> None:
    """Give a model the layers that a saved checkpoint describes, for it to fill; it may be on the meta device.

    Raises:
        ValueError: a module named in the config does not exist in this architecture or is of another type.
    """
    names = names_to_load(model, config)
    for name in names:
        module = model.get_submodule(name)
        if config.state == "packed":
            replace_module(model, name, PACKED_OF[float_type(module)].like(module).train(module.training))
        else:
            replace_module(model, name, _latent(module, config))
    add_activations(model, config, names)
    _tag(model)


def select_for_loading(model: PreTrainedModel, config: ReBNNConfig) -> None:
    """Choose and record the targets of a float checkpoint that is binarized while it loads (meta device).

    Raises:
        ValueError: as `binarize`.
    """
    targets = select(model, config)
    check_targets(model, targets, config, on_meta=True)
    record(model, config, targets)


def untie_binary_embeddings(model: PreTrainedModel) -> None:
    """Where the word embeddings are binary, give each weight that transformers ties a float copy of its own.

    While a float checkpoint loads, this waits until the tied weights have their values.
    """
    if not any(isinstance(module, BinaryEmbedding) for module in model.modules()):
        return
    for name in tied_weights(model):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, nn.Parameter(getattr(owner, child).detach().clone()))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _tag(model: nn.Module) -> None:
    if isinstance(model, PreTrainedModel):
        model.add_model_tags(list(HUB_TAGS))


# Checks


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, LATENT_TYPES + PACKED_TYPES) for module in model.modules())


def _require_no_layers(model: nn.Module, verb: str) -> None:
    """A module without a config of its own may be a part of one that has it, hold one, or be built of such layers."""
    if _has_layers(model):
        raise ValueError(
            f"{verb}() expects a model made by rebnn_hf.binarize(), and this {type(model).__name__} has 1-bit layers "
            "but no config: pass the module that binarize() was given, or call binarize() on a network that was built "
            "of such layers."
        )


def _require_whole_weights(model: nn.Module, verb: str) -> None:
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise ValueError(
            f"{verb}() needs whole weights, and {sharded} is sharded over processes (FSDP2); gather them with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
            "torch.distributed.checkpoint.state_dict, load that into a model of one process, and pack it."
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


def _config_for_built_in(layers: dict[str, nn.Module], config: ReBNNConfig | None) -> ReBNNConfig:
    """The config of a model that was built of latent layers; only the balance can be another one."""
    built = built_in_config(layers)
    if config is None:
        return built
    changed = [name for name, value in config.method().items() if value != getattr(built, name)]
    changed = [name for name in changed if not name.startswith("balance_")]
    if changed:
        raise ValueError(
            f"the model was built of 1-bit layers with other settings ({', '.join(changed)}); leave them out, or "
            "build the model that has them."
        )
    return copy.deepcopy(config)


def _require_latent(saved: ReBNNConfig | None) -> None:
    if saved is None or saved.state != "latent":
        state = "a float" if saved is None else "a packed"
        raise ValueError(
            f"rebinarize() expects a latent model, got {state} one; use binarize(), or load the latent checkpoint."
        )


def _check_packable(model, config: ReBNNConfig) -> None:
    if config.ties == "released":
        raise ValueError(
            "ties='released' has sign(0) = 0, a third value that does not fit into a bit; it is for comparisons in "
            "training. Use ties='up' for a model to be packed."
        )
    waiting = [name for name, m in model.named_modules() if isinstance(m, Elastic) and not m.calibrated]
    if waiting:
        raise ValueError(
            f"{len(waiting)} elastic activations have no scale yet (first: {waiting[0]}): train the model, or call "
            "rebnn_hf.calibrate(model, batch)."
        )


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
        if dtype is not None and name.endswith(".scale") and (tensor.to(dtype) == 0).any():
            raise ValueError(f"{name} is too small for {dtype}, and would be 0; use torch.bfloat16 or torch.float32.")


# Swaps


def _own_config(model: nn.Module) -> None:
    """Leave the config to the binarized model it was shared with, or copied from."""
    if not isinstance(model, PreTrainedModel):
        return
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _latent(module: nn.Module, config: ReBNNConfig) -> nn.Module:
    return LATENT_OF[float_type(module)].from_float(module, _rule_of(module, config))


def _rule_of(module: nn.Module, config: ReBNNConfig) -> WeightRule:
    """The weight rule for a module: an embedding has a scale for each token, also where matrices have one (BiT C4)."""
    rule = config.rule()
    return replace(rule, granularity="row") if isinstance(module, nn.Embedding) else rule


def _change_rule(module: nn.Module, config: ReBNNConfig, carry_scales: bool) -> None:
    """Put a latent layer under the weight rule of another config, with a balance of 0."""
    old_scale, old_rule = module.weight_scale, module.rule
    module._init_rule(_rule_of(module, config))
    same_scale = old_rule.granularity == module.rule.granularity and old_scale is not None
    if carry_scales and same_scale and module.weight_scale is not None:
        module.weight_scale = old_scale


def _cast_float(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is saved as float; buffers that are not saved (rotary frequencies) keep their type, as in a load."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    if isinstance(model, PreTrainedModel):
        model.config.dtype = dtype
