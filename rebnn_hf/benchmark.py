"""A packed model against what one could run in its place: torch in three precisions, and ONNX Runtime in two."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .architecture import encoder_of
from .fusion import fuse
from .hub import unguard
from .inputs import example_inputs, reads_images
from .insertion import replace_module
from .layers import LATENT_TYPES, PACKED_TYPES
from .timing import Contender, Row, compare, interleave, threads

BASELINES = ("torch fp32", "torch bf16", "torch int8", "ORT fp32", "ORT int8")
ONNX_PACKAGES = ("onnx", "onnxruntime")
CALIBRATION_BATCHES = 2
"""Of two images each, for static quantization."""


# What one could run instead


def float_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A float model of the same shape with random weights, which do not change how long it takes."""
    fields = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = type(model.config).from_dict(fields)
    unguard(config)
    twin = type(model)(config).eval()
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, LATENT_TYPES):  # of a class that is built of them (rebnn_hf.vision)
            replace_module(twin, name, layer.to_float())
    return twin


def missing_for_onnx() -> list[str]:
    """Packages without which ONNX Runtime is not measured."""
    return [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]


class FloatModels:
    """A float model as its users run it; fp32 is eager torch, without `torch.compile`.

    Args:
        model: float, in eval mode.
        folder: where its ONNX files go; those that are there already are used.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path):
        self.models = {"torch fp32": model, "torch bf16": copy.deepcopy(model).bfloat16()}
        if not mostly_convolutions(model):
            self.models["torch int8"] = torch_int8(model)
        self.files = {} if missing_for_onnx() else onnx_files(model, Path(folder))

    def contenders(self, inputs: Mapping[str, Tensor], number: int) -> list[Contender]:
        """All of them, with these inputs and so many threads."""
        eager = [Contender(name, partial(model, **_as_read(model, inputs))) for name, model in self.models.items()]
        return eager + [Contender(name, onnx_call(file, inputs, number)) for name, file in self.files.items()]


def _as_read(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with floats in the type of the model."""
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def mostly_convolutions(model: nn.Module) -> bool:
    """Whether convolutions have most of the weights; dynamic quantization is for linear layers."""
    convolutions, linears = (
        sum(module.weight.numel() for module in model.modules() if isinstance(module, kind))
        for kind in (nn.Conv2d, nn.Linear)
    )
    return convolutions > linears


def torch_int8(model: nn.Module) -> nn.Module:
    """Linear layers with int8 weights, and inputs that become int8 in every call."""
    with quiet():
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def onnx_files(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """The model for ONNX Runtime: float, and quantized to int8, as its documentation advises.

    That is dynamically, but statically where convolutions have most of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"ORT fp32": folder / "fp32.onnx", "ORT int8": folder / "int8.onnx"}
    with quiet():
        if not files["ORT fp32"].exists():
            trace(model, files["ORT fp32"])
        if not files["ORT int8"].exists():
            quantize = quantize_statically if mostly_convolutions(model) else quantize_dynamically
            quantize(model, files["ORT fp32"], files["ORT int8"])
    return files


def quantize_dynamically(model: PreTrainedModel, source: Path, target: Path) -> None:
    """Inputs become int8 in every call; the convolution that embeds patches of images stays float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul"] if reads_images(model) else None
    quantize_dynamic(source, target, op_types_to_quantize=kinds, weight_type=QuantType.QInt8)


def quantize_statically(model: PreTrainedModel, source: Path, target: Path) -> None:
    """Per channel, with scales of the inputs from a few random images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """Random ones, of the size that the model was made for."""

        def __init__(self):
            self.left = iter([example_inputs(model) for _ in range(CALIBRATION_BATCHES)])

        def get_next(self):
            images = next(self.left, None)
            return None if images is None else {name: x.numpy() for name, x in images.items()}

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, target, Images(), per_channel=True, **types)


class _FirstOutput(nn.Module):
    def __init__(self, model: PreTrainedModel, names: Iterable[str]):
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]


def trace(model: PreTrainedModel, path: Path) -> None:
    """Write an ONNX file for inputs of any batch and size, by tracing: its graphs run faster than those of `dynamo`."""
    inputs = example_inputs(model)
    free = {0: "batch", 2: "height", 3: "width"} if reads_images(model) else {0: "batch", 1: "length"}
    torch.onnx.export(
        _FirstOutput(model, inputs).eval(),
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        dynamic_axes=dict.fromkeys(inputs, free),
        dynamo=False,
    )


def onnx_call(path: Path, inputs: Mapping[str, Tensor], number: int) -> Callable[[], object]:
    """A call of ONNX Runtime on the CPU with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = number
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {name: tensor.numpy() for name, tensor in inputs.items()})


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that converters give."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# Ours


def layered(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a packed model that computes layer by layer."""
    model = copy.deepcopy(model)
    fuse(model, False)
    return model


class _Calls(TorchDispatchMode):
    """Which operators of the engine were called, and on which bits."""

    def __init__(self):
        super().__init__()
        self.bits: set[int] = set()
        self.encoders = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rebnn":
            self.encoders += function is torch.ops.rebnn.encoder.default
            self.bits.update(x.data_ptr() for x in args if isinstance(x, Tensor) and x.dtype == torch.uint8)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def places(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Run a packed model once and see where each linear, embedding and convolution layer was computed.

    Returns:
        By name: `fused`, inside the one call for the whole encoder; `engine`, in a call of its own; `reference`, 1-bit
        weights unpacked for torch; `float`, not a 1-bit layer.
    """
    with _Calls() as calls:
        model(**inputs)
    fused = set(encoder_of(model).modules()) if calls.encoders else ()
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PACKED_TYPES):
            called = layer.weight.data_ptr() in calls.bits
            result[name] = "fused" if layer in fused else "engine" if called else "reference"
        elif isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d):
            result[name] = "float"
    return result


PLACES = {
    "fused": "in one call of the engine",
    "engine": "by the engine, each in a call of its own",
    "reference": "1-bit, but unpacked for torch",
    "float": "float",
}


def describe(where: Mapping[str, str]) -> str:
    """What `places` found, in words: a line for each place, with a star for the numbers in names."""
    lines = []
    for place, words in PLACES.items():
        names = [name for name, found in where.items() if found == place]
        kinds = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)
        lines += [f"{len(names)} layer(s) {words}: {', '.join(kinds)}"] if names else []
    return "\n".join(lines)


# The race


def race(
    packed: Mapping[str, PreTrainedModel],
    floats: FloatModels,
    inputs: Mapping[str, Tensor],
    number: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Rows of one table in milliseconds: packed models by name, then the float ones, on the same inputs.

    Args:
        packed: in eval mode.
        floats: in all their forms.
        inputs: of all models.
        number: of threads.
        rounds: turns of each contender.
        clock: gives seconds.
    """
    ours = [Contender(name, partial(model, **inputs)) for name, model in packed.items()]
    with threads(number), torch.inference_mode():
        times = interleave(ours + floats.contenders(inputs, number), rounds, clock=clock)
    return [{**_size(inputs), "threads": number} | row for row in compare(times, BASELINES)]


def _size(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """The first column of a table: its head and what stands in it."""
    batch, *sizes = next(iter(inputs.values())).shape
    if "pixel_values" not in inputs:
        return {"batch x tokens": f"{batch} x {sizes[0]}"}
    _, height, width = sizes
    return {"batch x side": f"{batch} x {height}" if height == width else f"{batch} x {height} x {width}"}
