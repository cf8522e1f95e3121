"""The command line of `glue.py`: what is its own beside the options of every recipe of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glue_tasks import TASKS, GlueTask
from recipe_arguments import Arguments, option, parse_arguments


@dataclass
class GlueDataArguments:
    """What is learned."""

    _argument_group_name = "data"

    task: str | None = option(
        "a GLUE task, or `demo`, a small one that comes with this script; default: demo, without --train_file",
        choices=list(TASKS),
    )
    data_dir: str | None = option("folder with the GLUE files; without it they come from the Hub")
    train_file: str | None = option(
        "your training examples (.csv, .tsv, .json or .jsonl) with the columns `sentence1`, `sentence` or `text`, for "
        "pairs `sentence2`, and `label`; whole numbers and words are classes, numbers of which some have a decimal "
        "point mean regression"
    )
    validation_file: str | None = option("your validation examples, with the same columns and labels")
    test_file: str | None = option("your test examples, with `label` or without: predictions are written for them")
    max_length: int | None = option("longest input in tokens; default: the task's")
    max_train_samples: int | None = option("train on this many examples only (the first ones)")
    max_eval_samples: int | None = option("evaluate on this many examples only (the first ones)")

    def check(self) -> None:
        """Raises a ValueError where options contradict each other."""
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("--train_file and --validation_file belong together: pass both")
        if self.train_file is None and self.test_file is not None:
            raise ValueError("--test_file needs --train_file and --validation_file")
        if self.train_file is not None and (self.task is not None or self.data_dir is not None):
            raise ValueError("--train_file brings its own task: leave out --task and --data_dir")

    def fill_in(self, task: GlueTask) -> None:
        """Gives every option left out the default of `task`."""
        self.task = task.name
        self.max_length = task.max_length if self.max_length is None else self.max_length

    def settings(self) -> dict[str, Any]:
        """The options that shape the models; where the data lie does not."""
        return {"task": self.task, "max_length": self.max_length}

    def scoring(self) -> dict[str, Any]:
        """The options that shape the scores of the same models."""
        return {}


def parse_glue_arguments(argv: list[str] | None = None) -> Arguments:
    """Reads the command line; `Arguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    return parse_arguments(argv, GlueDataArguments)
