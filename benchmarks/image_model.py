"""A packed 1-bit image model end to end, against a float one of the same depth: torch and ONNX Runtime, fp32 and int8.

Random weights and images. int8 is ONNX Runtime's static quantization (per channel, calibrated on four images), the one
its documentation advises for convolutions; without the extra `bench` these two are left out.

    python benchmarks/image_model.py --model rebnn_resnet18 --float resnet18 --size 1x224

Needs the extra `vision`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import rebnn_hf.vision
from rebnn_hf.benchmark import missing_for_onnx, onnx_call, quiet
from rebnn_hf.kernels import backend, cpu
from rebnn_hf.timing import CLOCKS, Contender, Row, compare, interleave, table, threads

CALIBRATION_IMAGES = 4


def packed_model(name: str) -> nn.Module:
    """The packed network itself, without transformers' wrapper."""
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name)).eval()
    return rebnn_hf.pack(rebnn_hf.binarize(model)).timm_model


def onnx_files(model: nn.Module, size: int, folder: Path) -> dict[str, Path]:
    """The model for ONNX Runtime: float, and statically quantized to int8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """Random ones."""

        def __init__(self):
            self.left: Iterator[Tensor] = iter(torch.randn(CALIBRATION_IMAGES, 1, 3, size, size))

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"image": image.numpy()}

    files = {"ORT fp32": folder / "fp32.onnx", "ORT int8": folder / "int8.onnx"}
    with quiet():
        names = {"input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}
        torch.onnx.export(model, torch.randn(1, 3, size, size), files["ORT fp32"], dynamo=False, **names)
        quant_pre_process(files["ORT fp32"], folder / "prepared.onnx")
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(folder / "prepared.onnx", files["ORT int8"], Images(), per_channel=True, **types)
    return files


def measure(options: argparse.Namespace, batch: int, size: int, number: int, files: dict[str, Path]) -> list[Row]:
    """Rows of one table, in milliseconds."""
    image = torch.randn(batch, 3, size, size)
    last = image.contiguous(memory_format=torch.channels_last)
    plain, floats = packed_model(options.model), timm.create_model(options.float).eval()
    floats_last = timm.create_model(options.float).eval().to(memory_format=torch.channels_last)
    contenders = [
        Contender(options.model, partial(plain, image)),
        Contender("torch fp32", partial(floats, image)),
        Contender("torch fp32 channels last", partial(floats_last, last)),
        *(Contender(name, onnx_call(file, {"image": image}, number)) for name, file in files.items()),
    ]
    with threads(number), torch.inference_mode():
        times = interleave(contenders, options.rounds, clock=CLOCKS[options.clock])
    rows = compare(times, [contender.name for contender in contenders[1:]])
    return [{"batch x size": f"{batch} x {size}", "threads": number} | row for row in rows]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints the tables and returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rebnn_resnet18", help="1-bit, of rebnn_hf.vision (default rebnn_resnet18)")
    parser.add_argument("--float", default="resnet18", help="timm's name of the float model (default resnet18)")
    parser.add_argument("--size", nargs="+", default=["1x224"], help="batch x side of the images (default 1x224)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    options = parser.parse_args(arguments)
    engine = cpu.isa_name() if backend() == "cpu" else "not in use"
    print(f"torch {torch.__version__}, engine {engine}, {options.rounds} interleaved rounds, {options.clock} time")
    torch.manual_seed(0)
    rows = []
    for batch, size in (map(int, text.split("x")) for text in options.size):
        with tempfile.TemporaryDirectory() as folder:
            floats = timm.create_model(options.float).eval()
            files = {} if missing_for_onnx() else onnx_files(floats, size, Path(folder))
            for number in options.threads:
                rows += (new := measure(options, batch, size, number, files))
                print(f"\n{table(new)}", flush=True)
    return rows


if __name__ == "__main__":
    main()
