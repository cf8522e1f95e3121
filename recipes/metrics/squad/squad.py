"""Exact match and F1 of SQuAD v1.1 as an `evaluate` module that needs no download.

Load it with `evaluate.load("recipes/metrics/squad")`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import datasets
import evaluate

_CITATION = """\
@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2016}
}
"""
_DESCRIPTION = """\
The two figures that SQuAD v1.1 reports, in percent, over all questions. Texts are compared in lower case, without
ASCII punctuation, without the words "a", "an" and "the", and with single spaces.
"""
_INPUTS = """
Args:
    predictions: The answer to each question.
    references: For each question the texts that count as correct, at least one.

Returns:
    "exact_match": answers that equal a correct one. "f1": harmonic mean of precision and recall of the words,
    counted with their repetitions, against the correct text for which it is highest.
"""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """Returns the text in the form in which answers are compared.

    Punctuation goes first and leaves no gap: "a.m." becomes the word "am", and no article is seen in it.
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 for texts that are equal once normalized, otherwise 0."""
    return float(normalized(prediction) == normalized(reference))


def f1(prediction: str, reference: str) -> float:
    """Returns 2 P R / (P + R) = 2 common / (predicted + correct), in words; 0 without a common word."""
    predicted, correct = Counter(normalized(prediction).split()), Counter(normalized(reference).split())
    common = (predicted & correct).total()
    return 2 * common / (predicted.total() + correct.total()) if common else 0.0


class Squad(evaluate.Metric):
    """Exact match and F1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        for number, texts in enumerate(references):
            if not texts:
                raise ValueError(f"references[{number}] is empty: every question needs at least one correct text")
        return {
            "exact_match": _mean_percent(exact_match, predictions, references),
            "f1": _mean_percent(f1, predictions, references),
        }


def _mean_percent(measure: Callable[[str, str], float], predictions: list[str], references: list[list[str]]) -> float:
    best = (max(measure(text, one) for one in texts) for text, texts in zip(predictions, references, strict=True))
    return 100.0 * sum(best) / len(predictions)
