"""Make a float model 1-bit and trainable: float -> latent.

    rebnn binarize my-encoder runs/latent
    rebnn binarize my-encoder runs/latent --preset rebnn-bit-w1a1 --word-embeddings --pooler

By default the linear layers of the encoder's blocks become 1-bit. The latent model has lost its accuracy until it is
trained, best against the float model as its teacher (ReBNNTrainer); then comes `rebnn pack`.
"""

from __future__ import annotations

import argparse

from .. import patching
from ..benchmark import load
from ..config import ReBNNConfig
from ..presets import CONFIGS
from ..report import summary
from .files import add_output, check_output, write
from .output import show

SWITCHES = ("word_embeddings", "pooler", "head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="FLOAT", help="folder or Hub name of a float model")
    add_output(parser)
    parser.add_argument(
        "--preset", default="rebnn-w1a32", choices=CONFIGS, metavar="NAME", help=f"the method: {', '.join(CONFIGS)}"
    )
    for name in SWITCHES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", action="store_true", help=f"the {name.replace('_', ' ')} too"
        )
    parser.add_argument("--keep-float", nargs="+", metavar="NAME", help="modules to leave float, e.g. layer.0")


def run(options: argparse.Namespace) -> bool:
    """Load, binarize, write."""
    check_output(options)
    switches = {name: True for name in SWITCHES if getattr(options, name)}
    config = ReBNNConfig.preset(options.preset, modules_to_not_convert=options.keep_float, **switches)
    model = patching.binarize(load(options.model, "float"), config)
    totals = summary(model).totals
    came_along = write(model, options)
    result = {"output": options.output, "state": "latent", "preset": options.preset, **totals}
    text = (
        f"{totals['binary_share']:.2%} of {totals['parameters']:,} parameters are 1-bit; packed it will take "
        f"{totals['bytes_packed']:,} bytes, {totals['ratio']:.1f} x less than in float32.\n"
        f"Written to {options.output}, {came_along}. Train it before you pack it."
    )
    show(options, result, text)
    return True
