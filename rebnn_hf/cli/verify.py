"""Compare the answers of a packed model with those of the model it was made from.

    rebnn verify runs/packed runs/latent --texts sentences.txt
    rebnn verify runs/packed my-encoder --text "a film of rare beauty" --agreement 0.95

Against the latent model all answers must be equal, and the outputs up to --tolerance: packing changes nothing. Against
the float model, from which training has moved it, answers are what counts. With few-bit activations the engine's
rounding may move an output more than that now and then; REBNN_BACKEND=reference rounds as the latent model does. Exit
code 1: they differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    tokenizer = processor_of(options.tokenizer or options.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{options.tokenizer or options.model} has no tokenizer; name one with --tokenizer.")
    model, reference = load(options.model, "packed"), load(options.reference, "latent", "float")
    check_twins(model, reference)
    length = min(tokenizer.model_max_length, longest(model))
    read = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in texts]
    found = agreement(model, reference, read)
    tolerance = _tolerance(options, reference)
    failures = _failures(found, options.agreement, tolerance)
    result = {**found.to_dict(), "agreement": options.agreement, "tolerance": tolerance, "verified": not failures}
    show(options, result, f"{found}\n{'; '.join(failures) or 'Verified.'}")
    return not failures


def _texts(options: argparse.Namespace) -> list[str]:
    lines = Path(options.texts).read_text(encoding="utf-8").splitlines() if options.texts else []
    texts = [text for text in (*options.text, *lines) if text.strip()]
    if not texts:
        raise ValueError("there is nothing to read; give texts with --text, or a file of them with --texts.")
    return texts


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
