"""What every recipe's command line is checked for before anything runs: numbers, and options that would do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

POSITIVE = (
    "learning_rate",
    "epochs",
    "_steps",
    "_size",
    "_length",
    "_samples",
    "_runs",
    "_channels",
    "temperature",
    "lora",
)
NOT_NEGATIVE = ("_weight", "weight_decay", "stride", "workers", "seed")
SHARES = {"warm_up": "of the steps", "dropout": "of the activations"}


def check_numbers(arguments: Any) -> None:
    """Refuses numbers that would stop a run only after its teacher is trained, or change its meaning without a word.

    What a number may be, the end of its option's name tells.

    Args:
        arguments: A dataclass with a dataclass for each group of options.

    Raises:
        ValueError: With the first of them.
    """
    for group in asdict(arguments).values():
        for name, value in group.items() if isinstance(group, dict) else ():
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(name, value)


def check_number(name: str, value: float) -> None:
    """Refuses a value that the option of this name cannot have.

    Raises:
        ValueError: Then.
    """
    if name == "max_steps":
        if value != -1 and value <= 0:
            raise ValueError(f"--max_steps {value} must be greater than 0, or -1 to count epochs")
    elif name in SHARES:
        if not 0 <= value < 1:
            raise ValueError(f"--{name} {value} is a share {SHARES[name]}: at least 0 and less than 1")
    elif name.endswith(POSITIVE) and not value > 0:
        raise ValueError(f"--{name} {value} must be greater than 0")
    elif name.endswith(NOT_NEGATIVE) and not value >= 0:
        raise ValueError(f"--{name} {value} must not be negative")


def typed_options(argv: Sequence[str]) -> dict[str, str]:
    """The options of a command line by name, each as it was typed, with the word behind it."""
    typed = {}
    for word, behind in pairwise([*argv, "--"]):
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            typed[name] = word if behind.startswith("--") else f"{word} {behind}"
    return typed


def check_partners(argv: Sequence[str], partners: Mapping[str, tuple[bool, str]]) -> None:
    """Refuses options that do nothing because another one is missing.

    Args:
        argv: The command line: what was not typed may well do nothing.
        partners: For each option whether what it needs is there, and what that is.

    Raises:
        ValueError: With the first of them.
    """
    typed = typed_options(argv)
    for name, (there, partner) in partners.items():
        if name in typed and not there:
            raise ValueError(f"{typed[name]} does nothing without {partner}")
