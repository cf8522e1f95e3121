"""The C library of `csrc`, through ctypes: finds it, checks what Python gives it, and lets go of the GIL.

Every function takes contiguous CPU tensors; shapes and types that do not fit are a ValueError, never a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 3
WORDS, QUADS = 0, 1  # rebnn_layout
CODES = {"sign": 0, "levels": 1, "token": 2}  # rebnn_codes
CONV_CODES = ("sign", "levels")  # those of convolutions: a pixel has no scale of its own
ALIGNMENT = 64  # bytes, of layouts and images
HEADER_BYTES = 128  # of an encoder's image
ISA_ENVIRONMENT = "REBNN_ISA"
_MADV_PAGEOUT = 21  # of Linux 5.4 and later
_NAME = "librebnn.dylib" if sys.platform == "darwin" else "librebnn.so"
_STATUS = {1: "an argument is out of range", 2: "not enough memory"}


class _Input(ctypes.Structure):
    """rebnn_input."""

    _fields_ = (
        ("codes", c_int32),
        ("bits", c_int32),
        ("low", c_int32),
        ("scale", c_float),
        ("shift", c_void_p),
    )


class _Residual(ctypes.Structure):
    """rebnn_residual."""

    _fields_ = (("shortcut", c_void_p), ("shift_in", c_void_p), ("slope", c_void_p), ("shift_out", c_void_p))


_SIGNATURES = {
    "rebnn_abi_version": (c_int,),
    "rebnn_isa_name": (c_char_p, c_int),
    "rebnn_isa_runs": (c_int, c_char_p),
    "rebnn_isa_find": (c_void_p, c_char_p),
    "rebnn_layout_size": (c_int64, c_int, c_int64, c_int64),
    "rebnn_layout_fill": (c_int, c_int, c_int64, c_int64, c_void_p, c_void_p),
    "rebnn_encode": (c_int, c_void_p, c_int64, c_int64, c_void_p, POINTER(_Input), c_void_p, c_void_p),
    "rebnn_linear": (
        *(c_int, c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, POINTER(_Input)),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "rebnn_conv_layout_size": (c_int64, c_int, c_int64, c_int64, c_int64, c_int64),
    "rebnn_conv_layout_fill": (c_int, c_int, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "rebnn_conv2d": (
        *(c_int, c_void_p, c_int, *(c_int64,) * 11, c_void_p, POINTER(_Input), c_void_p, c_void_p, c_void_p),
        *(POINTER(_Residual), c_void_p),
    ),
    "rebnn_embedding": (c_int, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "rebnn_attention": (
        *(c_int, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
        *(c_void_p, c_void_p, c_float, c_float, c_void_p),
    ),
    "rebnn_balance_measure": (c_int, c_int, c_int64, c_int64, *(c_void_p,) * 5),
    "rebnn_balance_pull": (c_int, c_int, c_int64, c_int64, *(c_void_p,) * 5),
    "rebnn_balance_count": (c_int, c_int, c_int64, c_int64, *(c_void_p,) * 6),
    "rebnn_ceiling": (c_int64, c_void_p, c_int64),
    "rebnn_encoder": (c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p),
}
"""Result and arguments of the functions in rebnn.h."""


# The library


def _path() -> Path | None:
    from . import __path__ as folders  # two folders where an editable install keeps what was built elsewhere

    return next((path for folder in folders if (path := Path(folder) / _NAME).exists()), None)


@lru_cache
def _load() -> ctypes.CDLL | str:
    """The library, or in words why there is none."""
    path = _path()
    if path is None:
        return (
            f"{_NAME} was not built, because the package was installed without a C compiler; install one and reinstall."
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return f"{path} is from another version of rebnn_hf: it has no {name}; reinstall."
        function.restype, function.argtypes = result, arguments
    if library.rebnn_abi_version() != ABI_VERSION:
        return f"{path} is from another version of rebnn_hf (ABI {library.rebnn_abi_version()}); reinstall."
    return library


@torch.compiler.assume_constant_result  # what looks for the library cannot be traced
def available() -> bool:
    """Whether the library is there."""
    return not isinstance(_load(), str)


def why_not() -> str:
    """Why the library is not there; empty if it is."""
    library = _load()
    return library if isinstance(library, str) else ""


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the 1-bit engine is not available: {library}")
    return library


def instruction_sets() -> dict[str, bool]:
    """Names of the instruction sets compiled in, best first, and whether this CPU runs them."""
    library, names = _library(), []
    while (name := library.rebnn_isa_name(len(names))) is not None:
        names.append(name)
    return {name.decode(): bool(library.rebnn_isa_runs(name)) for name in names}


def give_back_memory() -> None:
    """Return freed memory to the system, after work that needed much of it once; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def put_aside(tensors: Iterable[Tensor]) -> None:
    """Tell the system that tensors will not be read soon. Nothing is lost: pages of a mapped file, as loading makes
    them, are read again when they are needed and take no memory until then; others stay, or go to swap."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or sys.platform != "linux":
        return
    runs: list[list[int]] = []  # neighbours together: the system keeps pages in groups
    for start, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu"):
        if runs and runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    for start, end in runs:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:  # a kernel that cannot do it says so, and all is as it was
            advise(c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


@lru_cache
def _isa(name: str | None) -> int:
    pointer = _library().rebnn_isa_find(None if name is None else name.encode())
    if pointer is None:
        known = ", ".join(f"{n}{'' if runs else ' (not on this CPU)'}" for n, runs in instruction_sets().items())
        raise RuntimeError(f"{ISA_ENVIRONMENT}={name!r} cannot be used; this build has {known}.")
    return pointer


def isa() -> int:
    """The kernels that `REBNN_ISA` names, by default the best of this CPU, as the library's pointer.

    Raises:
        RuntimeError: there are none of that name, or this CPU does not run them.
    """
    return _isa(os.environ.get(ISA_ENVIRONMENT) or None)


def isa_name() -> str:
    """The name of the instruction set in use."""
    chosen = os.environ.get(ISA_ENVIRONMENT)
    isa()
    return chosen or next(name for name, runs in instruction_sets().items() if runs)


def _done(status: int, function: str) -> None:
    if status == 2:
        raise MemoryError(f"{function}: not enough memory")
    if status:
        raise ValueError(f"{function}: {_STATUS.get(status, f'status {status}')}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _expect(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    if tensor is None:
        return
    if not (tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {shape} on the CPU, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}."
        )


def _aligned(buffer: Tensor) -> Tensor:
    """Itself, or a copy at an address that the kernels can read: buffers from files may begin anywhere."""
    return buffer.clone() if buffer.data_ptr() % ALIGNMENT else buffer


# What it computes


@lru_cache(maxsize=4096)
def _layout_size(kind: int, outputs: int, inputs: int) -> int:
    size = _library().rebnn_layout_size(kind, outputs, inputs)
    if size < 0:
        raise ValueError(f"no layout {kind} of {outputs} outputs and {inputs} inputs: out of range.")
    return size


def layout(bits: Tensor, inputs: int, kind: int) -> Tensor:
    """Signs in the order the kernels read them (`rebnn_layout_fill`), for products with M = `inputs`.

    Args:
        bits: uint8 [O, ceil(M / 8)], the bit format.
        inputs: M.
        kind: WORDS or QUADS.

    Returns:
        uint8 [bytes].
    """
    bits = bits.contiguous()
    _expect("bits", bits, torch.uint8, len(bits), (inputs + 7) // 8)
    result = torch.empty(_layout_size(kind, len(bits), inputs), dtype=torch.uint8)
    _done(_library().rebnn_layout_fill(kind, len(bits), inputs, _pointer(bits), _pointer(result)), "rebnn_layout_fill")
    return result


def _input(codes: str, width: int, low: int, scale: float, shift: Tensor | None, inputs: int) -> _Input:
    if codes not in CODES:
        raise ValueError(f"codes={codes!r} is unknown; expected one of {', '.join(CODES)}.")
    _expect("shift", shift, torch.float32, inputs)
    return _Input(CODES[codes], width, low, scale, _pointer(shift))


def encode(
    x: Tensor, codes: str, width: int, low: int = 0, scale: float = 1.0, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Codes of x float32 [N, M], minus `low` (`token`: plus 128): uint8 [N, M]; and of `token` the scales [N]."""
    _expect("x", x, torch.float32, *x.shape[:2])
    result = torch.empty(x.shape, dtype=torch.uint8)
    scales = torch.empty(len(x)) if codes == "token" else None
    described = _input(codes, width, low, scale, shift, x.shape[1])
    status = _library().rebnn_encode(isa(), *x.shape, _pointer(x), byref(described), _pointer(result), _pointer(scales))
    _done(status, "rebnn_encode")
    return result, scales


def linear(*arguments, **named) -> Tensor:
    """`prepare_linear`, called once."""
    return prepare_linear(*arguments, **named)()


def prepare_linear(
    x: Tensor,
    layout: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    codes: str,
    width: int,
    low: int = 0,
    scale: float = 1.0,
    shift: Tensor | None = None,
) -> Callable[[], Tensor]:
    """`rebnn_linear`, x float32 [N, M] -> float32 [N, O], with everything checked, to be called once or often: with
    what x holds then, into the same result."""
    _expect("x", x, torch.float32, *x.shape[:2])
    (rows, inputs), outputs = x.shape, len(weight_scale)
    _expect("weight_scale", weight_scale, torch.float32, outputs)
    _expect("bias", bias, torch.float32, outputs)
    _expect("layout", layout, torch.uint8, _layout_size(QUADS if width == 8 else WORDS, outputs, inputs))
    layout = _aligned(layout)
    described = _input(codes, width, low, scale, shift, inputs)
    y = torch.empty(rows, outputs)
    function, chosen, threads = _library().rebnn_linear, isa(), torch.get_num_threads()

    def call() -> Tensor:
        pointers = map(_pointer, (layout, weight_scale, bias, y))
        status = function(chosen, threads, rows, inputs, outputs, x.data_ptr(), byref(described), *pointers)
        _done(status, "rebnn_linear")
        return y

    return call


@lru_cache(maxsize=4096)
def _conv_layout_size(kind: int, outputs: int, channels: int, kernel_h: int, kernel_w: int) -> int:
    size = _library().rebnn_conv_layout_size(kind, outputs, channels, kernel_h, kernel_w)
    if size < 0:
        raise ValueError(
            f"no layout {kind} of {outputs} outputs, {channels} channels and a kernel of {kernel_h} x {kernel_w}: "
            "out of range."
        )
    return size


def _pair(name: str, values: Sequence[int], least: int) -> Sequence[int]:
    if len(values) != 2 or not least <= min(values) <= max(values) < 2**31:
        raise ValueError(f"{name} must be two integers, (height, width), of at least {least}, got {tuple(values)}.")
    return values


def conv_layout(bits: Tensor, channels: int, kernel: Sequence[int], kind: int) -> Tensor:
    """Signs of a convolution in the order the kernels read them (`rebnn_conv_layout_fill`).

    Args:
        bits: uint8 [O, ceil(C * kh * kw / 8)], the bit format; elements of a row in the order [C][kh][kw].
        channels: C.
        kernel: (kh, kw).
        kind: WORDS or QUADS.

    Returns:
        uint8 [bytes].
    """
    kernel = _pair("kernel", kernel, 1)
    bits = bits.contiguous()
    _expect("bits", bits, torch.uint8, *bits.shape[:1], (channels * kernel[0] * kernel[1] + 7) // 8)
    result = torch.empty(_conv_layout_size(kind, len(bits), channels, *kernel), dtype=torch.uint8)
    status = _library().rebnn_conv_layout_fill(kind, len(bits), channels, *kernel, _pointer(bits), _pointer(result))
    _done(status, "rebnn_conv_layout_fill")
    return result


def conv2d(*arguments, **named) -> Tensor:
    """`prepare_conv2d`, called once."""
    return prepare_conv2d(*arguments, **named)()


def prepare_conv2d(
    x: Tensor,
    layout: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    codes: str,
    width: int,
    low: int,
    scale: float,
    shift: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Sequence[Tensor] | None = None,
) -> Callable[[], Tensor]:
    """`rebnn_conv2d`, x float32 [N, C, H, W] -> float32 [N, O, H', W'], to be called as that of `prepare_linear`.

    H' = floor((H + 2 pad - kernel) / stride) + 1 and W' alike; layout of `conv_layout`, shift [C]; kernel, stride and
    padding (height, width); residual: shortcut [N, O, H', W'], and shift_in, slope and shift_out [O].
    """
    if x.ndim != 4:
        raise ValueError(f"x must be images [batch, channels, height, width], got a shape of {tuple(x.shape)}.")
    _expect("x", x, torch.float32, *x.shape)
    outputs = weight_scale.numel()
    _expect("weight_scale", weight_scale, torch.float32, outputs)
    _expect("bias", bias, torch.float32, outputs)
    kernel, stride, padding = _pair("kernel", kernel, 1), _pair("stride", stride, 1), _pair("padding", padding, 0)
    kind = QUADS if width == 8 else WORDS
    _expect("layout", layout, torch.uint8, _conv_layout_size(kind, outputs, x.shape[1], *kernel))
    if codes not in CONV_CODES:
        raise ValueError(f"codes={codes!r} are none of a convolution; expected one of {', '.join(CONV_CODES)}.")
    described = _input(codes, width, low, scale, shift, x.shape[1])
    rows = (x.shape[2] + 2 * padding[0] - kernel[0]) // stride[0] + 1
    columns = (x.shape[3] + 2 * padding[1] - kernel[1]) // stride[1] + 1
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a kernel of {tuple(kernel)} does not fit into {tuple(x.shape[2:])} with a padding of {tuple(padding)}."
        )
    layout = _aligned(layout)
    y = torch.empty(len(x), outputs, rows, columns)
    if residual is not None:
        _expect("shortcut", residual[0], torch.float32, *y.shape)
        for name, values in zip(("shift_in", "slope", "shift_out"), residual[1:], strict=True):
            _expect(name, values, torch.float32, outputs)
    follows = None if residual is None else byref(_Residual(*map(_pointer, residual)))
    function, chosen, threads = _library().rebnn_conv2d, isa(), torch.get_num_threads()
    sizes = (*x.shape, outputs, *kernel, *stride, *padding)

    def call() -> Tensor:
        tensors = map(_pointer, (layout, weight_scale, bias))
        status = function(chosen, threads, *sizes, x.data_ptr(), byref(described), *tensors, follows, _pointer(y))
        _done(status, "rebnn_conv2d")
        return y

    return call


def embedding(indices: Tensor, bits: Tensor, scale: Tensor, width: int) -> Tensor:
    """`rebnn_embedding`: int64 [N] -> float32 [N, width].

    Raises:
        IndexError: an index is out of range.
    """
    _expect("indices", indices, torch.int64, indices.numel())
    _expect("bits", bits, torch.uint8, len(bits), (width + 7) // 8)
    _expect("scale", scale, torch.float32, len(bits))
    y = torch.empty(len(indices), width)
    pointers = map(_pointer, (indices, bits, scale, y))
    status = _library().rebnn_embedding(torch.get_num_threads(), len(indices), len(bits), width, *pointers)
    if status == 1:
        raise IndexError(f"an index is out of range: the table has {len(bits)} rows.")
    _done(status, "rebnn_embedding")
    return y


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    threshold: float,
    scale: float,
) -> Tensor:
    """`rebnn_attention`: float32 [B, H, S, d] three times, mask bool [B, S], table float32 [d + 1] -> [B, S, H, d]."""
    batch, heads, length, head = query.shape
    for name, x in (("query", query), ("key", key), ("value", value)):
        _expect(name, x, torch.float32, batch, heads, length, head)
    mask = None if mask is None else mask.contiguous()
    _expect("mask", mask, torch.bool, batch, length)
    _expect("table", table, torch.float32, head + 1)
    context = torch.empty(batch, length, heads, head)
    sizes = (isa(), torch.get_num_threads(), batch, heads, length, head)
    pointers = map(_pointer, (query, key, value, mask, table))
    _done(_library().rebnn_attention(*sizes, *pointers, threshold, scale, _pointer(context)), "rebnn_attention")
    return context


def encoder(hidden: Tensor, mask: Tensor | None, image: Tensor) -> None:
    """`rebnn_encoder`, in place: hidden float32 [B, S, D], mask bool [B, S] or None, image uint8."""
    _expect("hidden", hidden, torch.float32, *hidden.shape[:3])
    mask = None if mask is None else mask.contiguous()
    _expect("mask", mask, torch.bool, *hidden.shape[:2])
    _expect("image", image, torch.uint8, image.numel())
    image = _aligned(image)
    width = image[:HEADER_BYTES].view(torch.int64)[3].item() if image.numel() >= HEADER_BYTES else None
    if width != hidden.shape[2]:
        raise ValueError(f"hidden has {hidden.shape[2]} features, and the image is of an encoder with {width}.")
    status = _library().rebnn_encoder(
        isa(),
        torch.get_num_threads(),
        *hidden.shape[:2],
        _pointer(mask),
        _pointer(image),
        image.numel(),
        _pointer(hidden),
    )
    _done(status, "rebnn_encoder")


def balance_measure(weight: Tensor, mean: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`rebnn_balance_measure`: float32 [O, M], [O] or None, [O, M] -> signs bool [O, M], largest gradients [O]."""
    _expect_rows(weight, mean=mean)
    _expect("gradient", gradient, torch.float32, *weight.shape)
    signs, largest = torch.empty(weight.shape, dtype=torch.bool), torch.empty(len(weight))
    _pass("rebnn_balance_measure", weight, mean, gradient, signs, largest)
    return signs, largest


def balance_pull(weight: Tensor, scale: Tensor, gamma: Tensor, gradient: Tensor) -> Tensor:
    """`rebnn_balance_pull`, in place of the gradient: float32 [O, M], [O], [O], [O, M] -> sums of |weight| [O]."""
    _expect_rows(weight, scale=scale, gamma=gamma)
    _expect("gradient", gradient, torch.float32, *weight.shape)
    norm = torch.empty(len(weight))
    _pass("rebnn_balance_pull", weight, scale, gamma, gradient, norm)
    return norm


def balance_count(weight: Tensor, mean: Tensor | None, signs: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rebnn_balance_count`, in place of the signs, bool [O, M]: -> how many flipped, how many of them back, int32 [O]
    both."""
    _expect_rows(weight, mean=mean)
    _expect("signs", signs, torch.bool, *weight.shape)
    _expect("earlier", earlier, torch.bool, *weight.shape)
    flips, flips_back = torch.empty(2, len(weight), dtype=torch.int32)
    _pass("rebnn_balance_count", weight, mean, signs, earlier, flips, flips_back)
    return flips, flips_back


def _expect_rows(weight: Tensor, **by_row: Tensor | None) -> None:
    _expect("weight", weight, torch.float32, *weight.shape[:2])
    for name, values in by_row.items():
        _expect(name, values, torch.float32, len(weight))


def _pass(name: str, weight: Tensor, *others: Tensor | None) -> None:
    """One of the passes of the balance rule over latent weights."""
    pointers = map(_pointer, (weight, *others))
    _done(getattr(_library(), name)(torch.get_num_threads(), *weight.shape, *pointers), name)


def ceiling(products: int) -> int:
    """`rebnn_ceiling`: at least so many 1-bit multiply-accumulates as fast as this CPU can; how many they were."""
    return _library().rebnn_ceiling(isa(), products)
