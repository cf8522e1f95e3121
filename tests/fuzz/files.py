"""Loads damaged checkpoints by the ten thousand and counts how they end.

    python -m tests.fuzz.files --files 100000 --seed 0

Prints the table, the largest memory of the process before and after, and every end that none may have; exits with 1 if
there was one. File number i depends on the seed and i alone: `--first i --files 1` makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import transformers as hf

from .checkpoint import NAMES, Checkpoint
from .damage import damage
from .verdict import BadEnd, end_of

WEIGHTS = (8, 1, 1)
"""How often each of `NAMES` is damaged: mostly the one that loads fastest."""

SECONDS = 20
"""What one file may take; a good one takes a hundredth of a second."""


def main(arguments: list[str] | None = None) -> int:
    """Run it; the number of bad ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that many")
    options = parser.parse_args(arguments)
    hf.logging.set_verbosity(hf.logging.CRITICAL)
    hf.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as parent:
        checkpoints = [Checkpoint(name, Path(parent)) for name in NAMES]
        for checkpoint in checkpoints:
            if end_of(checkpoint) != "loaded":
                raise RuntimeError(f"{checkpoint.name} does not load undamaged.")
        ends, bad = Counter(), []
        start, before = time.time(), _largest_memory()
        for number in range(options.first, options.first + options.files):
            end, trouble = _one_file(checkpoints, options.seed, number)
            ends[end] += 1
            if trouble:
                bad.append(trouble)
                print(trouble, flush=True)
            done = number - options.first + 1
            if done % 5000 == 0:
                print(f"{done} files, {(time.time() - start) / done * 1e3:.1f} ms each, {len(bad)} bad", flush=True)
            if time.time() - start > options.seconds:
                break
    print(f"\n| end of {done} files, seed {options.seed} | files |\n|---|---:|")
    for end, count in ends.most_common():
        print(f"| {end} | {count} |")
    print(f"\n{time.time() - start:.0f} s; largest memory {before:.0f} MB before, {_largest_memory():.0f} MB after")
    return len(bad)


def _one_file(checkpoints: list[Checkpoint], seed: int, number: int) -> tuple[str, str | None]:
    """How file `number` ended, and a line about it if that was bad."""
    choices = random.Random(f"{seed} {number}")
    (checkpoint,) = choices.choices(checkpoints, WEIGHTS)
    what, files = damage(choices, checkpoint.config, checkpoint.tensors)
    checkpoint.write(*files)
    try:
        with _at_most(SECONDS):
            return end_of(checkpoint), None
    except BadEnd as error:
        return "BAD", f"file {number} ({checkpoint.name}, {what}): {str(error)[:400]}"


@contextlib.contextmanager
def _at_most(seconds: int):
    """Turn what takes longer into a BadEnd."""

    def stop(*_):
        raise BadEnd(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _largest_memory() -> float:
    """The most this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main() > 0)
