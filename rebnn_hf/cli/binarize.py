"""Make a float model 1-bit and trainable: float -> latent.

    rebnn binarize my-encoder runs/latent
    rebnn binarize my-encoder runs/latent --preset rebnn-bit-w1a1 --word-embeddings --pooler
    rebnn binarize my-encoder runs/latent --preset rebnn-bit-w1a1 --set activation_bits=4 ffn_activation=model
    rebnn binarize my-vit runs/latent --preset rebnn-elastic-w1a1

By default the linear layers of the encoder's blocks become 1-bit. The latent model has lost its accuracy until it is
trained, best against the float model as its teacher (ReBNNTrainer); then comes `rebnn pack`.

A preset is a set of fields of ReBNNConfig, and --set gives any of them another value: numbers, words, true, false,
null, lists as in JSON. `help(rebnn_hf.ReBNNConfig)` tells what they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import patching
from ..config import ReBNNConfig
from ..loading import load
from ..presets import CONFIGS
from ..report import summary
from .fields import parse, settable
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
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="fields",
        metavar="FIELD=VALUE",
        help=f"other values for fields of the preset, e.g. attention=softmax: {', '.join(settable())}",
    )


def run(options: argparse.Namespace) -> bool:
    """Load, binarize, write."""
    check_output(options)
    with _naming_the_option():
        config = ReBNNConfig.preset(options.preset, **_overrides(options))
    model = load(options.model, "float")
    with _naming_the_option():
        patching.binarize(model, config)
    totals = summary(model).totals
    came_along = write(model, options)
    result = {"output": options.output, "state": "latent", "preset": options.preset, "method": config.method()}
    result |= totals
    text = (
        f"{totals['binary_share']:.2%} of {totals['parameters']:,} parameters are 1-bit; packed it will take "
        f"{totals['bytes_packed']:,} bytes, {totals['ratio']:.1f} x less than in float32.\n"
        f"Written to {options.output}, {came_along}. Train it before you pack it."
    )
    show(options, result, text)
    return True


@contextmanager
def _naming_the_option() -> Iterator[None]:
    """Where the package speaks of fields in an error, add how to set them here."""
    try:
        yield
    except ValueError as error:
        if not any(f"{name}=" in str(error) for name in settable()):
            raise
        raise ValueError(f"{error} Fields are set with --set FIELD=VALUE.") from error


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of the config that are not those of the preset.

    Raises:
        ValueError: --set names no field, or one that another option gives already.
    """
    given = {name: True for name in SWITCHES if getattr(options, name)}
    if options.keep_float:
        given["modules_to_not_convert"] = options.keep_float
    fields = parse(options.fields)
    for name in given.keys() & fields.keys():
        raise ValueError(f"{name} is given twice: {given[name]!r} by an option of its own, {fields[name]!r} by --set.")
    return given | fields
