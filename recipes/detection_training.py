"""The Trainers of `detection.py`, and how a detector is asked for what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from detection_images import AnnotatedImage
from detection_scores import Detections
from image_training import Shuffled
from recipe_training import MeanLoss
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer

from rebnn_hf import ReBNNTrainer


class LoggedParts:
    """Gives a Trainer's logs the parts of the detector's loss beside their sum."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.part_sums: dict[str, torch.Tensor] = {}
        self.part_count = 0

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of the model, whose parts are remembered."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, part in outputs.losses.items():
            self.part_sums[name] = self.part_sums.get(name, 0) + part.detach()
        self.part_count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each part since the last log, over all processes."""
        if "loss" in logs:
            means = {name: total / self.part_count for name, total in self.part_sums.items()}
            logs = logs | {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            self.part_sums, self.part_count = {}, 0
        super().log(logs, start_time)


class DetectionTrainer(LoggedParts, Shuffled, MeanLoss, Trainer):
    """Trains a detector whose weights are float."""


class BinaryDetectionTrainer(LoggedParts, Shuffled, ReBNNTrainer):
    """Trains a detector whose backbone is 1-bit, under the balance rule."""


class _Pixels(Dataset):
    def __init__(self, images: Sequence[AnnotatedImage]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index].pixels()


@torch.no_grad()
def detect(
    model: PreTrainedModel, images: Sequence[AnnotatedImage], process: PartialState, workers: int = 0
) -> list[Detections]:
    """What a detector finds on each image, in their order; the processes share the work.

    Images go through the model one by one: what is found on one does not depend on the sizes of others.
    """
    model = model.to(process.device).eval()
    mine = list(range(process.process_index, len(images), process.num_processes))
    loader = DataLoader(_Pixels([images[index] for index in mine]), batch_size=None, num_workers=workers)
    found = []
    for index, pixels in zip(mine, loader, strict=True):
        (detections,) = model([pixels.to(process.device)]).detections
        found.append((index, {name: tensor.cpu().numpy() for name, tensor in detections.items()}))
    by_index = dict(gather_object(found) if process.num_processes > 1 else found)
    return [by_index[index] for index in range(len(images))]


def largest_difference(one: Sequence[Detections], other: Sequence[Detections]) -> float:
    """Largest difference between boxes (in pixels) and scores; infinity where other objects were found."""
    differences = [0.0]
    for first, second in zip(one, other, strict=True):
        if not np.array_equal(first["labels"], second["labels"]):
            return float("inf")
        differences += [float(np.abs(first[name] - second[name]).max(initial=0.0)) for name in ("boxes", "scores")]
    return max(differences)
