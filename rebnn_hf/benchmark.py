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
from .auto_classes import class_of, saved_model_config
from .fusion import fuse
from .layers import PACKED_TYPES
from .timing import Contender, Row, compare, interleave, threads

BASELINES = ("torch fp32", "torch bf16", "torch int8", "ORT fp32", "ORT int8")
ONNX_PACKAGES = ("onnx", "onnxruntime")


# The models


REMEDIES = {
    "packed": "`rebnn pack` makes one of a trained latent one",
    "latent": "`rebnn binarize` makes one of a float one",
    "float": "it is the one that `rebnn binarize` was given",
}
"""How to come by a model in a state."""


def load(name: str, *states: str) -> PreTrainedModel:
    """A model from a folder or the Hub, in eval mode, as the class that it was saved as.

    Args:
        name: folder, or name on the Hub.
        states: that will do: `float`, `latent`, `packed`.

    Raises:
        ValueError: there is none, or it is in another state.
    """
    config = saved_model_config(name)
    saved = getattr(config, "quantization_config", None) or {}
    ours = saved.get("quant_method") == "rebnn"
    state = saved.get("state") if ours else "quantized" if saved else "float"
    if state not in states:
        found = (
            f"quant_method={saved.get('quant_method')!r}, state={saved.get('state')!r}"
            if saved
            else "no quantization_config"
        )
        raise ValueError(
            f"{name!r} is not a {' or '.join(states)} model: its config has {found}; {REMEDIES[states[0]]}."
        )
    return class_of(config).from_pretrained(name).eval()


def longest(model: PreTrainedModel) -> int:
    """Tokens that a model can read at once."""
    return getattr(model.config, "max_position_embeddings", 2**31)


def float_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A float model of the same shape with random weights, which do not change how long it takes."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    return type(model)(type(model.config).from_dict(config)).eval()


def check_twins(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Refuse models that do not read the same tokens or do not have the same shape.

    Raises:
        ValueError: they differ.
    """
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = (getattr(m.config, key, None) for m in (model, other))
        if mine != theirs:
            raise ValueError(
                f"the float model has {key}={theirs!r} and the packed one {mine!r}: it was made from another."
            )


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding, int64 [batch, length].

    Raises:
        ValueError: the model does not read text, or not so much of it.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}; only models that read text can run here."
        )
    if batch < 1 or not 1 <= length <= longest(model):
        raise ValueError(
            f"{batch} x {length} tokens do not fit: the batch must be at least 1, the length 1 to {longest(model)}."
        )
    ids = torch.randint(model.config.vocab_size, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# What one could run instead


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
        self.models = {
            "torch fp32": model,
            "torch bf16": copy.deepcopy(model).bfloat16(),
            "torch int8": torch_int8(model),
        }
        self.files = {} if missing_for_onnx() else onnx_files(model, Path(folder))

    def contenders(self, inputs: Mapping[str, Tensor], number: int) -> list[Contender]:
        """All of them, with these inputs and so many threads."""
        eager = [Contender(name, partial(model, **inputs)) for name, model in self.models.items()]
        return eager + [Contender(name, onnx_call(file, inputs, number)) for name, file in self.files.items()]


def torch_int8(model: nn.Module) -> nn.Module:
    """Linear layers with int8 weights, and inputs that become int8 in every call."""
    with quiet():
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def onnx_files(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """The model for ONNX Runtime: float, and dynamically quantized to int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True, exist_ok=True)
    files = {"ORT fp32": folder / "fp32.onnx", "ORT int8": folder / "int8.onnx"}
    with quiet():
        if not files["ORT fp32"].exists():
            export_onnx(model, files["ORT fp32"])
        if not files["ORT int8"].exists():
            quantize_dynamic(files["ORT fp32"], files["ORT int8"], weight_type=QuantType.QInt8)
    return files


class _FirstOutput(nn.Module):
    def __init__(self, model: PreTrainedModel, names: Iterable[str]):
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]


def export_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write a model for inputs of any batch and length, by tracing: its graphs run faster than those of `dynamo`."""
    inputs = random_inputs(model, 2, min(16, longest(model)))
    torch.onnx.export(
        _FirstOutput(model, inputs).eval(),
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs},
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
    """Run a packed model once and see where each linear and embedding layer was computed.

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
        elif isinstance(layer, nn.Linear | nn.Embedding):
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
    batch, length = next(iter(inputs.values())).shape
    size = {"batch x tokens": f"{batch} x {length}", "threads": number}
    return [size | row for row in compare(times, BASELINES)]
