"""The GLUE metrics as an `evaluate` module that needs no download.

Load it with `evaluate.load("recipes/metrics/glue", "mrpc")`.
"""

from __future__ import annotations

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
          Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""
_DESCRIPTION = """\
The figures that GLUE reports for each of its tasks, computed with scikit-learn and scipy. Besides the nine
tasks there are "demo" (accuracy) and, for data of one's own, "classification" (accuracy) and "regression"
(Pearson and Spearman).
"""
_INPUTS = """
Args:
    predictions: Predicted class ids, or predicted scores for "stsb" and "regression".
    references: The true class ids or scores.

Returns:
    The metrics of the chosen configuration: "accuracy", "f1" (of class 1), "matthews_correlation", "pearson",
    "spearmanr". A correlation with a constant is undefined and counts as 0.0: it predicts nothing.
"""

# The metrics that GLUE reports per task (Wang et al. 2019, table 1).
CONFIGURATIONS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "demo": ("accuracy",),
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
}


def _f1(references: np.ndarray, predictions: np.ndarray) -> float:
    return f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0)


def _correlation(measure: Callable, references: np.ndarray, predictions: np.ndarray) -> float:
    """Returns the correlation, with 0.0 where one side is constant (0/0)."""
    if np.ptp(references) == 0.0 or np.ptp(predictions) == 0.0:
        return 0.0
    return measure(references, predictions).statistic


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": _f1,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: _correlation(pearsonr, references, predictions),
    "spearmanr": lambda references, predictions: _correlation(spearmanr, references, predictions),
}


class Glue(evaluate.Metric):
    """The GLUE metrics; the configuration name is the task."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(
                f"unknown configuration {self.config_name!r}: choose one of {', '.join(CONFIGURATIONS)}, "
                'as in evaluate.load(path, "mrpc")'
            )
        scores = "pearson" in CONFIGURATIONS[self.config_name]
        value = datasets.Value("float64" if scores else "int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        for name, values in (("predictions", predictions), ("references", references)):
            if not np.isfinite(values).all():
                raise ValueError(f"the {name} contain NaN or infinity: the model has probably diverged")
        metrics = CONFIGURATIONS[self.config_name]
        return {metric: float(_METRICS[metric](references, predictions)) for metric in metrics}
