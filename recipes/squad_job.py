"""A run of `squad.py`: its questions, the windows of their contexts, and what its models are scored by."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import evaluate
import numpy as np
from datasets import DatasetDict
from recipe_folder import write_json
from recipe_job import Logits, TextJob, first, load_pretrained
from recipe_training import predict_all
from squad_arguments import SquadArguments
from squad_data import SQUAD, SquadTask, custom_task, load_files, load_hub
from squad_windows import best_answers, check_tokenizer, training_windows, validation_windows
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

METRIC_FOLDER = Path(__file__).resolve().parent / "metrics" / "squad"


class SquadJob(TextJob):
    """Questions whose answers are spans of a text."""

    script = "recipes/squad.py"
    auto_model = AutoModelForQuestionAnswering
    pipeline_tag = "question-answering"
    adapter_task = None  # PEFT's class for question answering drops the token types, which tell question from context
    usage = """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

folder = "path/to/this/folder"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
inputs = tokenizer("Who wrote it?", "It was written by Ada.", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""

    @staticmethod
    def load_data(arguments: SquadArguments) -> tuple[SquadTask, DatasetDict]:
        """The questions with their contexts and answers."""
        options = arguments.data
        try:
            if options.train_file is None:
                task, data = SQUAD, load_hub()
            else:
                task, data = (
                    custom_task(options.validation_file),
                    load_files(options.train_file, options.validation_file),
                )
        except (ValueError, OSError) as error:
            raise SystemExit(f"{error}") from None
        limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
        return task, DatasetDict({name: first(split, limits[name]) for name, split in data.items()})

    @staticmethod
    def load_tokenizer(arguments: SquadArguments, data: DatasetDict) -> PreTrainedTokenizerBase:
        """The tokenizer of the teacher or of the pretrained model."""
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, arguments.teacher.source)
        try:
            check_tokenizer(tokenizer)
        except ValueError as error:
            raise SystemExit(f"{arguments.teacher.source} cannot be used: {error}") from None
        return tokenizer

    @cached_property
    def tokens(self) -> DatasetDict:
        """The windows of all questions: those to train on with answers, those to evaluate with offsets."""
        options = self.arguments.data
        length = min(options.max_length, self.tokenizer.model_max_length)
        how = {"tokenizer": self.tokenizer, "max_length": length, "stride": options.stride}
        shared = {"batched": True, "fn_kwargs": how, "remove_columns": self.data["train"].column_names}
        try:
            return self.once_per_machine(
                lambda: DatasetDict(
                    train=self.data["train"].map(training_windows, **shared),
                    validation=self.data["validation"].map(validation_windows, with_indices=True, **shared),
                )
            )
        except ValueError as error:  # a question without room for a context
            raise SystemExit(f"{error}") from None

    def validate(self, model: PreTrainedModel) -> Logits:
        """The logits of starts and ends `[windows, tokens]`, 0 behind the end of a window."""
        windows = self.tokens["validation"]
        starts, ends = predict_all(model, windows, self.tokenizer, self.run.root)
        lengths = np.array([len(ids) for ids in windows["input_ids"]])
        padding = np.arange(starts.shape[1]) >= lengths[:, None]
        return {"start": np.where(padding, 0, starts), "end": np.where(padding, 0, ends)}

    def score(self, logits: Logits) -> dict[str, float]:
        """Exact match and F1 in percent."""
        if not self.process.is_main_process:
            return {}
        references = [answers["text"] for answers in self.data["validation"]["answers"]]
        metric = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)
        return metric.compute(predictions=self.answers(logits), references=references)

    def submit(self, model: PreTrainedModel, logits: Logits) -> None:
        """Writes `predictions.json`, the form SQuAD's evaluation takes: the answer to each question by its id."""
        if self.process.is_main_process:
            answers = zip(self.data["validation"]["id"], self.answers(logits), strict=True)
            write_json(self.run.root / "predictions.json", dict(answers))

    def answers(self, logits: Logits) -> list[str]:
        """The text that answers each validation question."""
        windows, longest = self.tokens["validation"], self.arguments.data.max_answer_length
        return best_answers(self.data["validation"], windows, logits["start"], logits["end"], longest)
