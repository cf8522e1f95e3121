"""Kills runs of the recipe at random moments until they finish, and compares what they made with an uninterrupted run.

    python tests/faults/kills.py --kills 100 --folder /tmp/kills

A run is the reduced demo with two teachers: teacher trainings, average, distillation, packing, report. Half of the
kills come after a random time; the other half when the process opens, renames or deletes its n-th file, n random, so
that many fall between two writes of one checkpoint. After every kill the same command is given again. Processes are
forked from this one, which has imported everything but computed nothing. Only the pictures of the report are left out:
they take as long as all the rest, and nothing depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads would not survive the fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import glue
import recipe_report
from recipe_folder import RunFolder

from rebnn_hf.checkpoints import CHECKPOINTS, damage

OPTIONS = ["--max_train_samples", "64", "--max_eval_samples", "20", "--teacher_epochs", "1", "--teacher_runs", "2"]
OPTIONS += ["--max_steps", "4", "--save_steps", "1", "--logging_steps", "1", "--dropout", "0.1"]
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
STAGES = ("teacher", "latent", "packed")
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


recipe_report.plot_oscillation = recipe_report.plot_epoch_flips = recipe_report.plot_latent_weights = lambda *_: None


@dataclass
class Tally:
    """What happened to the runs so far."""

    kills: Counter = field(default_factory=Counter)
    runs: int = 0
    drafts: int = 0
    damaged: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        stages = ", ".join(f"{count} {stage}" for stage, count in self.kills.items())
        return (
            f"{sum(self.kills.values())} kills ({stages}), {self.drafts} of them in the middle of a write; "
            f"{self.runs} runs finished; damaged checkpoints: {self.damaged or 'none'}; "
            f"differences: {self.differences or 'none'}"
        )


def start(folder: Path, die_at: int | None = None, count_into: int | None = None) -> int:
    """The id of a process that runs the recipe; `die_at`: it kills itself at its n-th access to the folder."""
    process = os.fork()
    if process:
        return process
    accesses = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal accesses
        if event in EVENTS and str(folder) in str(arguments[0]):
            accesses += 1
            if accesses == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 1
    try:
        glue.main(["--output_dir", str(folder), *OPTIONS])
        code = 0
    except (Exception, SystemExit):  # noqa: BLE001  as the interpreter does at the end of a script
        traceback.print_exc()
    if count_into is not None:
        os.write(count_into, str(accesses).encode())
    sys.stdout.flush()
    os._exit(code)


def finish(folder: Path) -> tuple[float, int]:
    """Runs the recipe to its end; seconds it took, and its accesses to the folder."""
    reader, writer = os.pipe()
    begin = time.time()
    _, status = os.waitpid(start(folder, count_into=writer), 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        accesses = int(pipe.read())
    if status:
        raise SystemExit(f"the uninterrupted run failed: see {folder.parent / f'{folder.name}.log'}")
    return time.time() - begin, accesses


def wait(process: int, seconds: float | None) -> bool:
    """Whether a process was killed: by this one after some seconds, or by itself."""
    end = time.time() + (seconds if seconds is not None else 600)
    while time.time() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return True
            if os.WEXITSTATUS(status):
                raise SystemExit(f"a continued run failed with exit code {os.WEXITSTATUS(status)}")
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def inspect(folder: Path, tally: Tally) -> None:
    """Notes where a kill came, and that nothing unfinished has the name of something finished."""
    run = RunFolder(folder)
    stage = next((stage for stage in STAGES if run.record(stage) is None), "report")
    tally.kills[stage] += 1
    tally.drafts += bool(list(folder.rglob("*.draft")))
    for checkpoint in folder.rglob(CHECKPOINTS):
        reason = damage(checkpoint)
        # A checkpoint may be half deleted while a newer one, or the finished stage, has taken its place.
        if checkpoint.parent.suffix != ".draft" and reason is not None and not superseded(checkpoint, run):
            tally.damaged.append(f"{checkpoint}: {reason}")
    if run.results() is not None and stage != "report":
        tally.damaged.append(f"{folder} has results, but {stage} is not complete")


def superseded(checkpoint: Path, run: RunFolder) -> bool:
    """Whether nothing needs a checkpoint any more."""
    steps = int(checkpoint.name.rpartition("-")[2])
    newer = [path for path in checkpoint.parent.glob(CHECKPOINTS) if int(path.name.rpartition("-")[2]) > steps]
    stage = checkpoint.relative_to(run.root).parts[0]
    return run.record(stage) is not None or any(damage(path) is None for path in newer)


def compare(folder: Path, reference: Path, tally: Tally) -> None:
    """Notes every file of a model, and every score, that differs from the uninterrupted run's."""
    tally.runs += 1
    for stage in STAGES:
        for name in MODEL_FILES:
            mine, whole = folder / stage / name, reference / stage / name
            if mine.read_bytes() != whole.read_bytes():
                tally.differences.append(f"{mine} differs from {whole}")
    scores = [json.loads((path / "results.json").read_text())["scores"] for path in (folder, reference)]
    if scores[0] != scores[1]:
        tally.differences.append(f"{folder}: scores {scores[0]}, not {scores[1]}")
    left = [str(path) for pattern in ("*.draft", CHECKPOINTS) for path in folder.rglob(pattern)]
    if left:
        tally.differences.append(f"{folder}: left over {left}")


def kill_runs(root: Path, kills: int, seed: int) -> Tally:
    """As many kills as asked for, and the end of the last run after them."""
    draw, tally = random.Random(seed), Tally()
    root.mkdir(parents=True, exist_ok=True)
    reference = root / "reference"
    seconds, accesses = finish(reference)
    print(f"an uninterrupted run takes {seconds:.1f} s and {accesses} accesses to its folder", flush=True)
    number = 0
    while sum(tally.kills.values()) < kills:
        folder = root / f"run-{number}"
        number += 1
        while True:
            enough = sum(tally.kills.values()) >= kills
            by_time = draw.random() < 0.5
            die_at = None if enough or by_time else draw.randrange(1, accesses)
            killed = wait(start(folder, die_at), draw.uniform(0, seconds) if by_time and not enough else None)
            if not killed:
                break
            inspect(folder, tally)
        compare(folder, reference, tally)
        print(tally, flush=True)
        if not tally.differences:
            shutil.rmtree(folder)
    return tally


def main() -> None:
    """Reads the command line; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Kill runs of the recipe at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs and their logs")
    options = parser.parse_args()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(options.folder)
    tally = kill_runs(options.folder, options.kills, options.seed)
    sys.exit(bool(tally.damaged or tally.differences))


if __name__ == "__main__":
    main()
