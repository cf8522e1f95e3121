"""PEFT on 1-bit linear layers and embeddings: LoRA and IA3 compute what they say, all else is refused in words.

Nothing has to be switched on: this module is imported right behind `peft` (see `after_import`). PEFT takes packed and
latent layers for the `nn.Linear` and `nn.Embedding` that they are subclasses of, so `get_peft_model`,
`target_modules="all-linear"`, saving and loading are PEFT's own, and gradients pass through the packed layers to those
below. What PEFT cannot know is that `weight` holds bits, or latent floats of which only the signs count: its merge
would silently change the model, and methods that read `weight` would read something else than the layer computes.

An adapter is therefore kept beside its base. Where only the weights are 1-bit, it can be merged into a float model:

    >>> base = AutoModelForSequenceClassification.from_pretrained("packed")
    >>> model = PeftModel.from_pretrained(base, "adapter")
    >>> rebnn_hf.unpack(model.get_base_model())  # 1-bit -> float, the adapter stays
    >>> model = model.merge_and_unload()  # a plain transformers model with weights alpha * b + B A
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from functools import wraps

from peft import PeftConfig, PeftType
from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..layers import LATENT_TYPES, PACKED_TYPES

ONE_BIT_TYPES = LATENT_TYPES + PACKED_TYPES

METHODS = (PeftType.LORA, PeftType.IA3)
"""Methods that use a layer only through what it computes."""

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that neither read nor change the weights of the base."""

BINARIZERS = {"input_binarizer", "binary_attention"}
"""What few-bit modules are called inside the layers and attentions they belong to."""


class _Unmerged:
    """What PEFT's layers do differently around a 1-bit layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT, once the layer inside is no longer 1-bit (`rebnn_hf.unpack`).

        Raises:
            ValueError: it is.
        """
        _refuse_to_merge(self)
        super().merge(safe_merge, adapter_names)


class LoraBinaryLinear(_Unmerged, lora.Linear):
    """LoRA around a packed or latent linear layer: `y = alpha * (x b^T) + bias + (x A^T) B^T * scaling`.

    The adapter reads x before a layer with few-bit inputs makes codes of it.
    """


class LoraBinaryEmbedding(_Unmerged, lora.Embedding):
    """LoRA around a packed or latent embedding."""


class IA3BinaryLinear(_Unmerged, ia3.Linear):
    """IA3 around a packed or latent linear layer: its outputs, or as a feed-forward module its inputs, times l."""


BINARY_OF = {
    lora.Linear: LoraBinaryLinear,
    lora.Embedding: LoraBinaryEmbedding,
    ia3.Linear: IA3BinaryLinear,
}
"""PEFT's class of layer -> the class that stands in for it around a 1-bit layer."""


# What a method must be


def _check_method(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Raise a ValueError, before anything is changed, where an adapter would not compute what it says."""
    one_bit = ((_outer_name(n), layer) for n, layer in model.named_modules() if isinstance(layer, ONE_BIT_TYPES))
    refused = [
        (name, reason)
        for name, layer in one_bit
        if (reason := _why_not(config, layer)) and _targets(tuner, model, config, name, layer)
    ]
    if refused:
        name, reason = refused[0]
        raise ValueError(
            f"{reason}, and {len(refused)} of the targeted modules are 1-bit (first: {name}): plain LoRA and IA3 work "
            "on linear layers and embeddings. Use one of these, or target_modules that are float."
        )


def _why_not(config: PeftConfig, layer: nn.Module) -> str | None:
    """What an adapter needs that a 1-bit layer does not have; None where there is nothing."""
    if isinstance(layer, nn.Conv2d):
        return "convolutions take no adapters"  # PEFT builds them of the class of the base: out of 1-bit convolutions
    if config.peft_type not in METHODS:
        return f"{config.peft_type.value} is not among the methods known to leave the weights of the base alone"
    if config.peft_type is not PeftType.LORA:
        return None
    if config.use_dora:
        return "use_dora=True divides by the norms of float weights"
    if getattr(config, "kasa_config", None):
        return "kasa_config changes the weights of the base"
    if config.init_lora_weights not in STARTS:
        return f"init_lora_weights={config.init_lora_weights!r} starts from the float weights of the base"
    return None


def _targets(tuner: BaseTuner, model: nn.Module, config: PeftConfig, name: str, layer: nn.Module) -> bool:
    """Whether PEFT would put an adapter around the layer of that name."""
    config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = {name} if isinstance(layer, nn.Linear) else None
    return bool(getattr(config, "target_modules", None) and tuner._check_target_module_exists(config, name))


def _outer_name(name: str) -> str:
    """Name of a module without the adapters around it."""
    return re.sub(r"(\.base_layer)+$", "", name)


def _refuse_to_merge(adapted: nn.Module) -> None:
    """Raise a ValueError if a module is, or contains, a layer of PEFT around a 1-bit one."""
    bases = (layer.get_base_layer() for layer in _adapted(adapted))
    found = Counter(type(base).__name__ for base in bases)
    if found:
        layers = ", ".join(f"{count} {name}" for name, count in found.items())
        raise ValueError(
            f"the adapter cannot be merged into {layers}: with an adapter in them the weights would not be 1-bit. Keep "
            "it beside its base (save_pretrained() saves it alone); or, where only the weights are 1-bit, make the "
            "base float with rebnn_hf.unpack(peft_model.get_base_model()), and merge then."
        )


def _adapted(module: nn.Module) -> list[BaseTunerLayer]:
    """PEFT's layers around 1-bit layers."""
    layers = (part for part in module.modules() if isinstance(part, BaseTunerLayer))
    return [layer for layer in layers if isinstance(layer.get_base_layer(), ONE_BIT_TYPES)]


# Where PEFT asks


def _without_binarizers(exists: Callable) -> Callable:
    """`BaseTuner._check_target_module_exists`: `query` means the projection, not the binarizer of what it gives."""

    @wraps(exists)
    def _check_target_module_exists(peft_config, key):
        return False if BINARIZERS & set(key.split(".")) else exists(peft_config, key)

    return _check_target_module_exists


def _with_check(inject: Callable) -> Callable:
    """`BaseTuner.inject_adapter` that looks before it, and puts the classes of this file in the place of PEFT's."""

    @wraps(inject)
    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        _check_method(self, model, self.peft_config[adapter_name])
        inject(self, model, adapter_name, *args, **kwargs)
        for layer in _adapted(model):
            layer.__class__ = BINARY_OF.get(type(layer), type(layer))

    return inject_adapter


def _with_refusal(check: Callable) -> Callable:
    """`BaseTuner._check_merge_allowed`: PEFT asks it before it merges the first layer, some of which may be float."""

    @wraps(check)
    def _check_merge_allowed(self):
        _refuse_to_merge(self.model)
        check(self)

    return _check_merge_allowed


BaseTuner._check_target_module_exists = staticmethod(_without_binarizers(BaseTuner._check_target_module_exists))
BaseTuner.inject_adapter = _with_check(BaseTuner.inject_adapter)
BaseTuner._check_merge_allowed = _with_refusal(BaseTuner._check_merge_allowed)
