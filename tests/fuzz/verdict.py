"""What may come of loading a damaged checkpoint: a refusal in words, or a model that holds what is in the file."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from rebnn_hf.layers import PACKED_TYPES

from .checkpoint import Checkpoint
from .damage import parts_of

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""What a tensor can have in a file that loads."""

REFUSALS = {
    "rebnn_hf": (ValueError, TypeError),
    "transformers/configuration_utils.py": (ValueError, OSError),
    "transformers/quantizers/auto.py": (ValueError, TypeError),
    "transformers/fusion_mapping.py": (ValueError,),
    "transformers/modeling_utils.py": (OSError, SafetensorError),
    "transformers/utils/loading_report.py": (RuntimeError,),
    "json/decoder.py": (ValueError,),
}
"""Places that are meant to refuse a file, by a part of their path, and with what: transformers has a RuntimeError for
shapes that do not fit, and where `quantization_config` is beyond recognition, it stops at our `fusion_config`."""


class BadEnd(AssertionError):  # noqa: N818
    """A file that ended as none may."""


def end_of(checkpoint: Checkpoint) -> str:
    """Load what is in the checkpoint's folder.

    Returns:
        How it ended, in a few words.

    Raises:
        BadEnd: an error from within, or a model that is not what the file says.
    """
    try:
        model = checkpoint.load()
    except Exception as error:  # noqa: BLE001 - any error is looked at
        return refusal(error)
    unread = _check_contents(model, *parts_of((checkpoint.folder / "model.safetensors").read_bytes()))
    try:
        checkpoint.outputs(model)
    except Exception as error:
        raise BadEnd(f"loaded, and then {type(error).__name__}: {error}") from error
    return "loaded, but for reported ones" if unread else "loaded"


def refusal(error: Exception) -> str:
    """Where and how a file was refused.

    Raises:
        BadEnd: that was no place meant for it.
    """
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).as_posix()
    for part, kinds in REFUSALS.items():
        if f"/{part}" in place and type(error) in kinds and str(error):
            return f"{type(error).__name__} by {part}"
    raise BadEnd(f"{type(error).__name__} in {place}: {error}") from error


def _check_contents(model, header: dict, data: bytes) -> bool:
    """Hold each tensor of a model against the file; whether one was not in it (transformers reports these).

    transformers takes off a prefix `bert.` that the model does not have.
    """
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PACKED_TYPES))
    blocks = ("blocks.", "bert.encoder.layer.")
    unread = False
    for name, tensor in model.state_dict().items():
        entry = next((header[spelt] for spelt in (name, f"bert.{name}") if spelt in header), None)
        if entry is None:
            unread = True
            if name.startswith((*packed, *blocks)):
                raise BadEnd(f"{name} is not in the file, and the model has one")
        elif not _same(tensor, stored(entry, data)):
            raise BadEnd(f"{name} is {tensor}, and in the file {stored(entry, data)}")
    return unread


def stored(entry: dict, data: bytes) -> Tensor:
    """A tensor of a file, read without safetensors."""
    begin, end = entry["data_offsets"]
    if begin == end:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    return torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _same(loaded: Tensor, in_file: Tensor) -> bool:
    return loaded.shape == in_file.shape and torch.equal(
        loaded.nan_to_num(nan=7e7), in_file.to(loaded.dtype).nan_to_num(nan=7e7)
    )
