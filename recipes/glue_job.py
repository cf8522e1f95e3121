"""A run of `glue.py`: its sentences or pairs, and what its models are scored by."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from datasets import Dataset, DatasetDict
from glue_files import custom_task, load_files
from glue_grammar import bag_of_words_accuracy, build_demo_tokenizer, demo_model_config
from glue_scores import compute_metrics, predictions_of, submission_name, write_submission
from glue_tasks import GlueTask, get_task, load_task
from recipe_arguments import Arguments
from recipe_job import Logits, TextJob, first, load_pretrained, tokenize
from recipe_training import predict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


class GlueJob(TextJob):
    """Sentences or pairs with one answer each."""

    script = "recipes/glue.py"
    auto_model = AutoModelForSequenceClassification
    pipeline_tag = "text-classification"
    adapter_task = "SEQ_CLS"
    usage = """\
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")"""

    @staticmethod
    def load_data(arguments: Arguments) -> tuple[GlueTask, DatasetDict]:
        """The task and its splits, with `sentence1`, for pairs `sentence2`, and `label`."""
        options = arguments.data
        try:
            if options.train_file is not None:
                data = load_files(options.train_file, options.validation_file, options.test_file)
                task = custom_task(data)
            else:
                task = get_task(options.task or "demo")
                data = load_task(task.name, options.data_dir)
        except (ValueError, OSError) as error:
            raise SystemExit(f"{error}") from None
        limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
        limits["validation_mismatched"] = options.max_eval_samples
        return task, DatasetDict({name: first(split, limits.get(name)) for name, split in data.items()})

    @staticmethod
    def load_tokenizer(arguments: Arguments, data: DatasetDict) -> PreTrainedTokenizerBase:
        """The tokenizer of the teacher, of the pretrained model, or the demo's own."""
        if arguments.teacher.source is None:
            return build_demo_tokenizer(list(data["train"]["sentence1"]))
        return load_pretrained(AutoTokenizer.from_pretrained, arguments.teacher.source)

    def new_teacher(self) -> PreTrainedModel:
        """The pretrained encoder with a new head; for the demo a small one from scratch."""
        if self.arguments.teacher.model_name_or_path is None:
            return AutoModelForSequenceClassification.from_config(demo_model_config(len(self.tokenizer)))
        return super().new_teacher()

    @cached_property
    def tokens(self) -> DatasetDict:
        """The data as token ids."""
        return self.tokenized(self.data)

    def tokenized(self, data: DatasetDict) -> DatasetDict:
        """Splits as token ids."""
        columns = list(self.task.sentence_columns)
        length = min(self.arguments.data.max_length, self.tokenizer.model_max_length)
        options = {"tokenizer": self.tokenizer, "columns": columns, "max_length": length}
        tokens = self.once_per_machine(
            lambda: data.map(tokenize, batched=True, fn_kwargs=options, remove_columns=columns)
        )
        return DatasetDict({name: _with_labels_column(split) for name, split in tokens.items()})

    def splits(self, kind: str) -> dict[str, Dataset]:
        """The splits `validation` or `test`, for MNLI with their mismatched twins."""
        return {name: split for name, split in self.tokens.items() if name.startswith(kind)}

    def validate(self, model: PreTrainedModel) -> Logits:
        """The logits of `model` on every validation split."""
        splits = self.splits("validation")
        return {name: predict(model, split, self.tokenizer, self.run.root) for name, split in splits.items()}

    def score(self, logits: Logits) -> dict[str, float]:
        """The metrics of the task, for MNLI's second split with `_mismatched` at the end of their names."""
        if not self.process.is_main_process:
            return {}
        compute = compute_metrics(self.task)
        scores = {}
        for name, values in logits.items():
            labels = np.asarray(self.tokens[name]["labels"])
            for metric, value in compute(EvalPrediction(values, labels)).items():
                scores[metric + name.removeprefix("validation")] = float(value)
        return scores

    def score_baselines(self) -> dict[str, dict[str, float]]:
        """The accuracy that counting words has on the demo."""
        return {"bag_of_words": {"accuracy": bag_of_words_accuracy(self.data)}} if self.task.name == "demo" else {}

    def submit(self, model: PreTrainedModel, logits: Logits) -> None:
        """Writes the predictions for the test splits in the form GLUE takes."""
        for name, split in self.splits("test").items():
            outputs = predict(model, split, self.tokenizer, self.run.root)
            if self.process.is_main_process:
                path = self.run.root / "predictions" / submission_name(self.task, name)
                path.parent.mkdir(exist_ok=True)
                write_submission(path, self.task, split["index"], predictions_of(self.task, outputs))


def _with_labels_column(split: Dataset) -> Dataset:
    return split.rename_column("label", "labels") if "label" in split.column_names else split
