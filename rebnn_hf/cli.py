"""The command `rebnn`: what the engine is on this machine, and how fast a packed model is on it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version

import torch
import transformers

from . import kernels
from .benchmark import (
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
from .fusion import fuse
from .kernels import cpu
from .timing import check_threads, cores, table


def info(options: argparse.Namespace) -> None:
    """Versions, the backend in force and why, instruction sets, threads."""
    print(
        f"rebnn_hf {version('rebnn_hf')}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    print(f"backend: {backend_and_why()}")
    if cpu.available():
        used = cpu.isa_name()
        sets = (f"{name} ({_state(name, runs, used)})" for name, runs in cpu.instruction_sets().items())
        print(f"instruction sets: {', '.join(sets)}")
    print(f"threads: {torch.get_num_threads()}, on {cores()} core(s)")


def backend_and_why() -> str:
    """The backend in force, in words."""
    name = kernels.backend()
    if name == "cpu":
        return f"cpu, with {cpu.isa_name()}"
    asked = os.environ.get(kernels.ENVIRONMENT) == name
    return f"{name}, because {f'{kernels.ENVIRONMENT}={name}' if asked else cpu.why_not()}"


def _state(name: str, runs: bool, used: str) -> str:
    return "in use" if name == used and kernels.backend() == "cpu" else "runs here" if runs else "not on this CPU"


def bench(options: argparse.Namespace) -> None:
    """Times of a packed model beside those of float ones, on random tokens."""
    for number in options.threads:
        check_threads(number)
    model = load(options.model, packed=True)
    inputs = [random_inputs(model, batch, length) for batch in options.batch for length in options.length]
    twin = load(options.float, packed=False) if options.float else float_twin(model)
    check_twins(model, twin)
    print(f"{options.model}, backend {backend_and_why()}\n{describe(places(model, inputs[0]))}")
    packed, reason = {"packed": model}, fuse(model)
    if reason is None:
        packed["packed, layered"] = layered(model)
    else:
        print(f"not fused: {reason}")
    made = "random weights, which take as long as any: name the real one with --float"
    print(f"float model: {options.float or f'of the same config with {made}'}")
    if missing_for_onnx():
        print(f"ONNX Runtime is not run without {', '.join(missing_for_onnx())}: pip install 'rebnn_hf[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        floats = FloatModels(twin, folder)
        for batch in inputs:
            for number in options.threads:
                print(f"\n{table(race(packed, floats, batch, number, options.rounds))}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    result = argparse.ArgumentParser(prog="rebnn", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__, description=info.__doc__).set_defaults(run=info)
    command = commands.add_parser("bench", help=bench.__doc__, description=bench.__doc__)
    command.set_defaults(run=bench)
    command.add_argument("model", metavar="MODEL", help="folder or Hub name of a packed model")
    command.add_argument("--float", metavar="MODEL", help="the float model it was made from")
    command.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sizes of batches (default 1 8)")
    command.add_argument("--length", nargs="+", type=int, default=[32, 128], help="tokens in each (default 32 128)")
    command.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="numbers of threads")
    command.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 1 if it could not, with one sentence that says why."""
    options = parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        options.run(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"rebnn: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
