"""Linear layers of the 1-bit engine against those of torch, one table for each shape and number of threads.

Shapes are tokens x outputs x inputs. `W1A1`, `W1A2`, `W1A4`: inputs become 1, 2 and 4 bits (elastic) in every call;
`W1A8 token`: int8 with a scale for each token; `W1A32`: they stay float. `W1A1 C` is the C function, rows `call` are
that function and checks in Python, rows `layer` the whole `PackedLinear(x)`. torch's int8 product (`_int_mm`) gets
inputs that are int8 already and leaves int32. T MAC/s are 10^12 multiply-accumulates per second. `1-bit ceiling` does
as many products of bits that stay in the first-level cache, without packing or results: the most that one-bit layers
can reach on this processor.

`--isa` instead compares, on W1A1 calls, the instruction sets that were compiled in and that this processor runs.

    python benchmarks/linear.py --threads 1 2
    python benchmarks/linear.py --threads 1 --isa
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rebnn_hf import kernels
from rebnn_hf.activations import ActivationRule
from rebnn_hf.binarizers import binarizer_of, engine_codes
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import PackedLinear
from rebnn_hf.packing import pack_signs
from rebnn_hf.timing import CLOCKS, Contender, Row, compare, environment, interleave, table, threads

SHAPES = ["128x768x768", "128x3072x768", "128x768x3072", "1x768x768", "32x1536x384", "4096x768x768"]
INPUTS = {
    "W1A1": ActivationRule("elastic", 1),
    "W1A2": ActivationRule("elastic", 2),
    "W1A4": ActivationRule("elastic", 4),
    "W1A8 token": ActivationRule("token", 8),
    "W1A32": ActivationRule(),
}
CEILING = "1-bit ceiling"
BASELINES = ("torch fp32", "torch bf16", "torch int8", CEILING)


def packed_layer(rule: ActivationRule, x: Tensor, outputs: int) -> PackedLinear:
    """A packed layer with random bits, and scales of its inputs found from x [N, M]."""
    inputs = x.shape[-1]
    layer = PackedLinear(inputs, outputs).requires_grad_(False).eval()
    layer.weight = pack_signs(torch.rand(outputs, inputs) < 0.5)
    layer.weight_scale.fill_(inputs**-0.5)
    layer.bias.zero_()
    layer.input_binarizer = binarizer_of(rule, inputs)
    if rule.kind == "elastic":
        layer.input_binarizer.calibrate(x)
        layer.input_binarizer.requires_grad_(False)
    return layer


def arguments_of(layer: PackedLinear) -> tuple:
    """What `cpu.linear` needs of a layer, beside inputs."""
    codes = engine_codes(layer.input_binarizer)
    scale = 1.0 if codes.scale is None else codes.scale.item()
    layout = layer.layout(codes.layout)
    return layout, layer.weight_scale, layer.bias, codes.kind, codes.width, codes.low, scale, codes.shift


def engine(x: Tensor, outputs: int) -> list[Contender]:
    """Layers with inputs of all kinds."""
    contenders = []
    for name, rule in INPUTS.items():
        layer = packed_layer(rule, x, outputs)
        if name == "W1A1":
            contenders.append(Contender("W1A1 C", cpu.prepare_linear(x, *arguments_of(layer))))
        if name != "W1A32":  # made of several calls
            contenders.append(Contender(f"{name} call", partial(cpu.linear, x, *arguments_of(layer))))
        contenders.append(Contender(f"{name} layer", partial(layer, x)))
    return contenders


def torch_linears(x: Tensor, outputs: int) -> list[Contender]:
    """What torch offers: float32, bfloat16, and int8 without quantization."""
    weight, bias = torch.randn(outputs, x.shape[-1]), torch.zeros(outputs)
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    x8, weight8 = (torch.randint(-127, 128, tensor.shape, dtype=torch.int8) for tensor in (x, weight))
    return [
        Contender("torch fp32", partial(F.linear, x, weight, bias)),
        Contender("torch bf16", partial(F.linear, *half)),
        Contender("torch int8", partial(torch._int_mm, x8, weight8.t())),
    ]


def instruction_sets(x: Tensor, outputs: int) -> list[Contender]:
    """The W1A1 call with each instruction set."""
    call = partial(cpu.linear, x, *arguments_of(packed_layer(INPUTS["W1A1"], x, outputs)))
    names = [name for name, runs in cpu.instruction_sets().items() if runs]
    return [Contender(name, call, partial(environment, **{cpu.ISA_ENVIRONMENT: name})) for name in names]


def measure(shape: str, number: int, rounds: int, isa: bool, clock: Callable[[], float]) -> list[Row]:
    """Rows of one table, times in microseconds."""
    tokens, outputs, inputs = map(int, shape.split("x"))
    x = torch.randn(tokens, inputs)
    products = tokens * outputs * inputs
    with threads(number), torch.inference_mode():
        ours = instruction_sets(x, outputs) if isa else engine(x, outputs)
        ceiling = Contender(CEILING, partial(cpu.ceiling, products))
        times = interleave([*ours, *torch_linears(x, outputs), ceiling], rounds, clock=clock)
    share = products / ceiling.call() / number  # it does some more, and on one thread
    times[CEILING] = [seconds * share for seconds in times[CEILING]]
    rows = compare(times, BASELINES, "us")
    rate = products / 1e6
    return [{"shape": shape, "threads": number} | row | {"T MAC/s": rate / row["median us"]} for row in rows]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints the tables and returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="tokens x outputs x inputs, e.g. 128x768x768")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default 15)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    parser.add_argument("--isa", action="store_true", help="compare the instruction sets")
    options = parser.parse_args(arguments)
    if kernels.backend() != "cpu":
        parser.error(f"the engine is not in use here: {cpu.why_not() or kernels.ENVIRONMENT + ' says so'}")
    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), engine {cpu.isa_name()}, "
        f"{options.rounds} interleaved rounds, {options.clock} time"
    )
    torch.manual_seed(0)
    rows = []
    for shape in options.shape:
        for number in options.threads:
            rows += (new := measure(shape, number, options.rounds, options.isa, CLOCKS[options.clock]))
            print(f"\n{table(new)}")
    return rows


if __name__ == "__main__":
    main()
