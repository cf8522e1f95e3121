"""The transformers quantizer: what makes `AutoModel.from_pretrained` build and check 1-bit layers."""

from __future__ import annotations

import copy
import re

import torch
from transformers.quantizers import HfQuantizer, register_quantizer

from ..binarizers import PARAMETRIC, Elastic
from ..fusion import fuse
from ..hub import forget_folder
from ..layers import LATENT_TYPES, PACKED_TYPES
from ..packing import has_clean_padding
from ..patching import forget_quantization, prepare_for_loading, select_for_loading, unpack, untie_binary_embeddings


@register_quantizer("rebnn")
class ReBNNQuantizer(HfQuantizer):
    """Loads packed and latent checkpoints, and binarizes float ones on `from_pretrained(quantization_config=...)`."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """Latent weights train; packed ones serve as a frozen base."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Tells the Trainer that no adapter is needed."""
        return True

    def is_serializable(self) -> bool:
        """Both states are saved as plain tensors."""
        return True

    def get_new_dtype(self, converter, param, dtype):
        """Cast floats to the float type asked for; bits keep the type they are stored in, for the check to see."""
        return super().get_new_dtype(converter, param, dtype) if dtype is None or dtype.is_floating_point else None

    def update_attn_implementation(self, config):
        """The one place where a quantizer sees the config before transformers looks for files: see `hub`."""
        forget_folder(config)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config = copy.deepcopy(self.quantization_config)  # a user may load two models by it
        if not self.pre_quantized:
            if config.state == "packed":
                raise ValueError(
                    "a float checkpoint cannot be packed while it loads: its signs alone are useless without training; "
                    "use ReBNNConfig(state='latent'), train, then rebnn_hf.pack(model)."
                )
            select_for_loading(model, config)
        prepare_for_loading(model, config)
        if not self.pre_quantized:
            model._keys_to_ignore_on_load_missing = {
                *(model._keys_to_ignore_on_load_missing or ()),
                r"\.weight_scale$",
                r"\.balance$",
                *(rf"^{re.escape(name)}\." for name, m in model.named_modules() if isinstance(m, PARAMETRIC)),
            }
        for module in model.modules():
            if isinstance(module, PACKED_TYPES):
                module._is_hf_initialized = True  # transformers must not draw bits that the file lacks
        model.config.quantization_config = config

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, PACKED_TYPES):
                _check_loaded(name, module, ("weight", "weight_scale", "bias"))
                _check_bits(name, module)
            elif isinstance(module, LATENT_TYPES) and self.pre_quantized:
                _check_loaded(name, module, ("weight", "weight_scale", "bias", "balance"))
            elif isinstance(module, LATENT_TYPES):
                module.reset_scale()
            elif isinstance(module, PARAMETRIC) and self.pre_quantized:
                _check_loaded(name, module, tuple(dict(module.named_parameters(recurse=False))))
            elif isinstance(module, PARAMETRIC):
                module.reset_parameters()
            if isinstance(module, Elastic):
                module.check_calibration()
        if not self.pre_quantized:
            untie_binary_embeddings(model)
        elif self.quantization_config.state == "packed":
            fuse(model)
        return model

    def _dequantize(self, model, dtype=None):
        unpack(model)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model):
        """Called by `model.dequantize()` after `unpack` has already removed it."""
        if hasattr(model.config, "quantization_config"):
            forget_quantization(model)


def _check_loaded(name: str, module: torch.nn.Module, tensors: tuple[str, ...]) -> None:
    """transformers only reports a missing tensor and leaves uninitialised memory; here that is an error."""
    owned = [t for t in tensors if getattr(module, t, None) is not None]
    missing = [t for t in owned if not getattr(getattr(module, t), "_is_hf_initialized", False)]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {', '.join(f'{name}.{t}' for t in missing)}: it was cut, or its config.json belongs "
            "to another checkpoint."
        )


def _check_bits(name: str, module: torch.nn.Module) -> None:
    if module.weight.dtype != torch.uint8:
        raise ValueError(f"{name}.weight is {module.weight.dtype} in the checkpoint; packed bits are uint8.")
    if not has_clean_padding(module.weight, module.width):
        raise ValueError(f"{name}.weight has spare bits set; the checkpoint was damaged or written by something else.")
    scale = module.weight_scale
    if not scale.is_floating_point() or not scale.isfinite().all() or (scale < 0).any():
        raise ValueError(f"{name}.weight_scale must be finite and >= 0; the checkpoint was damaged.")
