"""1-bit convolutions of the engine against their formula, and what bad arguments do; the benchmark of them runs."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from operators import Recorded
from torch import nn
from torch.nn import functional as F

from rebnn_hf import kernels
from rebnn_hf.kernels import Codes, cpu
from rebnn_hf.packing import pack_signs

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
ISAS = [name for name, runs in cpu.instruction_sets().items() if runs] if cpu.available() else ["none"]
CODES = [  # kind, bits, low, with a shift
    *[("sign", 1, 0, False), ("sign", 1, 0, True), ("levels", 1, 0, True), ("levels", 1, -1, False)],
    *[("levels", 2, 0, True), ("levels", 2, -2, False), ("levels", 4, 0, False), ("levels", 4, -8, True)],
    *[("levels", 8, 0, True), ("levels", 8, -128, False)],
]
CHANNELS = [1, 3, 31, 64, 65, 130]
KERNELS = [(1, 1), (3, 3), (3, 1), (5, 5)]
STRIDES = [(1, 1), (2, 2), (2, 1)]
PADDINGS = [(0, 0), (1, 1), (2, 2), (1, 0)]
GEOMETRIES = list(itertools.product(KERNELS, STRIDES, PADDINGS))
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.5, -0.5]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param == "none":
        pytest.skip(cpu.why_not())
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, request.param)
    assert cpu.isa_name() == request.param
    return request.param


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def signs_of(outputs, channels, kernel, seed=0):
    return torch.rand(outputs, channels, *kernel, generator=generator(seed)) < 0.5


def images_of(batch, channels, height, width, scale, seed):
    """Normal numbers, a third of them exactly on thresholds or half-way between codes."""
    x = torch.randn(batch, channels, height, width, generator=generator(seed)) * 3 * scale
    ties = torch.randint(-9, 10, x.shape, generator=generator(seed + 1)) * (scale / 2)
    return torch.where(torch.rand(x.shape, generator=generator(seed + 2)) < 0.33, ties, x)


def codes_by_formula(x, kind, bits, low, scale, shift):
    """Codes as rebnn.h defines them, in float32 as it says; NaN is the lowest code."""
    value = x if shift is None else x + shift[:, None, None]
    if kind == "sign":
        return torch.where(value >= 0, 1.0, -1.0)
    highest = low + 2**bits - 1
    codes = (value / torch.tensor(scale) + 0.5).floor().nan_to_num(nan=low, posinf=highest, neginf=low)
    return codes.clamp(low, highest)


def product_by_formula(codes, signs, stride, padding):
    """Of codes, with zeros around them, and signs; exact."""
    return F.conv2d(codes.double(), torch.where(signs, 1.0, -1.0).double(), None, stride, padding)


def layout_of(signs, bits):
    kind = cpu.QUADS if bits == 8 else cpu.WORDS
    return cpu.conv_layout(pack_signs(signs.flatten(1)), signs.shape[1], signs.shape[2:], kind)


def check(x, signs, code, scale, stride, padding, seed=0):
    """Products are exact; results are rounded twice, as rebnn.h says."""
    kind, bits, low, shifted = code
    outputs, channels, *kernel = signs.shape
    shift = torch.randn(channels, generator=generator(seed)) if shifted else None
    product = product_by_formula(codes_by_formula(x, kind, bits, low, scale, shift), signs, stride, padding)
    layout, geometry = layout_of(signs, bits), (kernel, stride, padding)
    if kind == "sign":
        found = cpu.conv2d(x, layout, torch.ones(outputs), None, kind, bits, low, 1.0, shift, *geometry)
        assert torch.equal(found.double(), product), (x.shape, geometry)
    weight_scale = torch.rand(outputs, generator=generator(seed)) + 0.01
    bias = torch.randn(outputs, generator=generator(seed + 1))
    scaled = product.float() * (weight_scale * torch.tensor(scale))[:, None, None]
    for b, expected in ((None, scaled), (bias, scaled + bias[:, None, None])):
        found = cpu.conv2d(x, layout, weight_scale, b, kind, bits, low, scale, shift, *geometry)
        assert torch.equal(found, expected), (x.shape, geometry)


# Products


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_products_are_exact_and_results_have_two_roundings(isa, channels, kind, bits, low, shifted):
    for number, (kernel, stride, padding) in enumerate(GEOMETRIES):
        outputs = (1, 16, 17, 33, 5)[number % 5]
        x = images_of(1 + number % 2, channels, 5 + number % 3, 6 + number % 4, 0.3, number)
        check(x, signs_of(outputs, channels, kernel, number), (kind, bits, low, shifted), 0.3, stride, padding, number)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("width", [16, 33, 70])
def test_wide_images(isa, code, stride, width):
    """Rows longer than the 16 pixels that are computed together."""
    x = images_of(1, 66, 4, width * stride[1], 0.3, width)
    for padding in ((0, 0), (1, 1)):
        check(x, signs_of(18, 66, (2, 3)), code, 0.3, stride, padding)


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
def test_the_largest_sums(isa, kind, bits, low, shifted):
    """All codes at their largest or lowest, and all signs alike."""
    x = torch.full((1, 65, 6, 5), 1e6)
    x[..., :2] = -1e6
    signs = torch.ones(18, 65, 3, 3, dtype=torch.bool)
    signs[::2] = False
    check(x, signs, (kind, bits, low, shifted), 1.0, (1, 1), (1, 1))


@pytest.mark.parametrize("code", CODES)
def test_long_windows(isa, code):
    """More than 144 words: not all of them are multiplied three at a time."""
    x = images_of(1, 400, 5, 6, 0.3, 0)
    check(x, signs_of(10, 400, (5, 5)), code, 0.3, (1, 1), (1, 1))


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
def test_special_values(isa, kind, bits, low, shifted):
    """NaN is below every threshold, infinities and denormals are ordinary."""
    count = 3 * 9 * 11
    x = torch.tensor(SPECIAL * (count // len(SPECIAL))).view(1, 3, 9, 11)
    x = torch.cat([x, x.flip(3), x.nan_to_num(0, 1, -1)])
    check(x, signs_of(7, 3, (3, 3)), (kind, bits, low, shifted), 0.5, (1, 1), (1, 1))


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 3, 1, 1)])
def test_empty_batches_and_images(isa, shape, kind, bits, low, shifted):
    """Without channels or pixels, all that there is to multiply is padding."""
    signs = signs_of(6, shape[1], (3, 3))
    layout, bias = layout_of(signs, bits), torch.randn(6)
    shift = torch.randn(shape[1]) if shifted else None
    found = cpu.conv2d(
        torch.randn(shape), layout, torch.rand(6), bias, kind, bits, low, 1.0, shift, (3, 3), (1, 1), (2, 2)
    )
    assert found.shape == (shape[0], 6, shape[2] + 2, shape[3] + 2)
    if 0 in shape:
        assert torch.equal(found, bias[:, None, None].expand(found.shape))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_shortcut_and_rprelu_follow(isa, code, stride):
    """Every operation rounds, in the order of rebnn.h; special values go their ordinary way."""
    kind, bits, low, _ = code
    x, signs, geometry = images_of(2, 66, 5, 37, 0.3, 0), signs_of(19, 66, (3, 3)), ((3, 3), stride, (1, 1))
    weight_scale, bias, shift_in, slope, shift_out = torch.randn(5, 19, generator=generator(1))
    arguments = (x, layout_of(signs, bits), weight_scale, bias, kind, bits, low, 0.3, None, *geometry)
    y = cpu.conv2d(*arguments)
    shortcut = torch.randn(y.shape, generator=generator(2))
    shortcut.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    found = cpu.conv2d(*arguments, (shortcut, shift_in, slope, shift_out))
    z = y + shortcut + shift_in[:, None, None]
    expected = torch.where(z > 0, z, slope[:, None, None] * z) + shift_out[:, None, None]
    assert torch.equal(found.nan_to_num(7e37), expected.nan_to_num(7e37))


@needs_library
@pytest.mark.parametrize("wrong", range(4))
def test_a_residual_of_another_shape_is_an_error(wrong):
    arguments = (torch.randn(1, 3, 5, 5), layout_of(signs_of(4, 3, (3, 3)), 1), torch.ones(4), None)
    residual = [torch.randn(1, 4, 3, 3), *torch.randn(3, 4)]
    residual[wrong] = residual[wrong][..., 1:]
    name = ("shortcut", "shift_in", "slope", "shift_out")[wrong]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        cpu.conv2d(*arguments, "sign", 1, 0, 1.0, None, (3, 3), (1, 1), (0, 0), residual)


@needs_library
def test_no_outputs():
    layout = layout_of(signs_of(0, 3, (3, 3)), 1)
    nothing = torch.empty(0)
    found = cpu.conv2d(
        torch.randn(2, 3, 5, 5), layout, nothing, nothing, "sign", 1, 0, 1.0, None, (3, 3), (1, 1), (0, 0)
    )
    assert found.shape == (2, 0, 3, 3)


@needs_library
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data(), isa=st.sampled_from(ISAS), code=st.sampled_from(CODES), seed=st.integers(0, 1000))
def test_products_of_any_geometry(data, isa, code, seed):
    number = lambda name, least, most: data.draw(st.integers(least, most), name)  # noqa: E731
    kernel, stride, padding, size = [], [], [], []
    for name in ("height", "width"):
        kernel.append(number(f"kernel {name}", 1, 6))
        stride.append(number(f"stride {name}", 1, 7))
        padding.append(number(f"padding {name}", 0, 7))
        size.append(number(name, max(1, kernel[-1] - 2 * padding[-1]), 40))
    channels, outputs = number("channels", 1, 150), number("outputs", 1, 40)
    x = images_of(number("batch", 1, 3), channels, *size, 0.5, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ISA_ENVIRONMENT, isa)
        check(x, signs_of(outputs, channels, kernel, seed), code, 0.5, stride, padding, seed)


@needs_library
@pytest.mark.parametrize("code", [CODES[1], CODES[4], CODES[7], CODES[8]])
def test_threads_give_equal_results(code):
    """Large enough to be split, in the middle of rows and of images; fewer rows than threads too."""
    for batch, height, width in ((3, 21, 23), (1, 1, 900), (2, 300, 1)):
        x, signs = images_of(batch, 65, height, width, 0.4, 0), signs_of(70, 65, (3, 3))
        assert x[:, 0].numel() * signs.numel() * code[1] >= 2**24, "below, one thread computes everything"
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            check(x, signs, code, 0.4, (1, 1), (1, 1))


@needs_library
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind, multiple", [(cpu.WORDS, 64), (cpu.QUADS, 4)])
def test_layout_is_the_documented_order(channels, kernel, kind, multiple):
    """That of a linear layer whose inputs are positions, each with its channels and -1 behind them."""
    signs = signs_of(19, channels, kernel)
    rows = torch.zeros(19, *kernel, -(-channels // multiple) * multiple, dtype=torch.bool)
    rows[..., :channels] = signs.permute(0, 2, 3, 1)
    rows = rows.flatten(1)
    expected = cpu.layout(pack_signs(rows), rows.shape[1], kind)
    assert torch.equal(cpu.conv_layout(pack_signs(signs.flatten(1)), channels, kernel, kind), expected)


# Operator


def arguments(code=("levels", 2, -2, True), **changes):
    """Arguments of the operator that fit: 5 channels to 6, a kernel of 3 x 2."""
    kind, bits, low, shifted = code
    signs = signs_of(6, 5, (3, 2))
    good = {
        "x": torch.randn(2, 5, 7, 8, generator=generator(0)),
        "bits": pack_signs(signs.flatten(1)),
        "layout": layout_of(signs, bits),
        "weight_scale": torch.rand(6, generator=generator(1)),
        "bias": torch.rand(6, generator=generator(2)),
        "codes": kind,
        "width": bits,
        "low": low,
        "input_scale": torch.tensor([0.4]),
        "shift": torch.randn(5, generator=generator(3)) if shifted else None,
        "kernel": [3, 2],
        "stride": [2, 1],
        "padding": [1, 0],
        "residual": None,
    }
    assert set(changes) <= set(good)
    return good | changes


def call(**changes):
    return torch.ops.rebnn.conv2d(**arguments(**changes))


@needs_library
@pytest.mark.parametrize("code", CODES)
def test_conv2d_is_a_proper_operator(code):
    torch.library.opcheck(torch.ops.rebnn.conv2d.default, tuple(arguments(code).values()))
    unit = arguments(code, residual=[torch.randn(2, 6, 4, 7), *torch.randn(3, 6)])
    torch.library.opcheck(torch.ops.rebnn.conv2d.default, tuple(unit.values()))
    half = arguments(code, x=torch.randn(0, 5, 7, 8).bfloat16(), layout=None, bias=None, input_scale=None)
    torch.library.opcheck(torch.ops.rebnn.conv2d.default, tuple(half.values()))


@needs_library
def test_conv2d_is_the_call_of_the_library():
    given = arguments()
    codes = Codes("levels", 2, -2, given["input_scale"], given["shift"])
    geometry = given["kernel"], given["stride"], given["padding"]
    tensors = given["x"], given["bits"], given["layout"], given["weight_scale"], given["bias"]
    with Recorded() as ops:
        found = kernels.conv2d(*tensors, codes, *geometry)
    assert ops.names == ["rebnn::conv2d"]
    scale = given["input_scale"].item()
    shifted = codes_by_formula(given["x"], "levels", 2, -2, scale, codes.shift)
    signs = signs_of(6, 5, (3, 2))
    product = product_by_formula(shifted, signs, *geometry[1:]).float()
    factor = (given["weight_scale"] * scale)[:, None, None]
    assert torch.equal(found, product * factor + given["bias"][:, None, None])


@needs_library
def test_conv2d_makes_its_own_layout():
    for code in (CODES[0], CODES[6], CODES[8]):
        found, expected = (torch.ops.rebnn.conv2d(**arguments(code, **c)) for c in ({"layout": None}, {}))
        assert torch.equal(found, expected)
    assert torch.equal(call(input_scale=None), call(input_scale=torch.ones(1)))
    assert torch.equal(call(bias=None), call(bias=torch.zeros(6)))
    assert torch.equal(call(shift=None), call(shift=torch.zeros(5)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    names = ("x", "weight_scale", "bias", "shift", "input_scale")
    half = {name: arguments()[name].to(dtype) for name in names}
    found = call(**half)
    assert found.dtype == dtype
    assert torch.equal(found, call(**{name: tensor.float() for name, tensor in half.items()}).to(dtype))


@needs_library
def test_inputs_that_are_not_contiguous():
    x, expected = arguments()["x"], call()
    large = torch.randn(4, 10, 7, 16)
    large[::2, ::2, :, ::2] = x
    shift = torch.stack([arguments()["shift"]] * 2, 1)[:, 0]
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, large[::2, ::2, :, ::2]):
        assert not other.is_contiguous()
        found = call(x=other, shift=shift)
        assert torch.equal(found, expected) and found.is_contiguous()
    same = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(call(x=same), call(x=same.contiguous()))


@needs_library
def test_layouts_may_stand_anywhere():
    layout, expected = arguments()["layout"], call()
    for offset in (1, 4, 8, 32):
        moved = torch.empty(len(layout) + offset, dtype=torch.uint8)[offset:].copy_(layout)
        assert torch.equal(call(layout=moved), expected)


@needs_library
@pytest.mark.parametrize("kernel, stride, padding", GEOMETRIES)
def test_shapes_are_known_without_computing(kernel, stride, padding):
    for height, width in ((5, 6), (9, 5), (32, 33)):
        x = torch.empty(2, 3, height, width, device="meta", dtype=torch.half)
        bits = torch.empty(4, (3 * kernel[0] * kernel[1] + 7) // 8, device="meta", dtype=torch.uint8)
        found = kernels.conv2d(x, bits, None, x.new_empty(4), None, Codes("sign", 1), kernel, stride, padding)
        expected = F.conv2d(x, x.new_empty(4, 3, *kernel), None, stride, padding)
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


class Convolution(nn.Module):
    """The operator as a layer calls it."""

    def __init__(self):
        super().__init__()
        given = arguments()
        for name in ("bits", "layout", "weight_scale", "bias", "input_scale", "shift"):
            self.register_buffer(name, given[name])

    def forward(self, x):
        codes = Codes("levels", 2, -2, self.input_scale, self.shift)
        y = kernels.conv2d(x, self.bits, self.layout, self.weight_scale, self.bias, codes, (3, 2), (2, 1), (1, 0))
        return torch.relu(y).flatten(1)


@needs_library
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_convolution(backend, dynamic):
    layer = Convolution()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for shape in ((2, 5, 7, 8), (3, 5, 12, 4)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), layer(x))


@needs_library
def test_exported_convolution():
    layer, x = Convolution(), torch.randn(2, 5, 7, 8)
    sizes = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height", min=4, max=99)}
    sizes[3] = torch.export.Dim("width", min=4, max=99)
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    assert "rebnn.conv2d" in program.graph_module.code
    for shape in ((3, 5, 7, 8), (5, 5, 98, 4), (2, 5, 4, 33)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), layer(x))


# Arguments that do not fit


BAD = {
    "three dimensions": {"x": torch.randn(5, 7, 8)},
    "five dimensions": {"x": torch.randn(1, 2, 5, 7, 8)},
    "another number of channels": {"x": torch.randn(2, 6, 7, 8)},
    "as many bytes of bits": {"x": torch.randn(2, 5, 7, 8), "kernel": [2, 3], "bits": torch.zeros(5, 4).byte()},
    "bits of integers": {"bits": torch.zeros(6, 4, dtype=torch.int32)},
    "bits of one dimension": {"bits": torch.zeros(24, dtype=torch.uint8), "layout": None},
    "bits of fewer outputs": {"bits": torch.zeros(5, 4, dtype=torch.uint8), "layout": None},
    "layout cut": {"layout": torch.zeros(100, dtype=torch.uint8)},
    "layout empty": {"layout": torch.zeros(0, dtype=torch.uint8)},
    "layout of floats": {"layout": torch.zeros(832)},
    "layout of the other kind": {"width": 8},
    "scales of one more output": {"weight_scale": torch.rand(7)},
    "scale as a matrix": {"weight_scale": torch.rand(6, 1)},
    "bias too short": {"bias": torch.rand(5)},
    "bias as a matrix": {"bias": torch.rand(6, 1, 1)},
    "shift too long": {"shift": torch.rand(6)},
    "shift as an image": {"shift": torch.rand(5, 1, 1)},
    "float codes": {"codes": "float", "width": 32},
    "token codes": {"codes": "token", "width": 8, "low": 0, "layout": None},
    "unknown codes": {"codes": "sine"},
    "three bits": {"width": 3},
    "no bits": {"width": 0},
    "two bits of sign": {"codes": "sign", "low": 0},
    "low too low": {"low": -3},
    "low above zero": {"low": 1},
    "no scale": {"input_scale": torch.zeros(1)},
    "negative scale": {"input_scale": -torch.ones(1)},
    "scale is NaN": {"input_scale": torch.full((1,), float("nan"))},
    "two scales": {"input_scale": torch.ones(2)},
    "kernel of three": {"kernel": [3, 2, 1]},
    "kernel of one": {"kernel": [6]},
    "kernel of none": {"kernel": [0, 2]},
    "negative kernel": {"kernel": [-3, -2]},
    "kernel too high": {"padding": [0, 0], "x": torch.randn(2, 5, 2, 8)},
    "kernel too wide": {"x": torch.randn(2, 5, 7, 1)},
    "stride of one": {"stride": [1]},
    "no stride": {"stride": [0, 1]},
    "negative stride": {"stride": [1, -1]},
    "padding of one": {"padding": [1]},
    "negative padding": {"padding": [1, -1]},
    "huge stride": {"stride": [2**31, 1]},
    "huge padding": {"padding": [2**62, 0]},
    "no image": {"x": torch.randn(2, 5, 0, 0)},
}


@needs_library
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_errors(case):
    with pytest.raises((ValueError, RuntimeError)):
        call(**BAD[case])
    assert call().shape == (2, 6, 4, 7)


@needs_library
def test_what_the_call_of_the_library_does_not_take():
    """What the operator converts, and what it finds out before."""
    given = arguments()
    good = {name: given[name] for name in given if name not in ("bits", "input_scale")} | {"scale": 0.4}
    assert torch.equal(cpu.conv2d(**good), call())
    for bad, message in (
        ({"x": given["x"].double()}, "x must be a contiguous torch.float32"),
        ({"x": given["x"].to(memory_format=torch.channels_last)}, "not contiguous"),
        ({"x": given["x"].to("meta")}, "on the CPU"),
        ({"x": given["x"][0]}, r"images \[batch, channels, height, width\], got a shape of \(5, 7, 8\)"),
        ({"weight_scale": given["weight_scale"].half()}, "weight_scale must be"),
        ({"weight_scale": torch.rand(20)}, "bias must be"),
        ({"weight_scale": torch.rand(20), "bias": None}, "layout must be"),
        ({"bias": torch.rand(12)[::2]}, "bias must be"),
        ({"shift": torch.ones(5, dtype=torch.int32)}, "shift must be"),
        ({"codes": "token"}, "codes='token' are none of a convolution; expected one of sign, levels"),
        ({"kernel": (3, 0)}, r"kernel must be two integers, .*, of at least 1, got \(3, 0\)"),
        ({"stride": (2**64 + 2, 1)}, "stride must be two integers"),
        ({"padding": (1,)}, "padding must be two integers"),
        ({"padding": (-1, 0)}, "padding must be two integers"),
        ({"x": torch.randn(2, 5, 7, 1)}, r"a kernel of \(3, 2\) does not fit into \(7, 1\) with a padding of \(1, 0\)"),
        ({"kernel": (2**30, 2**30)}, "no layout 0 of 6 outputs, 5 channels and a kernel of 1073741824 x 1073741824"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.conv2d(**good | bad)


@needs_library
def test_bad_arguments_of_layouts_are_errors():
    bits = pack_signs(signs_of(5, 3, (3, 2)).flatten(1))
    assert cpu.conv_layout(bits, 3, (3, 2), cpu.WORDS).dtype == torch.uint8
    large = torch.empty(1, 2**20, dtype=torch.uint8)
    for wrong in (
        (bits, 5, (3, 2), cpu.WORDS),
        (bits, -3, (3, 2), cpu.WORDS),
        (bits, 3, (3, 3), cpu.WORDS),
        (bits, 3, (-3, -2), cpu.WORDS),
        (bits, 3, (3,), cpu.WORDS),
        (bits, 3, (3, 2), 7),
        (bits.int(), 3, (3, 2), cpu.WORDS),
        (bits.flatten(), 3, (3, 2), cpu.WORDS),
        (bits[0, 0], 3, (3, 2), cpu.WORDS),
        (bits.to("meta"), 3, (3, 2), cpu.WORDS),
        (large, 2**23, (1, 1), cpu.WORDS),
        (large[:, : 2**17], 1, (2**10, 2**10), cpu.WORDS),
    ):
        with pytest.raises(ValueError):
            cpu.conv_layout(*wrong)


@needs_library
def test_a_prepared_call_reads_its_inputs_when_it_is_called():
    x, signs = torch.randn(2, 5, 7, 8), signs_of(6, 5, (3, 2))
    geometry = ((3, 2), (1, 1), (1, 1))
    prepared = cpu.prepare_conv2d(x, layout_of(signs, 1), torch.rand(6), None, "sign", 1, 0, 1.0, None, *geometry)
    first = prepared().clone()
    x.neg_()
    assert torch.equal(prepared(), -first)


# Benchmark


@pytest.fixture
def benchmark():
    """Module of the benchmark script; it chooses an engine for torch's int8."""
    spec = importlib.util.spec_from_file_location("conv", Path(__file__).parent.parent / "benchmarks" / "conv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = torch.backends.quantized.engine
    yield module
    torch.backends.quantized.engine = before


CONTENDERS = ["W1A1 C", "W1A1 call", "W1A1 operator", "W1A2 C", "W1A4 C", "W1A8 C"]


@needs_library
@pytest.mark.filterwarnings("ignore:.*quantize_per:UserWarning", "ignore::DeprecationWarning")
def test_benchmark(benchmark, capsys):
    rows = benchmark.main(["--layer", "5x4x9", "3x3x16", "--batch", "2", "--rounds", "3"])
    baselines = [
        b for b in benchmark.BASELINES if b != "torch int8" or "x86" in torch.backends.quantized.supported_engines
    ]
    assert [r["contender"] for r in rows] == [*CONTENDERS, *baselines] * 2
    for r in rows:
        baseline = next(b for b in rows if b["layer"] == r["layer"] and b["contender"] == "torch fp32")
        assert r["x torch fp32"] == pytest.approx(baseline["median us"] / r["median us"])
        products = 2 * 5 * 4 * 9 * 9 * 9 if r["layer"] == "5x4x9" else 2 * 3 * 3 * 16 * 16 * 9
        assert r["T MAC/s"] * 1e12 == pytest.approx(products / (r["median us"] * 1e-6))
    printed = capsys.readouterr().out
    assert printed.startswith(f"torch {torch.__version__}") and "batch 2, 3 interleaved rounds, wall time" in printed
    assert printed.count("| W1A1 C ") == 2


@needs_library
@pytest.mark.filterwarnings("ignore:.*quantize_per:UserWarning", "ignore::DeprecationWarning")
def test_benchmark_compares_convolutions_of_the_same_numbers(benchmark):
    x, weight = torch.randn(1, 9, 6, 5), torch.randn(4, 9, 3, 3)
    ours = {c.name: c.call() for c in benchmark.engine(x, weight)}
    assert list(ours) == CONTENDERS
    signs, scale = weight >= 0, weight.abs().mean((1, 2, 3))
    for name, found in ours.items():
        codes = benchmark.INPUTS[name.split()[0]]
        step = 1.0 if codes.kind == "sign" else 4 * 2.0**-codes.width
        integers = codes_by_formula(x, codes.kind, codes.width, codes.low, step, None)
        product = product_by_formula(integers, signs, benchmark.STRIDE, benchmark.PADDING).float()
        assert torch.equal(found, product * (scale * step)[:, None, None]), name
    theirs = [c.call() for c in benchmark.torch_convolutions(x, weight)]
    expected = F.conv2d(x, weight, None, 1, 1)
    for found in theirs[:2]:
        torch.testing.assert_close(found, expected)
    for found in theirs[2:]:
        assert found.int_repr().dtype == torch.uint8
        assert (found.dequantize() - expected).abs().max() < 0.1 * expected.abs().max()


@needs_library
@pytest.mark.parametrize("wrong", [["--rounds", "x"], ["--clock", "sun"], ["--batch", "one"]])
def test_benchmark_refuses(benchmark, wrong):
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
