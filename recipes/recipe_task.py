"""What every recipe has to know of its task, and how to train on a task of texts by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every recipe has to know of its task.

    Attributes:
        name: A short one.
        title: The name for readers of the model card.
        labels: The names of the model's outputs in the order of their ids; None for regression.
        metrics: What is reported.
        main_metric: The one to compare models by; higher is better.
        language: Of the texts; None if unknown.
        hub_dataset: The data set on the Hub; None for data from elsewhere.
        hub_config: The configuration of that data set.
    """

    name: str
    title: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str
    language: str | None = None
    hub_dataset: str | None = None
    hub_config: str | None = None

    @property
    def num_labels(self) -> int:
        """How many outputs the model's head has: one for regression."""
        return 1 if self.labels is None else len(self.labels)


@dataclass(frozen=True)
class TrainingDefaults:
    """How to train on a task unless the command line says otherwise.

    Attributes:
        max_length: Tokens after which an example is cut.
        batch_size: Examples per step, for teacher and student.
        teacher_learning_rate: For fine-tuning the float model.
        teacher_epochs: For fine-tuning the float model.
        student_learning_rate: For the latent weights of the 1-bit student.
        student_epochs: For the distillation.
        teacher_runs: How many fine-tunings of the float model are averaged.
    """

    max_length: int
    batch_size: int
    teacher_learning_rate: float
    teacher_epochs: int
    student_learning_rate: float
    student_epochs: int
    teacher_runs: int = 1


@dataclass(frozen=True, kw_only=True)
class TextTask(TrainingDefaults, Task):
    """A task of texts, and how to train on it by default."""
