"""What is in a model, in bits and bytes: `summary` by module, `packed_size` by part.

Counted are the tensors that exist, by rule of the bit format: a packed matrix [O, M] takes `O * ceil(M / 8)` bytes and
one float scale per row; everything else keeps its float type. The header of a safetensors file is not included. What
they multiply is counted in `flops`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import block_prefixes, head_modules, is_base, kept_convolutions
from .binarizers import PARAMETRIC, RPReLU
from .config import config_of
from .flops import code_bits, linear_bits
from .layers import LATENT_TYPES, PACKED_TYPES
from .notebook import html_table
from .packing import packed_width

PARTS = (
    "word_embeddings",
    "encoder",
    "pooler",
    "scales",
    "activations",
    "other_embeddings",
    "biases",
    "norms",
    "head",
    "other",
)
"""Parts of `packed_size`, in the order of its result."""

HEADER = ("module", "type", "parameters", "added", "W/A bits", "bytes now", "bytes packed", "")
"""Columns of a printed summary."""

WORDS = (0, 1, 7)
"""Those of them that hold words."""


CONVOLUTIONS = {
    "head": "convolution of the head",
    "stem": "stem",
    "shortcut": "shortcut or downsampling",
    "groups": "convolution with groups",
}
"""What a summary calls convolutions that stay float."""


@dataclass(frozen=True)
class Row:
    """One module that owns tensors.

    Attributes:
        name: of the module.
        type: its class.
        parameters: values of the float model that it holds (weight and bias); tied ones are counted where they come
            first.
        added: values that the packed model has beside them: scales, shifts, slopes.
        binary: how many of the parameters are 1-bit.
        bits: per weight, in the inference form.
        activation_bits: of the inputs of a linear layer; None for other modules.
        bytes_now: parameters and buffers in memory.
        bytes_packed: after `pack`, in the file: bits, scales, bias.
        note: for 1-bit modules their state, for scales and shifts what they belong to, for float ones why they are
            float.
    """

    name: str
    type: str
    parameters: int
    added: int
    binary: int
    bits: int
    activation_bits: int | None
    bytes_now: int
    bytes_packed: int
    note: str


@dataclass(frozen=True)
class Summary:
    """Result of `summary`; `print`, and a notebook, show it as a table in which equal blocks share a line.

    Attributes:
        rows: one per module.
        totals: `parameters`, `added_parameters`, `binary_parameters`, `binary_share` (of `parameters`), `bytes_now`,
            `bytes_packed`, `bytes_float32` (of `parameters`, at 4 bytes each) and `ratio` = bytes_float32 /
            bytes_packed.
    """

    rows: list[Row]
    totals: dict[str, float]

    def to_dict(self) -> dict:
        """Rows and totals as plain data for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "totals": dict(self.totals)}

    def __str__(self) -> str:
        lines = [HEADER, *(_cells(rows) for rows in _grouped(self.rows))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
        text = [
            "  ".join(
                cell.ljust(width) if column in WORDS else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *self._in_words()])

    def _repr_html_(self) -> str:
        return html_table(HEADER, [_cells(rows) for rows in _grouped(self.rows)], WORDS, self._in_words())

    def _in_words(self) -> list[str]:
        """The totals."""
        totals = self.totals
        return [
            f"{totals['parameters']:,} parameters, {totals['binary_share']:.2%} of them 1-bit; "
            f"{totals['added_parameters']:,} added (scales, shifts, slopes)",
            f"{totals['bytes_now']:,} bytes now, {totals['bytes_packed']:,} packed: "
            f"{totals['ratio']:.1f} x smaller than float32 ({totals['bytes_float32']:,})",
        ]


def summary(model: nn.Module) -> Summary:
    """What each module holds, how many bits and bytes it takes, and why float ones are float.

    Args:
        model: float, latent or packed; it may be on the meta device.

    Returns:
        Rows and totals. `print(summary(model))` shows a table, `.to_dict()` is JSON.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary() expects a model (torch.nn.Module), got {type(model).__name__}.")
    place = _Place(model)
    rows = [
        Row(
            name=name,
            type=type(module).__name__,
            parameters=sum(e.values for e in entries),
            added=sum(e.added for e in entries),
            binary=sum(e.values for e in entries if e.binary),
            bits=1 if isinstance(module, LATENT_TYPES + PACKED_TYPES) else max(8 * e.itemsize for e in entries),
            activation_bits=linear_bits(module)[1] if isinstance(module, nn.Linear | nn.Conv2d) else None,
            bytes_now=sum(e.now for e in entries),
            bytes_packed=sum(e.packed for e in entries),
            note=_note(name, module, entries, place),
        )
        for name, module, entries in _modules(model)
    ]
    parameters, binary = sum(row.parameters for row in rows), sum(row.binary for row in rows)
    packed = sum(row.bytes_packed for row in rows)
    totals = {
        "parameters": parameters,
        "added_parameters": sum(row.added for row in rows),
        "binary_parameters": binary,
        "binary_share": binary / max(parameters, 1),
        "bytes_now": sum(row.bytes_now for row in rows),
        "bytes_packed": packed,
        "bytes_float32": 4 * parameters,
        "ratio": 4 * parameters / max(packed, 1),
    }
    return Summary(rows, totals)


def packed_size(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of the packed checkpoint by part, as if after `pack(model, dtype)`: exactly its tensors, no file header.

    Args:
        model: latent or packed (a float model is counted as float); it may be on the meta device.
        dtype: of all that stays float.

    Returns:
        Bytes of `word_embeddings`, `encoder` (matrices of the blocks) and `pooler` (its matrix), each as bits or float;
        `scales`, one per row of every 1-bit matrix; `activations`, scales and shifts of few-bit inputs and attention
        and the parameters of RPReLU; `other_embeddings` (positions, token types); `biases` of the base model; `norms`;
        `head`, what else is outside the base model; `other`; and their sum `total`.

    Raises:
        TypeError: `dtype` is not floating point.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} is not floating point; use torch.float32, torch.float16 or torch.bfloat16.")
    place = _Place(model)
    sizes = dict.fromkeys(PARTS, 0)
    for name, module, entries in _modules(model, dtype):
        for entry in entries:
            sizes[place.part(name, module, entry.name)] += entry.packed
    return {**sizes, "total": sum(sizes.values())}


@dataclass(frozen=True)
class _Entry:
    """A tensor of a module: values of the float model or added ones in it, bytes in memory and in the packed file."""

    name: str
    values: int
    added: int
    binary: bool
    itemsize: int
    now: int
    packed: int
    tied_to: str | None = None


def _modules(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, nn.Module, list[_Entry]]]:
    """Modules that own tensors; a tensor owned twice counts at its first owner."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        entries = []
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            owner = owners.setdefault(id(tensor), name)
            entries.append(
                _entry(module, key, tensor, dtype)
                if owner == name
                else _Entry(key, 0, 0, False, tensor.itemsize, 0, 0, owner)
            )
        if isinstance(module, LATENT_TYPES) and module.weight_scale is None:  # closed form: it exists once packed
            scales, size = module.weight.shape[0], (dtype or module.weight.dtype).itemsize
            entries.append(_Entry("weight_scale", 0, scales, False, module.weight.itemsize, 0, scales * size))
        if entries:
            yield name, module, entries


def _entry(module: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype | None) -> _Entry:
    float_size = (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
    values, added, saved = tensor.numel(), 0, tensor.numel() * float_size
    one_bit = isinstance(module, LATENT_TYPES + PACKED_TYPES)
    if one_bit and key == "weight":
        rows, width = tensor.shape[0], module.width if isinstance(module, PACKED_TYPES) else tensor[0].numel()
        values, saved = rows * width, rows * packed_width(width)
    elif one_bit and key in ("weight_scale", "balance"):
        values, added = 0, module.weight.shape[0] if key == "weight_scale" else 0
        saved = added * float_size
    elif isinstance(module, PARAMETRIC):
        values, added = 0, values
    elif not isinstance(tensor, nn.Parameter):
        values, saved = 0, 0 if key in module._non_persistent_buffers_set else saved
    return _Entry(key, values, added, one_bit and key == "weight", tensor.itemsize, tensor.nbytes, saved)


class _Place:
    """Where in a model a module is, by the same rules that `binarize` chooses by."""

    def __init__(self, model: nn.Module):
        self.config = config_of(model)
        known = isinstance(model, PreTrainedModel) or self.config is not None
        self.base = "" if is_base(model) else f"{model.base_model_prefix}."
        self.blocks = block_prefixes(model) if known else ()
        self.head = head_modules(model) if known else set()
        self.kept = kept_convolutions(model) if known else {}
        try:
            self.words = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # not a transformers model, or one without tokens
            self.words = None

    def of(self, name: str, module: nn.Module) -> str:
        """One of `activations`, `word embeddings`, `embedding`, `norm`, `head`, `pooler`, `block`, `outside`."""
        if isinstance(module, PARAMETRIC):
            return "activations"
        if module is self.words:
            return "word embeddings"
        if "norm" in type(module).__name__.lower():
            return "norm"
        if not name.startswith(self.base) or name in self.head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if "pooler" in name.split("."):
            return "pooler"
        return "block" if name.startswith(self.blocks) else "outside"

    def part(self, name: str, module: nn.Module, key: str) -> str:
        """The part of `packed_size` that a tensor belongs to."""
        place = self.of(name, module)
        if key == "weight_scale" and isinstance(module, LATENT_TYPES + PACKED_TYPES):
            return "scales"
        if key == "bias" and place in ("pooler", "block", "outside"):
            return "biases"
        return {
            "activations": "activations",
            "word embeddings": "word_embeddings",
            "embedding": "other_embeddings",
            "norm": "norms",
            "head": "head",
            "pooler": "pooler",
            "block": "encoder",
        }.get(place, "other")


def _note(name: str, module: nn.Module, entries: list[_Entry], place: _Place) -> str:
    tied = [entry for entry in entries if entry.tied_to is not None]
    if tied:
        return ", ".join(f"{entry.name} tied to {entry.tied_to}" for entry in tied)
    if not any(True for _ in module.parameters(recurse=False)) and not isinstance(module, PACKED_TYPES):
        return "buffers"
    if isinstance(module, RPReLU):
        return "shifts and slopes of RPReLU"
    if isinstance(module, PARAMETRIC):
        what = "attention" if "binary_attention" in name.split(".") else "inputs"
        return f"{' and '.join(entry.name for entry in entries)} of {code_bits(module)}-bit {what}"
    bias = "; bias float" if any(entry.name == "bias" for entry in entries) else ""
    if isinstance(module, PACKED_TYPES):
        return f"packed{bias}"
    if isinstance(module, LATENT_TYPES):
        return f"latent: {8 * module.weight.itemsize} while training, 1 packed{bias}"
    return "float model" if place.config is None else f"float: {_reason(name, module, place)}"


def _reason(name: str, module: nn.Module, place: _Place) -> str:
    """Why `binarize` left a module float: the switches of the config, or its list, decide."""
    if any(part.startswith(("lora_", "ia3_")) for part in name.split(".")):
        return "adapter"
    config, where = place.config, place.of(name, module)
    switches = {
        "word embeddings": ("word_embeddings", config.word_embeddings),
        "pooler": ("pooler", config.pooler),
        "head": ("head", config.head),
    }
    if where in ("embedding", "norm"):
        return where
    if isinstance(module, nn.Conv2d):
        return CONVOLUTIONS.get(place.kept.get(name), "listed in modules_to_not_convert")
    if not isinstance(module, nn.Linear | nn.Embedding):
        return "neither a linear layer nor a convolution"
    if where in switches:
        switch, on = switches[where]
        return "listed in modules_to_not_convert" if on else f"{where} ({switch}=False)"
    return "listed in modules_to_not_convert" if where == "block" else "outside the encoder blocks"


def _grouped(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ only in the number of their block."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name, count=1)
        alike = (name, row.type, row.bits, row.activation_bits, row.parameters, row.added, row.note)
        groups.setdefault(alike, []).append(row)
    return list(groups.values())


def _cells(rows: list[Row]) -> tuple[str, ...]:
    """A group of rows as one line of the table."""
    first = rows[0]
    name = first.name
    if len(rows) > 1:
        numbers = _ranges([int(re.search(r"\.(\d+)(?=\.|$)", row.name).group(1)) for row in rows])
        name = re.sub(r"\.\d+(?=\.|$)", f".{numbers}", name, count=1)
    bits = f"{first.bits}" if first.activation_bits is None else f"{first.bits}/{first.activation_bits}"
    parameters, added, now, packed = (
        f"{sum(getattr(row, column) for row in rows):,}"
        for column in ("parameters", "added", "bytes_now", "bytes_packed")
    )
    return (name or "(model)", first.type, parameters, added, bits, now, packed, first.note)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
