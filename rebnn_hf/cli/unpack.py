"""Turn a 1-bit model into a plain float one of the same answers: packed -> float.

    rebnn unpack runs/packed runs/float

For export, or for tools that know nothing of bits. Only where the activations are float: no plain model computes in
few bits.
"""

from __future__ import annotations

import argparse

from .. import patching
from ..loading import load
from ..report import summary
from .files import add_output, check_output, write
from .output import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="PACKED", help="folder or Hub name of a packed (or latent) model")
    add_output(parser)


def run(options: argparse.Namespace) -> bool:
    """Load, unpack, write."""
    check_output(options)
    model = patching.unpack(load(options.model, "packed", "latent"))
    totals = summary(model).totals
    came_along = write(model, options)
    text = f"{totals['bytes_now']:,} bytes of floats.\nWritten to {options.output}, {came_along}."
    show(options, {"output": options.output, "state": "float", **totals}, text)
    return True
