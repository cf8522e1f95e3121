"""The Trainers of `image_classification.py`: one for the teacher and one for each stage of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_training import MeanLoss, OwnSampler
from safetensors.torch import load_file, save_model
from timm.utils import ModelEmaV3
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback

from rebnn_hf import ReBNNTrainer
from rebnn_hf.checkpoints import WholeCheckpoints
from rebnn_hf.distillation import soft_cross_entropy


class EpochSampler(Sampler[tuple[int, int]]):
    """Epoch and index of every example in an order that is a function of seed and epoch alone.

    Args:
        length: Number of examples.
        epoch: Tells which epoch is to be drawn.
        seed: Of the order.
    """

    def __init__(self, length: int, epoch: Callable[[], int], seed: int):
        self.length = length
        self.epoch = epoch
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        for index in np.random.default_rng((self.seed, epoch)).permutation(self.length).tolist():
            yield epoch, index


class Shuffled(OwnSampler):
    """Gives a Trainer the order of `EpochSampler`."""

    def sampler(self, epoch: Callable[[], int]) -> EpochSampler:
        """All examples, shuffled."""
        return EpochSampler(len(self.train_dataset), epoch, self.args.seed)


class TeacherTrainer(Shuffled, MeanLoss, WholeCheckpoints, Trainer):
    """Trains the float model on the labels."""


class StageOneTrainer(Shuffled, MeanLoss, WholeCheckpoints, Trainer):
    """Distils a student with float weights and 1-bit activations.

    The loss is the distributional one of ReActNet (D4), the optimizer Adam whose weight decay is added to the gradients
    of the convolutions (D7), not AdamW's.

    Args:
        teacher: A float model with the same inputs and classes.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any):
        super().__init__(*args, **kwargs)
        teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Adam; only convolutions have weight decay."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim == 4], "weight_decay": self.args.weight_decay},
            {"params": [p for p in parameters if p.ndim != 4], "weight_decay": 0.0},
        ]
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = torch.optim.Adam(groups, self.args.learning_rate, betas, self.args.adam_epsilon)
        return self.optimizer

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Soft cross-entropy to the teacher; the labels are not looked at."""
        images = inputs["pixel_values"]
        outputs = model(pixel_values=images)
        with torch.no_grad():
            target = self.teacher(pixel_values=images).logits
        loss = soft_cross_entropy(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


AVERAGE_FILE = "average.safetensors"
"""Of a checkpoint: the averaged model, beside the one that goes on training."""


class Averaged:
    """Gives a Trainer an exponential moving average of its model (timm's), which checkpoints hold and continue.

    After each step, `average = decay * average + (1 - decay) * model` over parameters and buffers. The decay rises with
    the number of steps to that which is asked for, so that short trainings do not average their start. Of a latent
    model, weights, scales and statistics of BatchNorm are averaged, not networks: a bit of the average is the sign of
    an averaged weight, so one that swings around 0 gets the side on which it was longer and farther.

    Args:
        ema: The decay; None for no average.
        **kwargs: As for the Trainer.
    """

    def __init__(self, *args: Any, ema: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.average = None if ema is None else ModelEmaV3(self.model, decay=ema, use_warmup=True)
        if self.average is not None:
            self.add_callback(UpdateAverage(self))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            load_average(self.average.module, Path(checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            save_model(self.average.module, str(Path(output_dir) / AVERAGE_FILE))


class UpdateAverage(TrainerCallback):
    """Brings the average of a Trainer up to date after each step."""

    def __init__(self, trainer: Averaged):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Takes the weights of the step in."""
        self.trainer.average.update(self.trainer.model, step=state.global_step)


def load_average(model: PreTrainedModel, checkpoint: Path) -> None:
    """Gives a model the averaged weights of a checkpoint."""
    model.load_state_dict(load_file(checkpoint / AVERAGE_FILE))


class StageTwoTrainer(Averaged, Shuffled, ReBNNTrainer):
    """Distils the student with 1-bit weights and activations."""
