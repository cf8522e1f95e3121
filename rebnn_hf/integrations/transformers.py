"""The transformers quantizer: what makes `AutoModel.from_pretrained` build and check 1-bit layers."""

from __future__ import annotations

import copy
import os
import re

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from ..architecture import block_prefixes
from ..binarizers import PARAMETRIC, Elastic
from ..fusion import fuse
from ..hub import forget_folder
from ..layers import LATENT_TYPES, PACKED_TYPES
from ..patching import (
    forget_quantization,
    prepare_for_loading,
    remember_quantization,
    select_for_loading,
    unpack,
    untie_binary_embeddings,
)
from ..soundness import check_bits, check_calibrated, check_finite
from ..targets import check_saved


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
        """Tells the Trainer that no adapter is needed.

        For packed models too: otherwise transformers would refuse a Trainer that only scores them. `ReBNNTrainer`
        refuses those that cannot train.
        """
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

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config = copy.deepcopy(self.quantization_config)  # a user may load two models by it
        if not self.pre_quantized:
            if config.state == "packed":
                raise ValueError(
                    "a float checkpoint cannot be packed while it loads: its signs alone are useless without training; "
                    "use ReBNNConfig(state='latent'), train, then rebnn_hf.pack(model)."
                )
            select_for_loading(model, config)
        else:
            _check_files(model, checkpoint_files or [])
            check_saved(model, config)
        prepare_for_loading(model, config)
        self._floats = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
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
        remember_quantization(model, config)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _check_types(model, self._floats)
            _check_blocks(model)
        for name, module in model.named_modules():
            if isinstance(module, LATENT_TYPES + PACKED_TYPES + PARAMETRIC) and self.pre_quantized:
                _check_loaded(name, module)
            elif isinstance(module, LATENT_TYPES):
                module.reset_scale()
            elif isinstance(module, PARAMETRIC):
                module.reset_parameters()
            if isinstance(module, PACKED_TYPES):
                check_bits(name, module)
            if self.pre_quantized:
                check_finite(name, module)
            if isinstance(module, Elastic):
                module.check_calibration()
                check_calibrated(name, module, self.quantization_config)
        if not self.pre_quantized:
            untie_binary_embeddings(model)
        elif self.quantization_config.state == "packed":
            fuse(model)
        return model

    def _dequantize(self, model, dtype=None):
        """`dtype` comes from the config, where saving a model leaves its name."""
        unpack(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model):
        """Called by `model.dequantize()` after `unpack` has already removed it."""
        if hasattr(model.config, "quantization_config"):
            forget_quantization(model)


def _check_files(model: PreTrainedModel, files: list[str]) -> None:
    """An index of shards may name any file; what is read lies in the model's folder, and cannot run code."""
    folder = os.path.abspath(model.name_or_path)  # type: ignore[type-var]  # from_pretrained has set it
    for file in map(os.path.abspath, files):
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; rebnn checkpoints are, and others are not read.")
        if os.path.isdir(folder) and os.path.commonpath((folder, file)) != folder:
            raise ValueError(f"the checkpoint in {folder} names {file}, which lies outside; it was tampered with.")


def _check_blocks(model: PreTrainedModel) -> None:
    """transformers only reports a tensor that is missing, and draws another one; in the encoder that is an error."""
    prefixes = block_prefixes(model)
    tensors = model.state_dict(keep_vars=True).items()
    missing = [name for name, t in tensors if name.startswith(prefixes) and not _is_from_file(t)]
    if missing:
        raise ValueError(_lacks(missing))


def _check_types(model: PreTrainedModel, floats: list[str]) -> None:
    """transformers keeps integers as they are in the file, wherever they go."""
    tensors = model.state_dict(keep_vars=True)
    for name in floats:
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} is {tensors[name].dtype} in the checkpoint; expected floating point numbers.")


def _check_loaded(name: str, module: torch.nn.Module) -> None:
    """Every tensor of a layer of this package comes from the file."""
    missing = [f"{name}.{key}" for key, tensor in _own_tensors(module).items() if not _is_from_file(tensor)]
    if missing:
        raise ValueError(_lacks(missing))


def _own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in module.state_dict(keep_vars=True).items() if "." not in key}


def _is_from_file(tensor: torch.Tensor) -> bool:
    """Whether transformers read it; what it leaves on the meta device is read from the file when it is needed."""
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)


def _lacks(missing: list[str]) -> str:
    return (
        f"the checkpoint lacks {', '.join(missing[:6])}: it was cut, or its config.json belongs to another checkpoint."
    )
