"""Fields of `ReBNNConfig` on a command line: `--set FIELD=VALUE`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from ..config import ReBNNConfig

SPELLED_IN_PYTHON = {"True": True, "False": False, "None": None}


def settable() -> list[str]:
    """The fields that say what to do; the others record what was done."""
    return [name for name in ReBNNConfig().method() if name not in ("quant_method", "weight_bits")]


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """`["activation_bits=4", "balance_value=1e-4"]` as `{"activation_bits": 4, "balance_value": 0.0001}`.

    A value is what JSON or Python makes of it (`4`, `1e-4`, `true` or `True`, `null` or `None`, `["layer.0"]`), and a
    word otherwise. Whether a field takes it is for `ReBNNConfig` to say.

    Raises:
        ValueError: not FIELD=VALUE, no such field, or one that is given twice.
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set expects FIELD=VALUE, for example activation_bits=4; got {assignment!r}.")
        if name not in settable():
            near = difflib.get_close_matches(name, settable(), n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--set: there is no field {name!r}; expected one of {', '.join(settable())}.{meant}")
        if name in fields:
            raise ValueError(f"--set gives {name} twice: {fields[name]!r} and {value!r}.")
        fields[name] = _value(value)
    return fields


def _value(text: str) -> Any:
    if text in SPELLED_IN_PYTHON:
        return SPELLED_IN_PYTHON[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
