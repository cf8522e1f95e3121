"""The runs of a grid: what each is, whether it is finished, and how it is started as a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from recipe_folder import read_json

from rebnn_hf.checkpoints import STATE_FILE

RECIPES = Path(__file__).parent

T = TypeVar("T")


PROCESS_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
PROCESS_VARIABLES |= {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"}


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what `accelerate launch` or `torchrun` told this process about itself.

    A run would take it for being told so too. `ACCELERATE_USE_CPU` is also set by people, and stays.
    """
    dropped = {name for name in environment if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    dropped -= {"ACCELERATE_USE_CPU"}
    if dropped:
        dropped.add("OMP_NUM_THREADS")  # a launcher always sets it, to 1 where it knows no better
    return {name: value for name, value in environment.items() if name not in dropped | PROCESS_VARIABLES}


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


class RunFailedError(Exception):
    """A process of the grid ended without a result; the message names its log."""


@dataclass(frozen=True)
class Launcher:
    """How processes are started.

    Attributes:
        processes: Of each run; more than one are started by `accelerate launch`.
        jobs: Runs at the same time.
        gpus: Names of the GPUs that runs of one process are dealt out to; those of several processes see all.
    """

    processes: int = 1
    jobs: int = 1
    gpus: Sequence[str] = ()
    _free: SimpleQueue = field(default_factory=SimpleQueue, init=False, repr=False, compare=False)

    def __post_init__(self):
        for job in range(self.jobs):
            self._free.put(self.gpus[job % len(self.gpus)] if self.gpus else None)

    def start(self, script: str, argv: list[str], log: Path) -> None:
        """Runs a recipe to its end; what it prints is added to `log`.

        Raises:
            RunFailedError: If it does not succeed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        gpu = self._free.get()
        try:
            self._run([*self._prefix(), str(RECIPES / script), *argv], self._environment(gpu), log)
        finally:
            self._free.put(gpu)

    def _run(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("a", encoding="utf-8") as file:  # of a run that is continued the beginning is worth keeping
            ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if ended.returncode:
            raise RunFailedError(f"exit code {ended.returncode}, see {log}")

    def _environment(self, gpu: str | None) -> dict[str, str]:
        """What a process is started with: the environment of the grid, its share of threads, and its GPU."""
        environment = without_launcher(os.environ)
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        if self.processes == 1 and gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return environment

    def _prefix(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable]
        # Without --multi_gpu accelerate starts a single process where it counts fewer GPUs, and does not say so.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        return [*launch, "--num_processes", str(self.processes)]

    def attempt(self, action: Callable[[T], Any], items: Iterable[T]) -> Iterator[tuple[T, Any]]:
        """Each item with what `action` makes of it, in their order; with the RunFailedError where it fails."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [(item, pool.submit(action, item)) for item in items]
            try:
                for item, future in futures:
                    try:
                        outcome = future.result()
                    except RunFailedError as failure:
                        outcome = failure
                    yield item, outcome
            except BaseException:  # interrupted, or a fault of the grid itself: start nothing more
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass(frozen=True)
class Teacher:
    """The float model all runs of a task start from.

    Attributes:
        task: What it is fine-tuned on.
        folder: Where it is, or where it is fine-tuned, as `glue.py` would, into the folder `teacher`.
        argv: The options of its fine-tuning.
    """

    task: str
    folder: Path
    argv: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where the model is, or will be."""
        return self.folder if (self.folder / "config.json").exists() else self.folder / "teacher"

    def exists(self) -> bool:
        """Whether it needs no more fine-tuning; where `glue.py` runs, the record of the stage tells."""
        begun, complete = self.folder / "settings.json", self.folder / "stages" / "teacher.json"
        return (self.path / "config.json").exists() and (complete.exists() or not begun.exists())

    def ensure(self, launcher: Launcher) -> None:
        """Fine-tunes it unless it exists.

        Raises:
            RunFailedError: If that fails.
        """
        if not self.exists():
            log = self.folder.with_name(f"{self.folder.name}.log")
            print(f"{self.task}: fine-tuning the teacher in {self.folder}, see {log}", flush=True)
            launcher.start("ablation_teacher.py", list(self.argv), log)


@dataclass(frozen=True)
class Run:
    """One point of the grid.

    Attributes:
        task: A GLUE task or the demo.
        method: A name of `ablation_methods.METHODS`.
        seed: Of the data order.
        root: The folder of the grid.
        options: Of `glue.py`, but for the output folder.
    """

    task: str
    method: str
    seed: int
    root: Path
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is called in messages and in the folder of the grid."""
        return f"{self.task}/{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Its output folder."""
        return self.root / self.name

    @property
    def argv(self) -> list[str]:
        """The options of `glue.py`."""
        return [*self.options, "--output_dir", str(self.folder)]

    def finish(self, launcher: Launcher, keep_models: bool) -> dict[str, Any]:
        """Its results, after running what is left of it.

        Where this very command has left its results, nothing is started. After any other command it is `glue.py` that
        knows which stages are still good, or refuses to continue.

        Raises:
            RunFailedError: If it fails.
        """
        if not self._is_finished():
            launcher.start("glue.py", self.argv, self.root / f"{self.name}.log")
        results = read_json(self.folder / "results.json")
        if results is None:
            raise RunFailedError(f"no results.json in {self.folder}")
        if not keep_models:
            remove_models(self.folder)
        return results

    def log_history(self) -> list[dict[str, float]]:
        """What the distillation logged."""
        return read_json(self.folder / "latent" / STATE_FILE)["log_history"]

    def _is_finished(self) -> bool:
        results = read_json(self.folder / "results.json")
        return results is not None and shlex.split(results["command"])[-len(self.argv) :] == self.argv


def remove_models(folder: Path) -> None:
    """Deletes the weights in a finished run's folder: a grid has many, and reads none of them again."""
    for file in folder.rglob("*.safetensors"):
        file.unlink()
