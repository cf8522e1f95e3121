"""Convolutions of the 1-bit engine against those of torch, one table for each layer and number of threads.

Layers are height x width x channels: kernels of 3 x 3, padding 1, as many channels out as in. `W1A1`, `W1A2`, `W1A4`
and `W1A8`: inputs become 1, 2, 4 and 8 bits in every call. `W1A1 C` is the C function, `W1A1 call` that function and
checks in Python, `W1A1 operator` all that a layer calls. `torch int8` is torch's quantized convolution (engine x86, 8
bits in and out), which gets inputs that are int8 already; it and `channels last` get images in the order that suits
them. T MAC/s are 10^12 multiply-accumulates per second, those of the padding counted in. `1-bit ceiling` does as many
products of bits that stay in the first-level cache, without packing or results: the most that 1-bit layers can reach on
this processor.

    python benchmarks/conv.py --threads 1 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rebnn_hf import kernels
from rebnn_hf.kernels import Codes, cpu
from rebnn_hf.packing import pack_signs
from rebnn_hf.timing import CLOCKS, Contender, Row, compare, interleave, table, threads

LAYERS = ["56x56x64", "28x28x128", "14x14x256", "7x7x512"]
INPUTS = {
    "W1A1": Codes("sign", 1),
    "W1A2": Codes("levels", 2, -2),
    "W1A4": Codes("levels", 4, -8),
    "W1A8": Codes("levels", 8, -128),
}
KERNEL, STRIDE, PADDING = GEOMETRY = (3, 3), (1, 1), (1, 1)
CEILING = "1-bit ceiling"
BASELINES = ("torch fp32", "torch fp32 channels last", "torch int8", CEILING)


def engine(x: Tensor, weight: Tensor) -> list[Contender]:
    """Convolutions of images [N, C, H, W] with the signs of weights [O, C, 3, 3], codes of all kinds."""
    bits, scale = pack_signs(weight.flatten(1) >= 0), weight.abs().mean((1, 2, 3))
    contenders = []
    for name, codes in INPUTS.items():
        layout = cpu.conv_layout(bits, x.shape[1], KERNEL, codes.layout)
        step = 1.0 if codes.kind == "sign" else 4 * 2.0**-codes.width  # codes reach from -2 to 2
        inputs = (codes.kind, codes.width, codes.low, step, None)
        arguments = (x, layout, scale, None, *inputs, *GEOMETRY)
        contenders.append(Contender(f"{name} C", cpu.prepare_conv2d(*arguments)))
        if name == "W1A1":
            contenders.append(Contender(f"{name} call", partial(cpu.conv2d, *arguments)))
            operator = partial(kernels.conv2d, x, bits, layout, scale, None, codes, *GEOMETRY)
            contenders.append(Contender(f"{name} operator", operator))
    return contenders


def torch_convolutions(x: Tensor, weight: Tensor) -> list[Contender]:
    """What torch offers: float32 in both orders of images, and int8 where torch was built with it."""
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (x, weight)]
    contenders = [
        Contender("torch fp32", partial(F.conv2d, x, weight, None, STRIDE, PADDING)),
        Contender("torch fp32 channels last", partial(F.conv2d, *last, None, STRIDE, PADDING)),
    ]
    if "x86" in torch.backends.quantized.supported_engines:
        contenders.append(Contender("torch int8", int8_convolution(*last)))
    return contenders


def int8_convolution(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """torch's quantized convolution, with scales that suit the numbers."""
    torch.backends.quantized.engine = "x86"
    scales = weight.abs().amax((1, 2, 3)).double() / 127
    x_scale, y_scale = (tensor.abs().max().item() / 127 for tensor in (x, F.conv2d(x, weight, None, STRIDE, PADDING)))
    x8 = torch.quantize_per_tensor(x, x_scale, 128, torch.quint8)
    weight8 = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.conv2d_prepack(weight8, None, STRIDE, PADDING, (1, 1), 1)
    return partial(torch.ops.quantized.conv2d, x8, packed, y_scale, 128)


def measure(layer: str, batch: int, number: int, rounds: int, clock: Callable[[], float]) -> list[Row]:
    """Rows of one table, times in microseconds."""
    height, width, channels = map(int, layer.split("x"))
    x = torch.randn(batch, channels, height, width)
    weight = torch.randn(channels, channels, *KERNEL) * (9 * channels) ** -0.5
    products = x.numel() * weight[0].numel()
    with threads(number), torch.inference_mode():
        ceiling = Contender(CEILING, partial(cpu.ceiling, products))
        times = interleave([*engine(x, weight), *torch_convolutions(x, weight), ceiling], rounds, clock=clock)
    share = products / ceiling.call() / number  # it does some more, and on one thread
    times[CEILING] = [seconds * share for seconds in times[CEILING]]
    rows = compare(times, BASELINES, "us")
    rate = products / 1e6
    return [{"layer": layer, "threads": number} | row | {"T MAC/s": rate / row["median us"]} for row in rows]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints the tables and returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", default=LAYERS, help="height x width x channels, e.g. 56x56x64")
    parser.add_argument("--batch", type=int, default=1, help="images in a call (default 1)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default 15)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    options = parser.parse_args(arguments)
    if kernels.backend() != "cpu":
        parser.error(f"the engine is not in use here: {cpu.why_not() or kernels.ENVIRONMENT + ' says so'}")
    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), engine {cpu.isa_name()}, "
        f"batch {options.batch}, {options.rounds} interleaved rounds, {options.clock} time"
    )
    torch.manual_seed(0)
    rows = []
    for layer in options.layer:
        for number in options.threads:
            rows += (new := measure(layer, options.batch, number, options.rounds, CLOCKS[options.clock]))
            print(f"\n{table(new)}")
    return rows


if __name__ == "__main__":
    main()
