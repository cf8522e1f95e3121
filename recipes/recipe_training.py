"""How a stage trains and what it saves, and predictions: batches by length, short log lines, exact continuation."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from recipe_folder import remove_checkpoints
from recipe_job import Job, device_arguments, parts
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState, ProgressCallback

from rebnn_hf import ReBNNTrainer
from rebnn_hf.checkpoints import STATE_FILE, WholeCheckpoints, newest_checkpoint, read_state, written_aside

EVALUATION_BATCH = 64
DIVERGED = (
    "The training diverged: pass a lower --learning_rate or --teacher_learning_rate, and --overwrite. If it already "
    "started with such weights, the given model holds them."
)


class LengthGroupedSampler(Sampler[int]):
    """Shuffled batches of examples of similar length, a function of seed and epoch alone.

    A run that is continued in the middle of an epoch therefore meets the examples it would have met without the
    interruption, which the Trainer's own `group_by_length` (it draws from the global generator) does not give.

    Args:
        lengths: Length of every example in tokens.
        batch_size: Examples per step over all processes and accumulation steps; one step's examples are neighbours in
            the order.
        epoch: Tells which epoch is to be drawn.
        seed: Of the order.
    """

    POOL = 50  # batches sorted by length together: little padding, and still well mixed

    def __init__(self, lengths: Sequence[int], batch_size: int, epoch: Callable[[], int], seed: int):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.epoch = epoch
        self.seed = seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch()))
        order = rng.permutation(len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        pool = self.POOL * self.batch_size
        pools = (order[start : min(start + pool, whole)] for start in range(0, whole, pool))
        grouped = [indices[np.argsort(self.lengths[indices], kind="stable")] for indices in pools]
        batches = np.concatenate(grouped).reshape(-1, self.batch_size) if grouped else order[:0].reshape(0, 1)
        rng.shuffle(batches)
        yield from batches.ravel().tolist()
        yield from order[whole:].tolist()  # the short batch comes last, or it would shift all those behind it


class OwnSampler(ABC):
    """Gives a Trainer the order of a sampler that is a function of seed and epoch alone."""

    @abstractmethod
    def sampler(self, epoch: Callable[[], int]) -> Sampler:
        """The order of the examples in the epoch that `epoch` tells."""

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process: the global batch of a step does not depend on the number of processes."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=self.sampler(lambda: int(self.state.epoch or 0)),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


class LengthGrouped(OwnSampler):
    """Gives a Trainer the batches of `LengthGroupedSampler`."""

    def sampler(self, epoch: Callable[[], int]) -> LengthGroupedSampler:
        """Batches of similar lengths."""
        return LengthGroupedSampler(
            lengths=[len(ids) for ids in self.train_dataset["input_ids"]],
            batch_size=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            epoch=epoch,
            seed=self.args.seed,
        )


class MeanLoss:
    """Tells a Trainer that the model's loss is the mean over the examples it sees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The Trainer takes the **kwargs of a model's forward for a promise to divide the loss by the global number of
        # items. BERT and timm's models do not, and the gradient would grow with processes and accumulation steps.
        self.model_accepts_loss_kwargs = False


class FineTuningTrainer(LengthGrouped, MeanLoss, WholeCheckpoints, Trainer):
    """Fine-tunes the float teacher."""


class DistillationTrainer(LengthGrouped, ReBNNTrainer):
    """Distils the 1-bit student."""


SHORT_NAMES = {"flip_ratio": "flips", "learning_rate": "lr"}


class CompactProgress(ProgressCallback):
    """The Trainer's progress bar with one short line per report in place of a dictionary of every layer's values."""

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **kwargs) -> None:
        """Writes the losses, the flip ratio and the learning rate; skips the Trainer's closing statistics."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(f"step {state.global_step:>6}  {log_line(logs)}")


def log_line(logs: Mapping[str, float]) -> str:
    """The values of a report that fit on a line."""
    names = [name for name in logs if name.startswith("loss") or name in SHORT_NAMES]
    return "  ".join(f"{SHORT_NAMES.get(name, name.removeprefix('loss_'))} {logs[name]:.3g}" for name in names)


class StageClock(TrainerCallback, ExportableState):
    """Wall time of a training over all its interruptions; its state travels with the checkpoints."""

    def __init__(self, earlier: float = 0.0):
        self.earlier = earlier
        self.start = time.time()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self.start = time.time()

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint remembers."""
        return {"args": {"earlier": self.earlier + time.time() - self.start}, "attributes": {}}

    @classmethod
    def read(cls, state: TrainerState) -> float:
        """Seconds of training behind a checkpoint."""
        return state.stateful_callbacks[cls.__name__]["args"]["earlier"]


class StopWhereDiverged(TrainerCallback):
    """Ends a training that only goes on computing with NaN, in place of the Trainer, which would finish it."""

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **kwargs) -> None:
        """Looks at the norm of the gradients, which is the same in all processes."""
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(norm):
            raise SystemExit(f"{args.output_dir}: gradients of norm {norm} in step {state.global_step}. {DIVERGED}")


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        checkpoint: The folder with the trained model.
        state: The Trainer's state, with its log.
        earlier_seconds: Spent on it before this run.
    """

    checkpoint: Path
    state: TrainerState
    earlier_seconds: float


def training_arguments(
    kind: Callable[..., TrainingArguments], job: Job, stage: str, **specific: Any
) -> TrainingArguments:
    """The arguments that teacher and student share, and the `specific` ones of a stage."""
    return kind(
        output_dir=str(job.run.folder(stage)),
        per_device_train_batch_size=job.arguments.student.batch_size // parts(job.arguments, job.process),
        warmup_steps=job.arguments.student.warm_up,
        lr_scheduler_type="linear",
        save_total_limit=1,
        logging_first_step=True,
        disable_tqdm=False,
        **job.arguments.run.training(),
        **device_arguments(),
        **specific,
    )


def trainer_inputs(job: Job) -> dict[str, Any]:
    """What both Trainers train on."""
    return {"train_dataset": job.tokens["train"], "data_collator": DataCollatorWithPadding(job.tokenizer)}


def train(trainer: Trainer, folder: Path) -> Trained:
    """Trains to the end, from the newest whole checkpoint in `folder` on if there is one."""
    resumed = newest_checkpoint(folder)
    trainer.accelerator.wait_for_everyone()  # all have looked before anyone writes
    if trainer.is_world_process_zero():
        remove_checkpoints(folder, keep=resumed)
    state = read_state(resumed) if resumed else None
    earlier = StageClock.read(state) if state else 0.0
    trainer.add_callback(StageClock(earlier))
    trainer.add_callback(StopWhereDiverged())
    if state is None:
        trainer.train()
    elif state.global_step < state.max_steps:
        if trainer.is_world_process_zero():
            print(f"continuing from step {state.global_step} of {state.max_steps}")
        trainer.train(resume_from_checkpoint=str(resumed))
    trainer.accelerator.wait_for_everyone()  # the last checkpoint is written
    last = newest_checkpoint(folder)
    if last is None:
        raise RuntimeError(f"the training left no checkpoint in {folder}")
    return Trained(last, read_state(last), earlier)


def silence(trainer: Trainer) -> None:
    """Replaces the Trainer's printing by `CompactProgress`."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(CompactProgress())


def train_logged(job: Job, trainer: Trainer, name: str) -> Trained:
    """Trains in the folder of that name and leaves the training log there."""
    silence(trainer)
    folder = job.run.folder(name)
    trained = train(trainer, folder)
    if job.process.is_main_process:
        trained.state.save_to_json(str(folder / STATE_FILE))
    return trained


def trained_record(runs: Sequence[Trained]) -> dict[str, Any]:
    """What a stage records of its trainings."""
    return {
        "steps": sum(run.state.global_step for run in runs),
        "earlier_seconds": sum(run.earlier_seconds for run in runs),
    }


def save(job: Job, model: PreTrainedModel, stage: str) -> None:
    """Leaves the model, with its tokenizer if it has one, in the stage's folder: each file whole or not there.

    Raises:
        SystemExit: If the training that made it diverged.
    """
    check_finite(model, stage)
    if job.process.is_main_process:
        with written_aside(job.run.folder(stage)) as draft:
            model.save_pretrained(draft)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(draft)
    job.process.wait_for_everyone()


def check_finite(model: PreTrainedModel, stage: str) -> None:
    """Refuses a model with weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SystemExit(f"{stage}: {name} holds NaN or infinity. {DIVERGED}")


def predict(
    model: PreTrainedModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> np.ndarray:
    """The logits `[examples, labels]` of a model with one output."""
    (logits,) = predict_all(model, dataset, tokenizer, output_dir)
    return logits


def predict_all(
    model: PreTrainedModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> tuple[np.ndarray, ...]:
    """All outputs of a model in the order of `dataset`, in float32 and without autocast, over all processes."""
    longest_first = np.argsort([-len(ids) for ids in dataset["input_ids"]], kind="stable")
    inputs = dataset.remove_columns([name for name in dataset.column_names if name not in tokenizer.model_input_names])
    outputs = outputs_of(model, inputs.select(longest_first), DataCollatorWithPadding(tokenizer), output_dir)
    given_order = np.argsort(longest_first)
    return tuple(output[given_order] for output in outputs)


def outputs_of(
    model: PreTrainedModel, inputs: torch.utils.data.Dataset | Dataset, collate: Callable, output_dir: Path, **options
) -> tuple[np.ndarray, ...]:
    """All outputs of a model for inputs without labels, in float32 and without autocast, over all processes.

    `options` are further arguments of the Trainer.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_eval_batch_size=EVALUATION_BATCH,
        report_to="none",
        **device_arguments(),
        **options,
    )
    outputs = Trainer(model=model, args=arguments, data_collator=collate).predict(inputs).predictions
    return tuple(
        np.asarray(output, dtype=np.float32) for output in (outputs if isinstance(outputs, tuple) else (outputs,))
    )
