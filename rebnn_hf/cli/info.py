"""What a model holds; without one, what the engine is on this machine.

    rebnn info
    rebnn info runs/packed
    rebnn info runs/packed --json

Of a model: state, format and method, and of each module how many bits and bytes it takes, and why float ones are
float. Only its config is read. Without one: versions, the backend in force and why, instruction sets, threads.
"""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from .. import kernels
from ..auto_classes import class_of, saved_model_config
from ..config import ReBNNConfig
from ..kernels import cpu
from ..patching import prepare_for_loading, saved_config
from ..report import summary
from ..timing import cores
from .output import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub name of a model in any state")


def run(options: argparse.Namespace) -> bool:
    """Of the machine or of a model."""
    if options.model is None:
        show(options, *_machine())
    else:
        show(options, *_model(options.model))
    return True


def _machine() -> tuple[dict, str]:
    sets = cpu.instruction_sets() if cpu.available() else {}
    used = cpu.isa_name() if sets else None
    result = {
        "versions": {
            "rebnn_hf": version("rebnn_hf"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "backend": kernels.backend(),
        "backend_and_why": kernels.backend_and_why(),
        "instruction_sets": {name: _state(name, runs, used) for name, runs in sets.items()},
        "threads": torch.get_num_threads(),
        "cores": cores(),
    }
    names = {"python": "Python"}
    lines = [", ".join(f"{names.get(name, name)} {number}" for name, number in result["versions"].items())]
    lines.append(f"backend: {result['backend_and_why']}")
    if sets:
        found = (f"{name} ({state})" for name, state in result["instruction_sets"].items())
        lines.append(f"instruction sets: {', '.join(found)}")
    lines.append(f"threads: {result['threads']}, on {result['cores']} core(s)")
    return result, "\n".join(lines)


def _state(name: str, runs: bool, used: str | None) -> str:
    return "in use" if name == used and kernels.backend() == "cpu" else "runs here" if runs else "not on this CPU"


def _model(name: str) -> tuple[dict, str]:
    model = _skeleton(name)
    config, found = saved_config(model), summary(model)
    state = "float" if config is None else config.state
    files = sum(path.stat().st_size for path in Path(name).glob("*.safetensors")) if Path(name).is_dir() else None
    result = {
        "model": name,
        "class": type(model).__name__,
        "state": state,
        "format_version": None if config is None else config.format_version,
        "method": None if config is None else config.method(),
        "file_bytes": files,
        **found.to_dict(),
    }
    lines = [f"{name}: {type(model).__name__}, {state}"]
    if config is not None:
        lines[0] += f", format {config.format_version}"
        activations = "float" if config.activation == "none" else f"{config.activation}, {config.activation_bits}-bit"
        lines.append(f"weights 1-bit ({config.weight_scale}), activations {activations}, attention {config.attention}")
    if files is not None:
        lines.append(f"weights on disk: {files:,} bytes")
    return result, "\n".join([*lines, str(found)])


def _skeleton(name: str) -> PreTrainedModel:
    """The model without its numbers, on the meta device.

    Raises:
        ValueError: there is none, or it was quantized by something else.
    """
    config = saved_model_config(name)
    saved = getattr(config, "quantization_config", None)
    if saved and saved.get("quant_method") != "rebnn":
        raise ValueError(
            f"{name!r} was quantized by {saved.get('quant_method')!r}, of which this package knows nothing."
        )
    with torch.device("meta"):
        kind = class_of(config)
        model = AutoModel.from_config(config) if kind is AutoModel else kind(config)
        model.to(config.dtype or torch.float32)
    if saved:
        model.config.quantization_config = ReBNNConfig.from_dict(saved)
        prepare_for_loading(model, model.config.quantization_config)
    return model
