"""Times of several contenders side by side in one run, and tables of them: what `benchmarks/` and `rebnn bench` print.

A busy or drifting machine slows all contenders of a round, so that ratios hold where times do not.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

TURN = 2e-3
"""Seconds that one turn of a contender takes at least: the clock is read only before and after."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` leaves out the time that other processes took, and adds up that of all threads."""

UNITS = {"us": 1e-6, "ms": 1e-3}

Row = Mapping[str, "float | str"]


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Args:
        name: in the tables.
        call: what is timed.
        inside: makes what its calls run inside of, untimed; for example `environment`.
    """

    name: str
    call: Callable[[], object]
    inside: Callable[[], AbstractContextManager] = nullcontext


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    turn: float = TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time all contenders in rounds: forth, then back, so that nobody has the same neighbours all the time.

    In its turn a contender runs once untimed, which brings its data into the caches and lets the threads of the one
    before go to sleep, and then as often as fits into `turn`, at least once. A first round is left out: it finds out
    how often that is.

    Args:
        contenders: with different names.
        rounds: turns of each.
        turn: seconds.
        clock: gives seconds.

    Returns:
        Seconds per call of each round, by name.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} measures nothing; at least 1 is needed.")
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    fastest = dict.fromkeys(times, math.inf)
    for number in range(rounds + 1):
        for contender in contenders if number % 2 else reversed(contenders):
            name = contender.name
            seconds = _turn(contender, max(1, math.ceil(turn / fastest[name])), clock)
            fastest[name] = max(min(fastest[name], seconds), 1e-9)
            times[name].append(seconds)
    return {name: seconds[1:] for name, seconds in times.items()}


def _turn(contender: Contender, calls: int, clock: Callable[[], float]) -> float:
    call = contender.call
    with contender.inside():
        call()
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def compare(times: Mapping[str, Sequence[float]], baselines: Iterable[str], unit: str = "ms") -> list[Row]:
    """Rows of a table: median, quartiles, and how many times as fast as each baseline (ratio of medians).

    Args:
        times: seconds by name.
        baselines: names; those that did not run have no column.
        unit: of the table, one of `UNITS`.
    """
    medians = {name: quartiles(seconds)[1] for name, seconds in times.items()}
    present = [name for name in baselines if name in medians]
    rows = []
    for name, seconds in times.items():
        low, middle, high = (value / UNITS[unit] for value in quartiles(seconds))
        row = {"contender": name, f"median {unit}": middle, "q1": low, "q3": high}
        rows.append(row | {f"x {base}": medians[base] / medians[name] for base in present})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table: words to the left, numbers to the right, with three digits."""
    columns = []
    for name in rows[0]:
        cells = [name, *(cell(row[name]) for row in rows)]
        width, words = max(map(len, cells)), isinstance(rows[0][name], str)
        cells = [text.ljust(width) if words else text.rjust(width) for text in cells]
        cells.insert(1, "-" * width if words else "-" * (width - 1) + ":")
        columns.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def cell(value: float | str) -> str:
    """A value as tables show it: floats with three digits."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


# What contenders run inside of


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(number: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: fewer than one, or more than there are cores: they would only wait for each other.
    """
    if not 1 <= number <= cores():
        raise ValueError(f"{number} threads cannot be measured: this process may use {cores()} core(s).")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for torch and the engine, for the time of a `with` block; see `check_threads`."""
    check_threads(number)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
