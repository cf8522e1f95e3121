"""Times of a packed model beside those of float ones, on random tokens.

    rebnn bench runs/packed
    rebnn bench runs/packed --float my-encoder --batch 1 8 --length 128 --threads 1 2

All take turns in one run, so that ratios hold on a busy machine. Without --float the float model has random weights,
which take as long as any. The packed model is timed as it runs and, where its encoder is one call, also layer by layer.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from ..benchmark import (
    FloatModels,
    check_twins,
    describe,
    float_twin,
    layered,
    load,
    missing_for_onnx,
    places,
    race,
    random_inputs,
)
from ..fusion import fuse
from ..timing import check_threads, table
from .info import backend_and_why
from .output import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="PACKED", help="folder or Hub name of a packed model")
    parser.add_argument("--float", metavar="MODEL", help="the float model it was made from")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sizes of batches (default 1 8)")
    parser.add_argument("--length", nargs="+", type=int, default=[32, 128], help="tokens in each (default 32 128)")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")


def run(options: argparse.Namespace) -> bool:
    """Load, race, show; tables appear as they are finished, a JSON object at the end."""
    for number in options.threads:
        check_threads(number)
    model = load(options.model, "packed")
    inputs = [random_inputs(model, batch, length) for batch in options.batch for length in options.length]
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


def _conditions(options: argparse.Namespace, where: dict[str, str], reason: str | None) -> str:
    lines = [f"{options.model}, backend {backend_and_why()}", describe(where)]
    if reason is not None:
        lines.append(f"not fused: {reason}")
    made = "random weights, which take as long as any: name the real one with --float"
    lines.append(f"float model: {options.float or f'of the same config with {made}'}")
    if missing_for_onnx():
        lines.append(f"ONNX Runtime is not run without {', '.join(missing_for_onnx())}: pip install 'rebnn_hf[bench]'")
    return "\n".join(lines)
