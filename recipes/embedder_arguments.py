"""The command line of `embedder.py`: its options, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from embedder_data import JUDGE, SOURCES, EmbedderTask
from recipe_arguments import (
    AdapterArguments,
    Arguments,
    AugmentationArguments,
    BinaryArguments,
    EncoderRunArguments,
    EncoderStudentArguments,
    option,
    parse_groups,
)

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class EmbedderDataArguments:
    """What is learned."""

    _argument_group_name = "data"

    tasks: list[str] = field(
        default_factory=lambda: [JUDGE],
        metadata={
            "help": f"GLUE tasks whose training sentences are learned from, without their labels; default: {JUDGE}",
            "nargs": "+",
            "choices": SOURCES,
        },
    )
    data_dir: str | None = option("folder with the GLUE files, STS-B among them; without it they come from the Hub")
    train_file: str | None = option("text file with a sentence per line to learn from, in place of --tasks")
    max_length: int | None = option(f"longest training sentence in tokens; default: {EmbedderTask.max_length}")
    max_train_samples: int | None = option("train on this many sentences only (the first ones)")
    max_eval_samples: int | None = option("evaluate on this many pairs only (the first ones)")

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if self.train_file is not None and self.tasks != [JUDGE]:
            raise ValueError("--train_file brings its own sentences: leave out --tasks")

    def settings(self) -> dict[str, Any]:
        """The options that shape the models; which sentences there are, the digest of the data tells."""
        return {"max_length": self.max_length}

    def scoring(self) -> dict[str, Any]:
        """The options that shape the scores of the same models."""
        return {}


@dataclass
class EmbedderTeacherArguments:
    """The float embedder, which is not trained any further."""

    _argument_group_name = "teacher"

    teacher: str = option("a sentence-transformers model (name or folder)", default=DEFAULT_EMBEDDER)

    @property
    def source(self) -> str:
        """Where model and tokenizer come from."""
        return self.teacher


@dataclass
class EmbedderStudentArguments(EncoderStudentArguments):
    """How the 1-bit student is distilled."""

    embedding_weight: float = option("weight of the loss on the embeddings of sentences", default=1.0)


@dataclass
class EmbedderArguments(Arguments):
    """The whole command line: `argv` as it was typed, and what it says."""

    data: EmbedderDataArguments
    teacher: EmbedderTeacherArguments
    student: EmbedderStudentArguments
    adapter: AdapterArguments = field(default_factory=AdapterArguments, init=False)  # none: it has no options here

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        super().check()
        if self.student.hidden_weight == 0:
            raise ValueError("--hidden_weight 0 leaves the token states without a teacher: make it greater than 0")

    def fill_in(self, task: EmbedderTask) -> None:
        """Gives every option left out the default of `task`."""
        student = self.student
        defaults = (
            (self.data, "max_length", task.max_length),
            (student, "learning_rate", task.student_learning_rate),
            (student, "epochs", task.student_epochs),
            (student, "batch_size", task.batch_size),
            (self.run, "output_dir", f"runs/{task.name}"),
        )
        for group, name, default in defaults:
            if getattr(group, name) is None:
                setattr(group, name, default)
        if student.activation_learning_rate is None:
            student.activation_learning_rate = 10 * student.learning_rate


def parse_embedder_arguments(argv: list[str] | None = None) -> EmbedderArguments:
    """Reads the command line; `EmbedderArguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    groups = (
        EmbedderDataArguments,
        EmbedderTeacherArguments,
        EmbedderStudentArguments,
        AugmentationArguments,
        BinaryArguments,
        EncoderRunArguments,
    )
    return parse_groups(EmbedderArguments, groups, argv)
