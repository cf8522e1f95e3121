"""Whether the layers of a loaded checkpoint hold what they can hold. Errors say what was damaged."""

from __future__ import annotations

import torch
from torch import nn

from .binarizers import PARAMETRIC, Elastic
from .config import ReBNNConfig
from .layers import LATENT_TYPES, PACKED_TYPES
from .packing import has_clean_padding


def check_bits(name: str, module: nn.Module) -> None:
    """Refuse a packed layer whose bits or scales are none.

    Raises:
        ValueError: another type than uint8, spare bits that are set, or a negative scale.
    """
    if module.weight.dtype != torch.uint8:
        raise ValueError(f"{name}.weight is {module.weight.dtype} in the checkpoint; packed bits are uint8.")
    if not has_clean_padding(module.weight, module.width):
        raise ValueError(f"{name}.weight has spare bits set; the checkpoint was damaged or written by something else.")
    if (module.weight_scale < 0).any():
        raise ValueError(f"{name}.weight_scale must be >= 0; the checkpoint was damaged.")


def check_finite(name: str, module: nn.Module) -> None:
    """Refuse NaN and infinity in the tensors of a layer of this package.

    Raises:
        ValueError: where one is.
    """
    if not isinstance(module, LATENT_TYPES + PACKED_TYPES + PARAMETRIC):
        return
    for key, tensor in module.state_dict(keep_vars=True).items():
        if "." not in key and tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}.{key} holds NaN or infinity; the checkpoint was damaged.")


def check_calibrated(name: str, module: Elastic, config: ReBNNConfig) -> None:
    """Refuse a packed model without the scale of an activation.

    Raises:
        ValueError: the scale is 0.
    """
    if config.state == "packed" and not module.calibrated and not module.scale.is_meta:
        raise ValueError(f"{name}.scale is 0, and a packed model has scales; the checkpoint was damaged.")
