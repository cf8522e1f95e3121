"""The models of `demo.py`, a float one and a packed one, and what they answer to a sentence, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from recipe_job import MODEL_FILES, load_pretrained
from recipe_report import model_bytes
from transformers import AutoTokenizer, PreTrainedModel, TextClassificationPipeline, pipeline

from rebnn_hf import kernels
from rebnn_hf.benchmark import PLACES, places
from rebnn_hf.inputs import longest, random_inputs
from rebnn_hf.loading import check_twins, load
from rebnn_hf.timing import Contender, interleave, quartiles

ROUNDS = 5
BACKENDS = {"cpu": "the C engine", "reference": "the reference in torch"}


@dataclass(frozen=True)
class Contestant:
    """A model that answers.

    Attributes:
        classify: the model with its tokenizer.
        bytes: of the file with its weights.
    """

    classify: TextClassificationPipeline
    bytes: int

    @property
    def model(self) -> PreTrainedModel:
        """Without its tokenizer."""
        return self.classify.model

    @property
    def truncation(self) -> dict[str, object]:
        """Options of the tokenizer, so that no text is too long."""
        return {"truncation": True, "max_length": min(self.classify.tokenizer.model_max_length, longest(self.model))}

    def scores(self, texts: Mapping[str, str]) -> dict[str, float]:
        """What `pipeline("text-classification")` makes of the logits, by label, the highest first.

        These are probabilities, or in regression the number that was predicted.
        """
        found = self.classify(dict(texts), top_k=None, **self.truncation)
        return {label["label"]: label["score"] for label in found}

    def contender(self, name: str, texts: Mapping[str, str]) -> Contender:
        """The model on these texts, to be timed; they are tokenized before."""
        tokens = self.classify.tokenizer(**texts, return_tensors="pt", **self.truncation)
        return Contender(name, partial(self.model, **tokens))


@dataclass(frozen=True)
class Contest:
    """A float model, the teacher, and the packed one that was made from it; both answer to the same texts."""

    teacher: Contestant
    packed: Contestant

    @property
    def smaller(self) -> float:
        """How many times smaller the packed file is."""
        return self.teacher.bytes / self.packed.bytes

    def answer(self, text: str, text_pair: str | None = None) -> Comparison:
        """What both predict, and how long each takes in turns that alternate.

        Args:
            text: a sentence, or the first one of a pair.
            text_pair: the second one.

        Raises:
            ValueError: the text is empty.
        """
        if not text.strip():
            raise ValueError("There is nothing to classify: type a sentence first.")
        texts = {"text": text, **({"text_pair": text_pair} if text_pair else {})}
        contestants = {"teacher": self.teacher, "packed": self.packed}
        with torch.inference_mode():
            seconds = interleave([model.contender(name, texts) for name, model in contestants.items()], ROUNDS)
        medians = {name: 1e3 * quartiles(times)[1] for name, times in seconds.items()}
        return Comparison(**{name: Answer(model.scores(texts), medians[name]) for name, model in contestants.items()})


@dataclass(frozen=True)
class Answer:
    """What a model predicts, and how long it takes.

    Attributes:
        scores: by label, the highest first.
        milliseconds: of the model alone, without the tokenizer; the median.
    """

    scores: dict[str, float]
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """The answers of both models to the same texts."""

    teacher: Answer
    packed: Answer

    @property
    def faster(self) -> float:
        """How many times as fast the packed model is."""
        return self.teacher.milliseconds / self.packed.milliseconds


def load_contest(float_name: str | Path, packed_name: str | Path) -> Contest:
    """Both models from folders or the Hub, on the CPU.

    Raises:
        ValueError: one is no text classifier, or of the wrong kind, or the two do not belong together.
        SystemExit: one cannot be found.
    """
    contest = Contest(load_contestant(float_name, packed=False), load_contestant(packed_name, packed=True))
    ours, theirs = contest.packed.model, contest.teacher.model
    check_twins(ours, theirs)
    if ours.config.id2label != theirs.config.id2label:
        raise ValueError(
            f"the float model has the labels {[*theirs.config.id2label.values()]} and the packed one "
            f"{[*ours.config.id2label.values()]}: pass the float model that the packed one was made from."
        )
    return contest


def load_contestant(name: str | Path, packed: bool) -> Contestant:
    """One model with its tokenizer."""
    name = str(name)
    folder = name if Path(name).is_dir() else load_pretrained(snapshot_download, name, allow_patterns=MODEL_FILES)
    model = load(folder, "packed" if packed else "float")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{name!r} is a {type(model).__name__}; the page shows text classifiers, ...ForSequenceClassification."
        )
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    return Contestant(classify, model_bytes(Path(folder)))


def who_computes(model: PreTrainedModel) -> str:
    """Whether the engine or the reference computes the 1-bit layers of a packed model, in a sentence."""
    counts = Counter(place for place in places(model, random_inputs(model, 1, 4)).values() if place != "float")
    layers = "; ".join(f"{count} layers {PLACES[place]}" for place, count in counts.items())
    engine = f"{BACKENDS[kernels.backend()]} (backend {kernels.backend_and_why()})"
    return f"The 1-bit layers are computed by {engine}: {layers}."


def how_measured() -> str:
    """What the times are, in a sentence."""
    number = torch.get_num_threads()
    threads = "1 thread" if number == 1 else f"{number} threads"
    return f"Times are medians of {ROUNDS} turns of each model, without the tokenizer, on {threads}."
