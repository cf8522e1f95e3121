"""Folders that commands write: they are complete or not there, and nothing is replaced unasked."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoProcessor, PreTrainedModel


def add_output(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that write a folder."""
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it holds a model")


def check_output(options: argparse.Namespace) -> None:
    """Refuse, before any work, a folder that is not to be written.

    Raises:
        ValueError: it exists and may not be replaced, does not hold a model, or is where the model comes from.
    """
    output = Path(options.output)
    if not output.exists():
        return
    if not options.overwrite:
        raise ValueError(f"{options.output} exists; give another folder, or --overwrite to replace it.")
    if not (output / "config.json").is_file():
        raise ValueError(f"{options.output} holds no config.json, so it is no model, and is not replaced.")
    source = Path(options.model).resolve()
    if output.resolve() in (source, *source.parents):
        raise ValueError(f"{options.output} is where the model comes from; give another folder.")


def write(model: PreTrainedModel, options: argparse.Namespace) -> str:
    """Save a model with the tokenizer or image processor of its source, beside its place first, then there.

    Returns:
        What came along, in words.
    """
    output = Path(options.output)
    processor = processor_of(options.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside:
        finished, replaced = Path(beside) / "finished", Path(beside) / "replaced"
        model.save_pretrained(finished)
        if processor is not None:
            processor.save_pretrained(finished)
        if output.exists():
            output.rename(replaced)
        finished.rename(output)
    return f"with its {type(processor).__name__}" if processor else f"without a tokenizer: {options.model} has none"


def processor_of(name: str):
    """The tokenizer or image processor saved with a model; None if there is none."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None
