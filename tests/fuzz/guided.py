"""Coverage-guided fuzzing of the config parser and of the bits, with atheris (`pip install atheris`, Linux).

    python -m tests.fuzz.guided config -runs=200000
    python -m tests.fuzz.guided bits -runs=200000

What follows the name goes to libFuzzer. It stops at the first error that is none of those that may come of a file.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import atheris

with atheris.instrument_imports(
    include=["rebnn_hf.config", "rebnn_hf.functional", "rebnn_hf.activations", "rebnn_hf.packing"]
):
    import torch

    from rebnn_hf import ReBNNConfig
    from rebnn_hf.packing import has_clean_padding, pack_signs, packed_width, unpack_signs

from .damage import WORDS


def config(data: bytes) -> None:
    """A quantization_config of known and unknown fields: refused, or read and written as the same."""
    given = atheris.FuzzedDataProvider(data)
    fields = {"quant_method": "rebnn"}
    while given.remaining_bytes() and len(fields) < 8:
        name = given.PickValueInList(FIELDS) if given.ConsumeBool() else given.ConsumeUnicode(20)
        fields[name] = _value(given, depth=0)
    try:
        read = ReBNNConfig.from_dict(fields)
    except ValueError as error:
        if not str(error) or len(str(error)) > 5000:
            raise RuntimeError("a message that tells nothing, or too much") from error
        return
    if ReBNNConfig.from_dict(json.loads(json.dumps(read.to_dict()))) != read:
        raise RuntimeError(f"{read} is written as another config")


def _value(given: atheris.FuzzedDataProvider, depth: int) -> object:
    """What JSON can hold."""
    kind = given.ConsumeIntInRange(0, 8 if depth < 3 else 6)
    if kind == 0:
        return given.PickValueInList([None, True, False])
    if kind == 1:
        return given.ConsumeInt(given.ConsumeIntInRange(1, 200))
    if kind == 2:
        return given.ConsumeFloat()
    if kind == 3:
        return given.ConsumeUnicode(50)
    if kind < 7:
        return given.PickValueInList([*WORDS, 0, 1, 2, 4, 8, 32])
    if kind == 7:
        return {given.ConsumeUnicode(5): _value(given, depth + 1) for _ in range(given.ConsumeIntInRange(0, 3))}
    return [_value(given, depth + 1) for _ in range(given.ConsumeIntInRange(0, 4))]


def bits(data: bytes) -> None:
    """Any bytes as rows of any width: refused, or signs that pack to the same bytes."""
    given = atheris.FuzzedDataProvider(data)
    rows, width, other = given.ConsumeIntInRange(0, 4), given.ConsumeIntInRange(0, 70), given.ConsumeIntInRange(0, 70)
    content = list(given.ConsumeBytes(rows * packed_width(width)))
    content += [0] * (rows * packed_width(width) - len(content))
    packed = torch.tensor(content, dtype=torch.uint8).reshape(rows, packed_width(width))
    try:
        signs = unpack_signs(packed, other)
    except ValueError:
        if packed_width(other) == packed_width(width):
            raise
        return
    if has_clean_padding(packed, other) and not torch.equal(pack_signs(signs), packed):
        raise RuntimeError(f"{packed} of width {other} is packed as {pack_signs(signs)}")


FIELDS = sorted(field.name for field in dataclasses.fields(ReBNNConfig))
TARGETS = {"config": config, "bits": bits}


if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
