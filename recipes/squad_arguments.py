"""The command line of `squad.py`: what is its own beside the options of every recipe of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipe_arguments import Arguments, option, parse_arguments
from squad_data import SQUAD, SquadTask


@dataclass
class SquadDataArguments:
    """What is learned."""

    _argument_group_name = "data"

    train_file: str | None = option("training questions in the form of train-v1.1.json; without, from the Hub")
    validation_file: str | None = option("validation questions in the form of dev-v1.1.json")
    max_length: int | None = option(f"tokens of a window, question and context; default: {SQUAD.max_length}")
    stride: int = option("tokens of the context that neighbouring windows share", default=128)
    max_answer_length: int = option("longest answer in tokens", default=30)
    max_train_samples: int | None = option("train on this many questions only (the first ones)")
    max_eval_samples: int | None = option("evaluate on this many questions only (the first ones)")

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("--train_file and --validation_file belong together: pass both")

    def fill_in(self, task: SquadTask) -> None:
        """Gives every option left out the default of `task`."""
        self.max_length = task.max_length if self.max_length is None else self.max_length

    def settings(self) -> dict[str, Any]:
        """The options that shape the models; where the data lie does not."""
        return {"max_length": self.max_length, "stride": self.stride}

    def scoring(self) -> dict[str, Any]:
        """The options that shape the scores of the same models."""
        return {"max_answer_length": self.max_answer_length}


@dataclass
class SquadArguments(Arguments):
    """The whole command line: `argv` as it was typed, and what it says."""

    data: SquadDataArguments

    def partners(self) -> dict[str, tuple[bool, str]]:
        """What options need that do nothing alone, for `check_partners`, and whether it is there."""
        # The classes of starts and ends are tokens, which differ in number: ReBNNTrainer takes the mean over the batch.
        classes = "logits of classes; those of question answering are of tokens, always with the mean over the batch"
        return super().partners() | {"logits_reduction": (False, f"{classes}: leave it out")}


def parse_squad_arguments(argv: list[str] | None = None) -> SquadArguments:
    """Reads the command line; `Arguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    return parse_arguments(argv, SquadDataArguments, SquadArguments)
