"""What can be wrong with the files of a packed checkpoint: `damage` does one of it, or one to each file.

Every choice is drawn from a `random.Random`, so that a seed, hypothesis or a coverage-guided fuzzer can make it. The
config is damaged inside `quantization_config`: the rest belongs to transformers, which has a reader of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

HUGE = 2**62
NAMES = (
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\windows",
    "__class__",
    "__class__.__init__",
    "encoder.layer.0",
    "encoder.layer.9.output.dense",
    "embeddings.position_embeddings",
    "embeddings.LayerNorm",
    "blocks.0",
    "blocks.1",
    "norm",
    "pooler.dense",
    "bert.pooler.dense",
    "classifier",
    "\ud800",
    "\x00",
    "encoder.layer.0.attention.self.query.weight",
)
DTYPES = (
    *("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"),
    *("C64", "F4", "F6_E2M3", "F8_E8M0", "F128", "u8", "", "pickle"),
)
FIELDS = (
    *("state", "activation", "activation_bits", "attention", "ffn_activation", "ties", "weight_scale", "ste_slope"),
    *("scale_granularity", "scale_gradient", "weight_center", "balance_rule", "balance_form", "format_version"),
)
WORDS = (
    *("latent", "packed", "none", "sign", "rsign", "elastic", "token", "softmax", "bool", "model", "relu", "rprelu"),
    *("up", "released", "learned", "mean_abs", "row", "tensor", "scale", "unit", "exact", "xnor", "const", "gradient"),
)

Files = tuple[bytes, bytes]
"""Contents of config.json and of model.safetensors."""


def damage(random: Random, config: bytes, tensors: bytes) -> tuple[str, Files]:
    """One damaged checkpoint.

    Args:
        random: makes all choices.
        config: contents of a good config.json.
        tensors: contents of a good model.safetensors.

    Returns:
        What was done, and the files.
    """
    kinds = [random.choice((*CONFIG, *TENSORS))]
    if random.random() < 0.2:
        kinds = [random.choice(list(CONFIG)), random.choice(list(TENSORS))]
    for kind in kinds:
        if kind in CONFIG:
            config = CONFIG[kind](random, config)
        else:
            tensors = TENSORS[kind](random, tensors)
    return " and ".join(kinds), (config, tensors)


# config.json


def _in_config(change: Callable[[Random, dict], None]) -> Callable[[Random, bytes], bytes]:
    def changed(random: Random, config: bytes) -> bytes:
        read = json.loads(config)
        change(random, read["quantization_config"])
        return json.dumps(read).encode()

    return changed


def _set_field(random: Random, fields: dict) -> None:
    fields[random.choice(sorted(fields))] = _value(random)


def _set_word(random: Random, fields: dict) -> None:
    fields[random.choice(FIELDS)] = random.choice((*WORDS, 0, 1, 2, 3, 4, 8, 32))


def _remove_field(random: Random, fields: dict) -> None:
    del fields[random.choice(sorted(fields))]


def _add_field(random: Random, fields: dict) -> None:
    fields[random.choice((*NAMES, "x" * random.choice((1, 1000, 100_000))))] = _value(random)


def _change_names(random: Random, fields: dict) -> None:
    field = random.choice(("converted", "converted_head", "converted_attention", "converted_ffn", "not_converted"))
    names = list(fields.get(field, []))
    kind = random.choice(("add", "remove", "double", "replace"))
    if kind == "add" or not names:
        names.insert(random.randint(0, len(names)), random.choice(NAMES))
        if random.random() < 0.1:
            names *= random.choice((2, 1000))
    elif kind == "remove":
        names.pop(random.randrange(len(names)))
    elif kind == "double":
        names.append(random.choice(names))
    else:
        names[random.randrange(len(names))] = random.choice(NAMES)
    fields[field] = names


def _move_names(random: Random, fields: dict) -> None:
    """Names of one list into another."""
    lists = [name for name in sorted(fields) if name.startswith("converted") and isinstance(fields[name], list)]
    source, target = random.choice(lists), random.choice(lists)
    fields[target] = list(fields[source])


def _value(random: Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, and the NaN and infinity that Python's reader takes too."""
    kind = random.randrange(10 if depth < 3 else 7)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice((0, 1, -1, 2, 8, 32, 255, HUGE, -HUGE, 10**400))
    if kind == 2:
        return random.choice((0.0, 1.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), 1.5))
    if kind == 3:
        return random.choice(NAMES)
    if kind == 4:
        return random.choice(WORDS)
    if kind == 5:
        return "x" * random.choice((1, 1000, 100_000))
    if kind == 6:
        deep: Any = random.choice(NAMES)
        for _ in range(random.choice((1, 10, 100))):
            deep = [deep]
        return deep
    if kind == 7:
        return {random.choice(NAMES): _value(random, depth + 1) for _ in range(random.randrange(3))}
    return [_value(random, depth + 1) for _ in range(random.randrange(4))]


def _flip_in_config(random: Random, config: bytes) -> bytes:
    """Characters inside quantization_config; its braces stay where they are."""
    start = config.index(b'"quantization_config"') + len(b'"quantization_config"')
    start = config.index(b"{", start) + 1
    end = config.index(b"}", start)
    return config[:start] + _flipped(random, config[start:end].replace(b"}", b" ")) + config[end:]


def _cut_config(random: Random, config: bytes) -> bytes:
    return config[: random.randrange(len(config))]


# model.safetensors as bytes


def _truncate(random: Random, tensors: bytes) -> bytes:
    return tensors[: random.randrange(len(tensors))]


def _append(random: Random, tensors: bytes) -> bytes:
    return tensors + bytes(random.choice((1, 7, 8, 4096)))


def _flip(random: Random, tensors: bytes) -> bytes:
    return _flipped(random, tensors)


def _flip_in_header(random: Random, tensors: bytes) -> bytes:
    end = 8 + _header_size(tensors)
    return _flipped(random, tensors[:end]) + tensors[end:]


def _set_header_size(random: Random, tensors: bytes) -> bytes:
    size = random.choice((0, 1, 2, _header_size(tensors) - 1, _header_size(tensors) + 1, len(tensors), 10**8, HUGE))
    return struct.pack("<Q", size) + tensors[8:]


def _flipped(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 10))):
        changed[random.randrange(len(changed))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(changed)


# model.safetensors by its header


def _header_size(tensors: bytes) -> int:
    return struct.unpack("<Q", tensors[:8])[0]


def parts_of(tensors: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, read without safetensors."""
    end = 8 + _header_size(tensors)
    return json.loads(tensors[8:end]), tensors[end:]


def joined(header: dict | str, data: bytes) -> bytes:
    """The file with this header, a dict or its text, and these data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def _in_header(change: Callable[[Random, dict, str], None]) -> Callable[[Random, bytes], bytes]:
    def changed(random: Random, tensors: bytes) -> bytes:
        header, data = parts_of(tensors)
        names = [name for name in sorted(header) if name != "__metadata__"]
        change(random, header, random.choice(names))
        return joined(header, data)

    return changed


def _set_dtype(random: Random, header: dict, name: str) -> None:
    header[name]["dtype"] = random.choice(DTYPES)


def _set_dtype_and_shape(random: Random, header: dict, name: str) -> None:
    """Another type that has the same number of bytes, so that only the package can notice."""
    begin, end = header[name]["data_offsets"]
    shape = header[name]["shape"]
    size = (end - begin) // (_product(shape) or 1)
    same = {1: ("U8", "I8", "BOOL", "F8_E4M3"), 2: ("F16", "BF16", "I16"), 4: ("F32", "I32", "U32"), 8: ("F64", "I64")}
    header[name]["dtype"] = random.choice(same.get(size, DTYPES))


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _set_shape(random: Random, header: dict, name: str) -> None:
    shape = list(header[name]["shape"])
    kind = random.choice(("flip", "flat", "one more", "huge", "value", "empty"))
    if kind == "flip":
        shape = shape[::-1]
    elif kind == "flat":
        shape = [_product(shape)]
    elif kind == "one more":
        shape = [*shape, 1]
    elif kind == "huge":
        shape = random.choice(([HUGE], [HUGE, HUGE], [2**32, 2**32], [10**9, 10**9], [2**64]))
    elif kind == "empty":
        shape = random.choice(([], [0], [0, HUGE]))
    else:
        shape = [_value(random)]
    header[name]["shape"] = shape


def _set_offsets(random: Random, header: dict, name: str) -> None:
    begin, end = header[name]["data_offsets"]
    step = random.choice((1, 4, 8, -4, -8, HUGE, -HUGE))
    header[name]["data_offsets"] = random.choice(
        (
            [begin + step, end + step],
            [begin, end + step],
            [begin + step, end],
            [end, begin],
            [begin],
            [0, 0],
            _value(random),
        )
    )


def _swap_data(random: Random, header: dict, name: str) -> None:
    other = random.choice([name for name in sorted(header) if name != "__metadata__"])
    header[name], header[other] = header[other], header[name]


def _share_data(random: Random, header: dict, name: str) -> None:
    header[name] = header[random.choice([name for name in sorted(header) if name != "__metadata__"])]


def _rename(random: Random, header: dict, name: str) -> None:
    new = random.choice((*NAMES, f"{name}.1", name.upper(), name[:-1], f"../{name}", f"bert.{name}"))
    header[new] = header.pop(name)


def _remove_tensor(random: Random, header: dict, name: str) -> None:
    del header[name]


def _set_entry(random: Random, header: dict, name: str) -> None:
    header[name] = _value(random)


def _set_metadata(random: Random, header: dict, name: str) -> None:
    header["__metadata__"] = _value(random)


def _double_name(random: Random, tensors: bytes) -> bytes:
    """Two entries of one name: JSON forbids neither, readers differ in which one counts."""
    header, data = parts_of(tensors)
    names = [name for name in sorted(header) if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    text = json.dumps(header)
    return joined(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}", data)


def _take_out(random: Random, tensors: bytes) -> bytes:
    """A tensor with its data: the file is sound, and lacks something."""
    header, data = parts_of(tensors)
    name = random.choice([name for name in sorted(header) if name != "__metadata__"])
    return joined(header, replaced(header, data, name, b"", None))


def _convert(random: Random, tensors: bytes) -> bytes:
    """Data of another size with a dtype and shape that go with them: the file is sound, and does not fit the model."""
    header, data = parts_of(tensors)
    name = random.choice([name for name in sorted(header) if name != "__metadata__"])
    shape = list(header[name]["shape"])
    if random.random() < 0.5:
        shape = random.choice((shape[::-1], [_product(shape)], [*shape, 1], [size + 1 for size in shape], [0], []))
    dtype, size = random.choice(
        (("U8", 1), ("BOOL", 1), ("F8_E5M2", 1), ("F16", 2), ("I32", 4), ("F64", 8), ("C64", 8))
    )
    content = bytes(random.choice((0, 1, 63)) for _ in range(size)) * _product(shape)
    return joined(header, replaced(header, data, name, content, {"dtype": dtype, "shape": shape}))


def replaced(header: dict, data: bytes, name: str, content: bytes, entry: dict | None) -> bytes:
    """Data with other content for a tensor; the header is changed to fit, None takes the tensor out of it."""
    begin, end = header.pop(name)["data_offsets"]
    moved = len(content) - (end - begin)
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset + moved for offset in other["data_offsets"]]
    if entry is not None:
        header[name] = {**entry, "data_offsets": [begin, begin + len(content)]}
    return data[:begin] + content + data[end:]


def _set_values(random: Random, tensors: bytes) -> bytes:
    """A pattern over some bytes of one tensor: NaN, infinity, negative, huge, spare bits."""
    header, data = parts_of(tensors)
    name = random.choice([name for name in sorted(header) if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    pattern = random.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\0\xbf", b"\xff\xff\x7f\x7f", b"\xff" * 4)
    )
    count = random.randint(1, max((end - begin) // 4, 1))
    values = (pattern * count)[: end - begin]
    at = begin + 4 * random.randrange(max((end - begin - len(values)) // 4, 1))
    return joined(header, data[:at] + values + data[at + len(values) :])


CONFIG: dict[str, Callable[[Random, bytes], bytes]] = {
    "another value of a field": _in_config(_set_field),
    "another word in a field": _in_config(_set_word),
    "a field removed": _in_config(_remove_field),
    "a field added": _in_config(_add_field),
    "other names": _in_config(_change_names),
    "names moved": _in_config(_move_names),
    "characters of the config flipped": _flip_in_config,
    "the config cut": _cut_config,
}
"""Damage of config.json, by what it is called."""

TENSORS: dict[str, Callable[[Random, bytes], bytes]] = {
    "the tensors cut": _truncate,
    "bytes appended": _append,
    "bytes flipped": _flip,
    "bytes of the header flipped": _flip_in_header,
    "another header size": _set_header_size,
    "another dtype": _in_header(_set_dtype),
    "another dtype of the same size": _in_header(_set_dtype_and_shape),
    "another shape": _in_header(_set_shape),
    "other offsets": _in_header(_set_offsets),
    "data of two tensors swapped": _in_header(_swap_data),
    "data shared": _in_header(_share_data),
    "a tensor renamed": _in_header(_rename),
    "a tensor's entry removed": _in_header(_remove_tensor),
    "another entry": _in_header(_set_entry),
    "other metadata": _in_header(_set_metadata),
    "a name twice": _double_name,
    "a tensor taken out": _take_out,
    "a tensor of another kind": _convert,
    "other values": _set_values,
}
"""Damage of model.safetensors, by what it is called."""
