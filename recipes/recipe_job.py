"""A run of a recipe: options, data, tokenizer, output folder and processes, and how a stage is run once."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import snapshot_download
from recipe_arguments import Arguments
from recipe_folder import RunFolder, Settings, remove_checkpoints
from recipe_task import Task
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a teacher on the Hub


Logits = dict[str, np.ndarray]


@dataclass
class Job(ABC):
    """Everything the stages share; a subclass says what is special about a kind of task.

    Attributes:
        script: The file that is run, as a reader of the results would type it.
        auto_model: The class that loads a model with the right head.
        pipeline_tag: What the Hub calls the kind of task.
        library_name: What the Hub calls the library that loads the packed model.
        usage: Code that loads and uses the packed model, for its card.
        libraries: Modules a result depends on beside those of every recipe.
        tokenizer: None where the inputs are no texts.
        teacher_folder: None where there is no teacher.
    """

    script: ClassVar[str]
    auto_model: ClassVar[type]
    pipeline_tag: ClassVar[str]
    library_name: ClassVar[str] = "transformers"
    usage: ClassVar[str]
    libraries: ClassVar[tuple[ModuleType, ...]] = ()

    arguments: Arguments
    task: Task
    data: DatasetDict
    tokenizer: PreTrainedTokenizerBase | None
    run: RunFolder
    teacher_folder: Path | None
    process: PartialState

    def stage(self, name: str, action: Callable[[Job], dict[str, Any]]) -> None:
        """Runs a stage unless it is complete, and completes it with what `action` records."""
        complete = self.run.record(name) is not None
        self.process.wait_for_everyone()  # all have looked before anyone writes
        self.process.print(f"{name}: {'already complete' if complete else 'started'}")
        if not complete:
            start = time.time()
            record = action(self)
            record["seconds"] = time.time() - start + record.pop("earlier_seconds", 0.0)
            self.process.wait_for_everyone()
            if self.process.is_main_process:
                self.run.complete(name, record)
        if self.process.is_main_process:  # only now: until the record is written the work could still get lost
            remove_checkpoints(self.run.folder(name))
        self.process.wait_for_everyone()

    def load(self, source: str | Path, **options: Any) -> Any:
        """A model in float32, whatever dtype its file has: it is going to be trained or compared."""
        return load_pretrained(self.auto_model.from_pretrained, source, **{"dtype": torch.float32, **options})

    @staticmethod
    @abstractmethod
    def load_data(arguments: Arguments) -> tuple[Task, DatasetDict]:
        """The task and its splits."""

    @staticmethod
    def load_tokenizer(arguments: Arguments, data: DatasetDict) -> PreTrainedTokenizerBase | None:
        """The tokenizer of teacher and student."""
        return None

    @staticmethod
    def digest(data: DatasetDict) -> str:
        """Tells whether two runs saw the same examples, wherever they came from."""
        return digest(data)

    @abstractmethod
    def validate(self, model: PreTrainedModel) -> Logits:
        """The logits of `model` on the validation data."""

    @abstractmethod
    def score(self, logits: Logits) -> dict[str, float]:
        """The metrics of what `validate` returns; nothing but in the main process, whose record counts."""

    def score_baselines(self) -> dict[str, dict[str, float]]:
        """The metrics of what the models are to be compared with, by name."""
        return {}

    def submit(self, model: PreTrainedModel, logits: Logits) -> None:
        """Writes what the packed model predicts, if anyone wants it; its `logits` on the validation data are known."""
        return None

    def once_per_machine(self, make: Callable[[], DatasetDict]) -> DatasetDict:
        """What `make` makes, in one process of each machine; the others read it from a folder that is then deleted.

        A cache would not do: data that came from memory or a text file have none.
        """
        process = self.process
        if process.num_processes == 1:
            return make()
        maker = process.process_index - process.local_process_index
        folder = self.run.root / f"data-{maker}.draft"
        if process.is_local_main_process:
            data = make()
            shutil.rmtree(folder, ignore_errors=True)
            data.save_to_disk(str(folder))
        process.wait_for_everyone()
        if not process.is_local_main_process:
            data = load_from_disk(str(folder))
        process.wait_for_everyone()
        if process.is_local_main_process:
            shutil.rmtree(folder)
        return data

    # What the model card says

    @property
    @abstractmethod
    def origin(self) -> str | None:
        """The name of the model that was made 1-bit; None for one that was trained from scratch."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The heading."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The name of the packed model."""

    @property
    @abstractmethod
    def about(self) -> str:
        """The first paragraph."""


class TextJob(Job):
    """What the kinds of text have in common.

    Attributes:
        adapter_task: What PEFT calls the kind of task; None for no class of its own.
    """

    adapter_task: ClassVar[str | None]

    def load(self, source: str | Path, **options: Any) -> Any:
        """A model in float32."""
        if device_arguments()["use_cpu"]:
            # The backward pass of torch's fused attention dominates a training step with short sentences on a CPU;
            # written out it takes next to nothing.
            options["attn_implementation"] = "eager"
        return super().load(source, **options)

    def new_teacher(self) -> PreTrainedModel:
        """The pretrained encoder with a new head, which is to be fine-tuned."""
        names = dict(enumerate(self.task.labels)) if self.task.labels else {}
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}
        return self.load(self.arguments.teacher.model_name_or_path, num_labels=self.task.num_labels, **labels)

    @property
    @abstractmethod
    def tokens(self) -> DatasetDict:
        """The data as token ids: what is trained on is the split `train`."""

    @property
    def origin(self) -> str | None:
        """The encoder; None for the demo's, which is trained from scratch.

        Of a model that came from a folder it is the folder's name: a local path means nothing to the card's reader.
        """
        source = self.arguments.teacher.source
        return Path(source).resolve().name if source is not None and Path(source).is_dir() else source

    @property
    def title(self) -> str:
        """Encoder and task."""
        return f"{self.origin or 'A small BERT'} with 1-bit weights, fine-tuned on {self.task.name}"

    @property
    def model_name(self) -> str:
        """The same in short."""
        return f"{Path(self.origin or 'bert-small').name}-{self.task.name}-1bit"

    @property
    def about(self) -> str:
        """What is 1-bit, and how the model was made."""
        return (
            "Made with rebnn_hf: the weights of the layers listed below are stored as one bit each, with one scale per "
            "row. The model was distilled from a float teacher of the same shape"
            + (", beginning with the encoder of an earlier 1-bit model." if self.arguments.student.student else ".")
        )


def prepare(arguments: Arguments, kind: type[Job], *checks: Callable[[Job], None]) -> Job:
    """Loads data and tokenizer and opens the output folder of a job of this kind.

    Args:
        arguments: The command line.
        kind: Of job.
        checks: What refuses a job by a SystemExit. They come before the folder is touched, from which `--overwrite`
            drops stages, and are left out where nothing is left to do.

    Raises:
        SystemExit: If data or tokenizer cannot be loaded, a check refuses the job, or the folder holds a run with
            other settings.
    """
    process = start_process()
    with process.main_process_first():
        task, data = kind.load_data(arguments)
    arguments.fill_in(task)
    check_processes(arguments, process)
    if task.name == "demo":
        torch.set_num_threads(1)  # its model is too small to gain from a second one, and loses where cores are shared
    else:
        hint_at_idle_cores(process)
    tokenizer = kind.load_tokenizer(arguments, data)
    settings = arguments.stage_settings(kind.digest(data))
    run = RunFolder(arguments.run.output_dir, tuple(settings))
    with process.main_process_first():
        teacher_folder = find_teacher(arguments, run)
    job = kind(arguments, task, data, tokenizer, run, teacher_folder, process)
    for check in checks if run.has_work_left(settings) else ():
        check(job)
    begin(run, settings, arguments.run.overwrite, process)
    return job


def start_process() -> PartialState:
    """This process among those of the run."""
    return PartialState(**({"cpu": True} if device_arguments()["use_cpu"] else {}))


def device_arguments() -> dict[str, bool]:
    """The arguments of the Trainer that depend on whether there is an accelerator."""
    on_cpu = not torch.accelerator.is_available()
    return {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}


def launcher(process: PartialState, *options: str) -> list[str]:
    """The words before a script that start it in as many processes, on such devices, as this run has."""
    launch = ["accelerate", "launch"]
    if process.num_processes > 1:
        # Without --multi_gpu accelerate starts a single process where it counts fewer GPUs, and does not say so.
        launch += ["--multi_gpu", "--num_processes", str(process.num_processes)]
        if process.device.type == "cpu":
            launch.insert(0, "ACCELERATE_USE_CPU=true")
    return [*launch, *options]


def hint_at_idle_cores(process: PartialState) -> None:
    """Says how to use all cores: `accelerate launch` gives a process on a CPU one thread unless told otherwise."""
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or 1
    if process.device.type == "cpu" and process.num_processes * threads < cores:
        each = cores // process.num_processes
        process.print(
            f"{threads} thread(s) in {process.num_processes} process(es) leave cores of {cores} idle: "
            f"{shlex.join(launcher(process, '--num_cpu_threads_per_process', str(each)))} uses them"
        )


def begin(run: RunFolder, settings: Settings, overwrite: bool, process: PartialState) -> None:
    """Begins or continues the run in its folder.

    Raises:
        SystemExit: If the folder cannot be used, or holds a run with other settings that `overwrite` does not give up.
    """
    try:
        run.check(settings, overwrite)
        process.wait_for_everyone()  # all have looked before the main process writes
        if process.is_main_process:
            run.begin(settings)
    except OSError as error:
        raise SystemExit(f"--output_dir {run.root} cannot be used: {error}. Choose another one.") from error
    process.wait_for_everyone()


def parts(arguments: Arguments, process: PartialState) -> int:
    """How many parts the batch of a step is computed in: one for each process and step of accumulation."""
    return process.num_processes * arguments.run.gradient_accumulation_steps


def check_processes(arguments: Arguments, process: PartialState) -> None:
    """Refuses numbers of processes that the global batch or the GPUs cannot be shared among."""
    if arguments.student.batch_size % parts(arguments, process):
        raise SystemExit(
            f"--batch_size {arguments.student.batch_size} counts the examples of a step over all processes and "
            f"accumulation steps: it must be a multiple of {process.num_processes} x "
            f"{arguments.run.gradient_accumulation_steps}, their numbers."
        )
    if process.num_processes == 1 and torch.cuda.device_count() > 1:
        raise SystemExit(
            "several GPUs and one process: use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0 for one GPU."
        )


def digest(data: DatasetDict) -> str:
    """Tells whether two runs saw the same examples, wherever they came from."""
    sha = hashlib.sha256()
    for name, split in data.items():
        for column in split.column_names:
            sha.update(repr((name, column, split[column][:])).encode())
    return sha.hexdigest()[:16]


def tokenize(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, columns: list[str], max_length: int
) -> dict[str, list]:
    """Token ids of a batch of sentences or pairs."""
    return tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)


def find_teacher(arguments: Arguments, run: RunFolder) -> Path:
    """The folder where the teacher is, or will be once it is fine-tuned."""
    given = arguments.teacher.teacher
    if given is None:
        return run.folder("teacher")
    if not Path(given).is_dir():
        folder = Path(load_pretrained(snapshot_download, given, allow_patterns=MODEL_FILES))
        check_weights(folder, given)
        return folder
    refuse_own_folder(run, "--teacher", given)
    return Path(given)


def refuse_own_folder(run: RunFolder, option: str, given: str) -> None:
    """Refuses to read from the folder of the run."""
    if Path(given).resolve().is_relative_to(run.root.resolve()):
        raise SystemExit(f"{option} {given} lies in --output_dir, which may be cleared: choose another --output_dir.")


def check_weights(folder: Path, name: str) -> None:
    """Refuses a teacher of the Hub whose weights were not downloaded: pickles run code of strangers."""
    if not any(folder.rglob("*.safetensors")):
        raise SystemExit(
            f"--teacher {name} has no safetensors file, and pickled weights (.bin, .pt) are not loaded from the Hub. "
            "If you trust it, write it anew as safetensors, from_pretrained(name).save_pretrained(FOLDER) for model "
            "and tokenizer, and pass --teacher FOLDER."
        )


def load_pretrained(loader: Callable[..., Any], source: str | Path, **options: Any) -> Any:
    """What `loader` makes of a Hub name or folder.

    Raises:
        SystemExit: In one sentence, if there is nothing to load.
    """
    try:
        return loader(source, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{source} cannot be loaded: pass the folder of a model you have ({reason}).") from None


def with_dropout(source: str | Path, dropout: float) -> PretrainedConfig:
    """Config of a saved model with another dropout."""
    config = load_pretrained(AutoConfig.from_pretrained, source)
    for name, value in config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):  # each architecture has its own names for it
            setattr(config, name, dropout)
    return config


def first(split: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all."""
    return split if limit is None else split.select(range(min(limit, len(split))))
