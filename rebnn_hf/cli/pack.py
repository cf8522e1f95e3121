"""Turn a trained latent model into bits: latent -> packed.

    rebnn pack runs/latent runs/packed
    rebnn pack runs/latent runs/packed --dtype float16

The packed folder is what AutoModel.from_pretrained loads after `import rebnn_hf`. Outputs stay the same; with --dtype
they stay the same but for its rounding, so score what you publish.
"""

from __future__ import annotations

import argparse

import torch

from .. import patching
from ..loading import load
from ..report import summary
from .files import add_output, check_output, write
from .output import show

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="LATENT", help="folder or Hub name of a trained latent model")
    add_output(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="type of all that is not bits; default: as it is")


def run(options: argparse.Namespace) -> bool:
    """Load, pack, write."""
    check_output(options)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = patching.pack(load(options.model, "latent"), dtype)
    totals = summary(model).totals
    came_along = write(model, options)
    text = (
        f"{totals['bytes_packed']:,} bytes of bits, scales and floats, {totals['ratio']:.1f} x less than in float32.\n"
        f"Written to {options.output}, {came_along}."
    )
    show(options, {"output": options.output, "state": "packed", **totals}, text)
    return True
