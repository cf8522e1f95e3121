"""Times of a packed model beside those of float ones, on random tokens or images.

    rebnn bench runs/packed
    rebnn bench runs/packed --float my-encoder --batch 1 8 --length 128 --threads 1 2
    rebnn bench runs/packed-vit --batch 1 --side 224

All take turns in one run, so that ratios hold on a busy machine. Without --float the float model has random weights,
which take as long as any. The packed model is timed as it runs and, where its encoder is one call, also layer by layer.
Where convolutions have most of the weights, torch has no int8 to compare with, and ONNX Runtime's is static.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..benchmark import FloatModels, describe, float_twin, layered, missing_for_onnx, places, race
from ..fusion import fuse
from ..inputs import image_sides, random_inputs, reads_images
from ..kernels import backend_and_why
from ..loading import check_twins, load
from ..timing import check_threads, table
from .output import show

LENGTHS = (32, 128)
"""Tokens in each text where none are asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="PACKED", help="folder or Hub name of a packed model")
    parser.add_argument("--float", metavar="MODEL", help="the float model it was made from")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sizes of batches (default 1 8)")
    parser.add_argument("--length", nargs="+", type=int, help="tokens in each text (default 32 128)")
    parser.add_argument(
        "--side", nargs="+", type=int, help="height and width of each image (default: what the model was made for)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")


def run(options: argparse.Namespace) -> bool:
    """Load, race, show; tables appear as they are finished, a JSON object at the end."""
    for number in options.threads:
        check_threads(number)
    model = load(options.model, "packed")
    sizes = _sizes(options, model)
    inputs = [random_inputs(model, batch, size) for batch in options.batch for size in sizes]
    twin = load(options.float, "float") if options.float else float_twin(model)
    check_twins(model, twin)
    where = places(model, inputs[0])
    packed, reason = {"packed": model}, fuse(model)
    if reason is None:
        packed["packed, layered"] = layered(model)
    if not options.json:
        print(_conditions(options, where, reason), flush=True)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        floats = FloatModels(twin, folder)
        for batch in inputs:
            for number in options.threads:
                tables.append(race(packed, floats, batch, number, options.rounds))
                if not options.json:
                    print(f"\n{table(tables[-1])}", flush=True)
    if options.json:
        rows = [row for rows in tables for row in rows]
        result = {
            "model": options.model,
            "backend": backend_and_why(),
            "places": where,
            "not_fused": reason,
            "rows": rows,
        }
        show(options, result, "")
    return True


def _sizes(options: argparse.Namespace, model: PreTrainedModel) -> Sequence[int | tuple[int, int]]:
    """How much each input holds: tokens, or the side of an image.

    Raises:
        ValueError: the option for the other kind of input was given.
    """
    if reads_images(model):
        if options.length is not None:
            raise ValueError(f"{type(model).__name__} reads images, which have no --length; give their --side.")
        return options.side or [image_sides(model)]
    if options.side is not None:
        raise ValueError(f"{type(model).__name__} does not read images, which have a --side; give a --length.")
    return options.length or LENGTHS


def _conditions(options: argparse.Namespace, where: dict[str, str], reason: str | None) -> str:
    lines = [f"{options.model}, backend {backend_and_why()}", describe(where)]
    if reason is not None:
        lines.append(f"not fused: {reason}")
    made = "random weights, which take as long as any: name the real one with --float"
    lines.append(f"float model: {options.float or f'of the same config with {made}'}")
    if missing_for_onnx():
        lines.append(f"ONNX Runtime is not run without {', '.join(missing_for_onnx())}: pip install 'rebnn_hf[bench]'")
    return "\n".join(lines)
