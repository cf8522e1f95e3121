"""What `glue.py` makes of a model's outputs: predictions, GLUE's metrics, and the files a submission takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import evaluate
import numpy as np
from glue_tasks import GlueTask, number_in
from transformers import EvalPrediction

METRIC_FOLDER = Path(__file__).resolve().parent / "metrics" / "glue"
SCORE_RANGE = (0.0, 5.0)  # of STS-B
MNLI_SUBMISSIONS = {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "test_diagnostic": "AX.tsv"}


def predictions_of(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Turns logits [N, classes], or [N] or [N, 1] for regression, into class ids or scores [N].

    Raises:
        ValueError: If a logit is NaN.
    """
    logits = np.asarray(logits)
    if np.isnan(logits).any():
        raise ValueError("the model's outputs contain NaN: it has diverged, try a lower learning rate")
    return logits.reshape(len(logits)) if task.is_regression else logits.argmax(-1)


def compute_metrics(task: GlueTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """Returns the function that the `Trainer` takes as `compute_metrics`: the GLUE metrics of `task`."""
    metric = evaluate.load(str(METRIC_FOLDER), task.metric_configuration, keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        # With hidden states or attentions switched on, the logits are the first of several outputs.
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return metric.compute(predictions=predictions_of(task, logits), references=prediction.label_ids)

    return compute


def submission_name(task: GlueTask, split: str = "test") -> str:
    """Returns the file name that gluebenchmark.com expects for a test split, such as `CoLA.tsv`."""
    if task.name == "mnli":
        return MNLI_SUBMISSIONS[split]
    return f"{task.folder or task.name}.tsv"


def write_submission(
    path: str | Path, task: GlueTask, indices: Sequence[int], predictions: Sequence[int] | Sequence[float]
) -> None:
    """Writes predictions in GLUE's submission form: tab-separated, with the header `index  prediction`.

    Args:
        path: The file to write.
        task: Decides the form: ids, names (MNLI, QNLI, RTE, custom classes) or STS-B scores cut to [0, 5].
        indices: The `index` column of the test split.
        predictions: Class ids, or scores for regression, as `predictions_of` returns them.

    Raises:
        ValueError: If the lengths differ or a prediction is no class id or no finite number.
    """
    if len(indices) != len(predictions):
        raise ValueError(f"got {len(predictions)} predictions for {len(indices)} indices")
    lines = ["index\tprediction"]
    for index, prediction in zip(indices, predictions, strict=True):
        lines.append(f"{int(index)}\t{_format_prediction(task, prediction)}")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _format_prediction(task: GlueTask, prediction: float) -> str:
    if task.labels is None:
        score = number_in(prediction)
        if score is None:
            raise ValueError(f"a predicted score must be a finite number, got {prediction!r}")
        if task.name == "stsb":
            score = min(max(score, SCORE_RANGE[0]), SCORE_RANGE[1])
        return f"{score:.3f}"
    if prediction not in range(len(task.labels)):
        raise ValueError(f"a class id must be one of 0 to {len(task.labels) - 1}, got {prediction!r}")
    label = int(prediction)
    return task.labels[label] if task.text_labels else str(label)
