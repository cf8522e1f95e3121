"""The local `evaluate` module of the recipe against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest

FOLDER = str(Path(__file__).parents[1] / "recipes" / "metrics" / "glue")


def compute(configuration: str, predictions: list, references: list) -> dict[str, float]:
    metric = evaluate.load(FOLDER, configuration, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


def test_accuracy_and_f1_of_the_paraphrase_tasks():
    # 2 true positives, 1 false positive, 1 false negative, 2 true negatives: F1 = 4 / (4 + 1 + 1).
    predictions, references = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    expected = {"accuracy": 4 / 6, "f1": 4 / 6}
    assert compute("mrpc", predictions, references) == pytest.approx(expected)
    # 1 true positive, 2 false positives, 0 false negatives, 1 true negative: F1 = 2 / (2 + 2).
    assert compute("qqp", [1, 1, 1, 0], [1, 0, 0, 0]) == pytest.approx({"accuracy": 0.5, "f1": 0.5})


def test_f1_is_that_of_class_one():
    assert compute("mrpc", [0, 0, 0, 1], [0, 0, 1, 0]) == {"accuracy": 0.5, "f1": 0.0}
    assert compute("mrpc", [0, 0, 0], [0, 0, 1]) == {"accuracy": pytest.approx(2 / 3), "f1": 0.0}


@pytest.mark.parametrize("task", ["sst2", "mnli", "qnli", "rte", "wnli", "demo", "classification"])
def test_accuracy_alone(task):
    assert compute(task, [0, 1, 2, 2], [0, 2, 2, 2]) == {"accuracy": 0.75}


def test_matthews_correlation():
    # TP 2, TN 1, FP 1, FN 0: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1) = 2 / sqrt(12).
    result = compute("cola", [1, 1, 1, 0], [1, 1, 0, 0])
    assert result == {"matthews_correlation": pytest.approx(2 / 12**0.5)}


def test_matthews_correlation_of_a_constant_prediction_is_zero():
    assert compute("cola", [1, 1, 1], [1, 0, 1]) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("task", ["stsb", "regression"])
def test_correlations(task):
    # Deviations (-1, 0, 1) and (-2, -1, 3): 5 / sqrt(2 * 14); the ranks agree exactly.
    result = compute(task, [1.0, 2.0, 3.0], [1.0, 2.0, 6.0])
    assert result == pytest.approx({"pearson": 5 / 28**0.5, "spearmanr": 1.0})


def test_spearman_gives_ties_their_mean_rank():
    # Ranks (1.5, 1.5, 3) and (1, 2, 3): deviations (-.5, -.5, 1) and (-1, 0, 1): 1.5 / sqrt(1.5 * 2).
    result = compute("stsb", [0.5, 0.5, 4.0], [1.0, 2.0, 3.0])
    assert result["spearmanr"] == pytest.approx(1.5 / 3**0.5)


@pytest.mark.parametrize(("predictions", "references"), [([2.5] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_correlation_with_a_constant_is_zero(predictions, references):
    assert compute("stsb", predictions, references) == {"pearson": 0.0, "spearmanr": 0.0}


def test_nan_is_an_error_and_not_a_score():
    with pytest.raises(ValueError, match="predictions contain NaN"):
        compute("stsb", [1.0, float("nan")], [1.0, 2.0])


@pytest.mark.parametrize("configuration", ["sst", None])
def test_unknown_configurations_list_the_known_ones(configuration):
    with pytest.raises(ValueError, match="choose one of cola, sst2, mrpc"):
        evaluate.load(FOLDER, configuration)
