"""The command `rebnn`: float models to 1-bit ones and back, what is in them, whether they are right, how fast they are.

    rebnn binarize FLOAT LATENT     float -> latent, to be trained (by ReBNNTrainer, or your own loop)
    rebnn pack LATENT PACKED        latent -> packed, one bit per weight, what is published
    rebnn verify PACKED LATENT ...  do both give the same answers?
    rebnn unpack PACKED FLOAT       packed -> a plain float model
    rebnn info [MODEL]              what a model holds; without one, what the engine is on this machine
    rebnn bench PACKED              its speed beside that of float models

Models are folders or names on the Hub; folders that are written appear when they are complete. Results go to standard
output, with --json as one JSON object; what went wrong goes to standard error, in one sentence. Exit codes: 0, done; 1,
`verify` found that the models differ; 2, it could not be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import transformers
from safetensors import SafetensorError

from . import bench, binarize, info, pack, unpack, verify

COMMANDS = (binarize, pack, verify, unpack, info, bench)

DIFFERENT, IMPOSSIBLE = 1, 2
"""Exit codes besides 0."""


def parser() -> argparse.ArgumentParser:
    """Of all commands: each is a file of this folder, whose head is its help."""
    result = argparse.ArgumentParser(
        prog="rebnn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        first, _, _ = command.__doc__.partition("\n")
        added = commands.add_parser(
            name, help=first, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(added)
        added.add_argument("--json", action="store_true", help="print the result as one JSON object")
        added.set_defaults(run=command.run)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code is 0, 1 if models were compared and differ, or 2 if it could not do its work."""
    options = parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        return 0 if options.run(options) else DIFFERENT
    except (ImportError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        print(f"rebnn: {' '.join(str(error).split())}", file=sys.stderr)
        return IMPOSSIBLE
