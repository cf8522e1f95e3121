"""Compare the answers of a packed model with those of the model it was made from.

    rebnn verify runs/packed runs/latent --texts sentences.txt
    rebnn verify runs/packed my-encoder --text "a film of rare beauty" --agreement 0.95
    rebnn verify runs/packed-vit runs/latent-vit --image photos/*.jpg

A text for a model of multiple choice is a question and its choices, with tabs between them.

Against the latent model all answers must be equal, and the outputs up to --tolerance: packing changes nothing. Against
the float model, from which training has moved it, answers are what counts. With few-bit activations the engine's
rounding may move an output more than that now and then; REBNN_BACKEND=reference rounds as the latent model does. Exit
code 1: they differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import BatchEncoding, BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import load_image

from ..inputs import longest
from ..loading import check_twins, load
from ..patching import saved_config
from ..verification import Agreement, agreement
from .files import processor_of
from .output import show

TOLERANCE = 1e-3
"""Of outputs against those of a latent model, where none is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="PACKED", help="folder or Hub name of a packed model")
    parser.add_argument("reference", metavar="REFERENCE", help="the latent or the float model it was made from")
    parser.add_argument("--text", nargs="+", default=[], metavar="TEXT", help="texts to read")
    parser.add_argument("--texts", metavar="FILE", help="a file with a text on each line")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images to look at")
    parser.add_argument("--tokenizer", metavar="NAME", help="default: that of PACKED")
    parser.add_argument(
        "--agreement", type=float, default=1.0, help="share of equal answers that is enough (default 1)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference of an output; default {TOLERANCE:g} against a latent model, any against a float one",
    )


def run(options: argparse.Namespace) -> bool:
    """Load both, let them read, compare."""
    texts = _texts(options)
    model, reference = load(options.model, "packed"), load(options.reference, "latent", "float")
    check_twins(model, reference)
    read = _images(options, model) if model.main_input_name == "pixel_values" else _tokens(options, model, texts)
    found = agreement(model, reference, read)
    tolerance = _tolerance(options, reference)
    failures = _failures(found, options.agreement, tolerance)
    result = {**found.to_dict(), "agreement": options.agreement, "tolerance": tolerance, "verified": not failures}
    show(options, result, f"{found}\n{'; '.join(failures) or 'Verified.'}")
    return not failures


def _texts(options: argparse.Namespace) -> list[str]:
    lines = Path(options.texts).read_text(encoding="utf-8").splitlines() if options.texts else []
    texts = [text for text in (*options.text, *lines) if text.strip()]
    if bool(texts) == bool(options.image):
        raise ValueError(
            "there is nothing to read, or two kinds of it; give texts with --text, a file of them with --texts, or, to "
            "a model of images, those with --image."
        )
    return texts


def _images(options: argparse.Namespace, model: PreTrainedModel) -> list[BatchFeature]:
    """Each image as the model sees it."""
    if not options.image:
        raise ValueError(f"{type(model).__name__} looks at images; give some with --image.")
    processor = processor_of(options.model)
    if processor is None:
        raise ValueError(f"{options.model} has no image processor that can be loaded here; save one there.")
    return [processor(images=load_image(file), return_tensors="pt") for file in options.image]


def _tokens(options: argparse.Namespace, model: PreTrainedModel, texts: list[str]) -> list[BatchEncoding]:
    """Each text, or question with its choices, as the model reads it."""
    if not texts:
        raise ValueError(f"{type(model).__name__} reads texts, and no images; give some with --text or --texts.")
    tokenizer = processor_of(options.tokenizer or options.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{options.tokenizer or options.model} has no tokenizer; name one with --tokenizer.")
    limits = {"truncation": True, "max_length": min(tokenizer.model_max_length, longest(model))}
    if not type(model).__name__.endswith("ForMultipleChoice"):
        return [tokenizer(text, return_tensors="pt", **limits) for text in texts]
    pairs = map(_question_and_choices, texts)
    read = (tokenizer(*pair, padding=True, return_tensors="pt", **limits) for pair in pairs)
    return [BatchEncoding({name: tensor.unsqueeze(0) for name, tensor in tokens.items()}) for tokens in read]


def _question_and_choices(text: str) -> tuple[list[str], list[str]]:
    """The question, once for each choice, and the choices."""
    question, *choices = text.split("\t")
    if len(choices) < 2:
        raise ValueError(
            f"{text!r} has {len(choices)} choices; for multiple choice a text is a question and two or more of them, "
            "with tabs between."
        )
    return [question] * len(choices), choices


def _tolerance(options: argparse.Namespace, reference: PreTrainedModel) -> float | None:
    if options.tolerance is None and saved_config(reference) is not None:
        return TOLERANCE
    return options.tolerance


def _failures(found: Agreement, share: float, tolerance: float | None) -> list[str]:
    failures = []
    if found.equal_answers is not None and found.equal_answers < share:
        failures.append(f"Not verified: {found.equal_answers:.2%} of the answers are equal, {share:.2%} were asked for")
    if tolerance is not None and not found.largest_difference <= tolerance:
        failures.append(f"Not verified: outputs differ by {found.largest_difference:.3g}, allowed are {tolerance:g}")
    return failures
