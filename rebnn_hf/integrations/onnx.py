"""Packed models as ONNX files in which the bits stay bits.

The 1-bit work of a model is two operators of the domain `rebnn`, version 1:

- `UnpackSigns(bits) -> signs`, attribute `width` (M): uint8 [..., ceil(M / 8)] in the bit format (`docs/format.md`) to
  -1 and +1, float [..., M];
- `BinaryMatMul(codes, bits) -> product`, attributes `width` and `code_bits`: float [..., M] times the signs of uint8
  [O, ceil(M / 8)], `codes b^T` [..., O]. `code_bits` tells what the codes are: integers of so many bits (1: -1 and +1,
  or 0 and 1), or any floats (32).

The file carries their definitions in standard operators (ONNX functions), so that any runtime of torch's default opset
runs it without knowing them; one that has a kernel for them may use it instead. ONNX Runtime has none: it inlines the
definitions, unpacks the constant bits once while it loads, and multiplies floats. So the file is as small as the packed
checkpoint, but neither memory nor speed are those of 1 bit: that is what the engine is for.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..benchmark import quiet
from ..binarizers import channel_codes_of, codes_of
from ..flops import code_bits
from ..fusion import fuse
from ..inputs import example_inputs
from ..layers import PACKED_TYPES, PackedConv2d, PackedEmbedding, PackedLinear
from ..patching import saved_config

DOMAIN = "rebnn"
VERSION = 1
"""Of the operators in `DOMAIN`."""

PACKAGES = ("onnx", "onnxscript")
"""What writes ONNX files."""

UNPACK_SIGNS = """
<opset_import: ["" : {opset}], domain: "rebnn", doc_string: "Bits, least significant first, as -1 and +1.">
UnpackSigns <width> (bits) => (signs)
{{
    powers = Constant <value = uint8[8] {{1, 2, 4, 8, 16, 32, 64, 128}}> ()
    first = Constant <value = int64[1] {{0}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    bytes = Unsqueeze (bits, last)
    masked = BitwiseAnd (bytes, powers)
    set = Cast <to = 9> (masked)
    rows = Shape <end = -1> (bits)
    shape = Concat <axis = 0> (rows, last)
    flat = Reshape (set, shape)
    width = Constant <value_int: int = @width> ()
    stop = Reshape (width, last)
    used = Slice (flat, first, stop, last)
    plus = Constant <value = float {{1.0}}> ()
    minus = Constant <value = float {{-1.0}}> ()
    signs = Where (used, plus, minus)
}}
"""

BINARY_MATMUL = """
<opset_import: ["" : {opset}, "rebnn" : 1], domain: "rebnn", doc_string: "codes times signs, codes b^T.">
BinaryMatMul <width, code_bits> (codes, bits) => (product)
{{
    signs = rebnn.UnpackSigns <width: int = @width> (bits)
    columns = Transpose <perm = [1, 0]> (signs)
    product = MatMul (codes, columns)
}}
"""


def export_onnx(model: PreTrainedModel, path: str | Path, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Write a packed model as one ONNX file about as large as its packed checkpoint.

    What it computes is what the layers of the package compute, in float32 and up to its rounding; as with every change
    of rounding, an input of a few-bit activation that lies within it of a threshold may get the other code. The batch,
    and the length of inputs [batch, length], are free; other sizes are those of the example. For speed and memory see
    the head of this file. An unpacked model needs nothing of it: `torch.onnx.export`.

    Args:
        model: packed; it stays as it is.
        path: the file; it appears when it is complete.
        inputs: an example of what is passed as `model(**inputs)`, at least 2 x 2, and of which the names become those
            of the file's inputs, e.g. `tokenizer(["one", "and two"], padding=True, return_tensors="pt")`. Default:
            `input_ids` and `attention_mask`, or `pixel_values`.

    Raises:
        FileNotFoundError: there is no folder for the file.
        ImportError: `onnx` or `onnxscript` is missing.
        TypeError: not a transformers model.
        ValueError: not a packed model, or an example that is too small.

    Example:
        >>> rebnn_hf.export_onnx(model, "model.onnx", tokenizer(["one", "and two"], padding=True, return_tensors="pt"))
    """
    _check_model(model)
    _check_packages()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it before the export.")
    inputs = dict(inputs or example_inputs(model))
    _check_inputs(inputs)
    model = _with_symbols(model)
    with torch.no_grad(), quiet():
        outputs = [name for name, value in model(**inputs).items() if isinstance(value, Tensor)]
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={name: _free(tensor) for name, tensor in inputs.items()},
            dynamo=True,
            verbose=False,
        )
    _write(program.model_proto, path)


def _write(file, path: Path) -> None:
    """Add the definitions of our operators, check the whole and write it."""
    import onnx

    _forget_origins(file.graph)
    opset = next(entry.version for entry in file.opset_import if not entry.domain)
    file.functions.extend(onnx.parser.parse_function(f.format(opset=opset)) for f in (UNPACK_SIGNS, BINARY_MATMUL))
    onnx.checker.check_model(file, full_check=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        onnx.save(file, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _forget_origins(graph) -> None:
    """Leave out where in the source each node comes from: more bytes than the bits, and paths of this machine."""
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


# Checks


def _check_model(model) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"export_onnx() expects a transformers PreTrainedModel, got {type(model).__name__}.")
    config = saved_config(model)
    if config is None or config.state != "packed":
        state = "a float" if config is None else "a latent"
        remedy = "export it with torch.onnx.export" if config is None else "call rebnn_hf.pack(model) first"
        raise ValueError(f"export_onnx() expects a packed model, got {state} one; {remedy}.")


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx() needs {', '.join(missing)}: pip install 'rebnn_hf[onnx]'")
    if not hasattr(torch.onnx, "ops"):
        raise ImportError(f"export_onnx() needs torch 2.8 or newer; this is {torch.__version__}.")


def _check_inputs(inputs: Mapping[str, Tensor]) -> None:
    small = {name: tuple(x.shape) for name, x in inputs.items() if min(x.shape[: 1 + _is_text(x)], default=0) < 2}
    if small:
        raise ValueError(
            f"the example is too small to tell a free size from a fixed one: {small}; pass a batch of at least 2, with "
            "at least 2 tokens each."
        )


def _is_text(tensor: Tensor) -> bool:
    """Whether a tensor is [batch, length]."""
    return tensor.ndim == 2 and not tensor.is_floating_point()


def _free(tensor: Tensor) -> dict[int, str]:
    return {0: "batch", 1: "length"} if _is_text(tensor) else {0: "batch"}


# Layers as the file has them


def _with_symbols(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose packed layers call the operators of `DOMAIN`; those compute only in the file."""
    model = copy.deepcopy(model).eval()
    fuse(model, False)
    for layer in model.modules():
        if isinstance(layer, PACKED_TYPES):
            layer.forward = partial(_FORWARD[type(layer)], layer)
    return model


def _linear(layer: PackedLinear, x: Tensor) -> Tensor:
    codes, input_scale = codes_of(x.float(), layer.input_binarizer, torch.float32)
    bits = 32 if layer.input_binarizer is None else code_bits(layer.input_binarizer)
    shape = (*x.shape[:-1], layer.out_features)
    product = _symbol("BinaryMatMul", (codes, layer.weight), {"width": layer.in_features, "code_bits": bits}, shape)
    return _scaled(product, layer.weight_scale, input_scale, layer.bias).to(x.dtype)


def _conv2d(layer: PackedConv2d, x: Tensor) -> Tensor:
    codes, input_scale = channel_codes_of(x.float(), layer.input_binarizer, torch.float32)
    kernel = _signs(layer.weight, layer.width).view(layer.out_channels, -1, *layer.kernel_size)
    product = F.conv2d(codes, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    bias = None if layer.bias is None else layer.bias.view(-1, 1, 1)
    return _scaled(product, layer.weight_scale.view(-1, 1, 1), input_scale, bias).to(x.dtype)


def _embedding(layer: PackedEmbedding, indices: Tensor) -> Tensor:
    scale = F.embedding(indices, layer.weight_scale.unsqueeze(-1))
    return _signs(F.embedding(indices, layer.weight), layer.width).to(scale.dtype) * scale


_FORWARD = {PackedLinear: _linear, PackedConv2d: _conv2d, PackedEmbedding: _embedding}


def _scaled(product: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = weight_scale.float() if input_scale is None else weight_scale.float() * input_scale.float()
    return product * scale if bias is None else product * scale + bias.float()


def _signs(bits: Tensor, width: int) -> Tensor:
    return _symbol("UnpackSigns", (bits,), {"width": width}, (*bits.shape[:-1], width))


def _symbol(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, int], shape: tuple) -> Tensor:
    """A node of the file; the tensor it gives is float32, and empty of meaning outside an export."""
    described = {"dtype": torch.float32, "shape": shape, "version": VERSION}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, **described)
