"""The 1-bit engine: every operator on every instruction set against its formula, and what bad arguments do."""

import ctypes
import ctypes.util
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from operators import Recorded
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import rebnn_hf
from rebnn_hf import kernels
from rebnn_hf.activations import ActivationRule
from rebnn_hf.attention import BoolAttention, ElasticAttention, binary_attention
from rebnn_hf.binarizers import Elastic, binarizer_of, codes_of, engine_codes
from rebnn_hf.functional import WeightRule
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import BinaryEmbedding, BinaryLinear, PackedLinear
from rebnn_hf.packing import pack_signs, unpack_signs

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
ISAS = [name for name, runs in cpu.instruction_sets().items() if runs] if cpu.available() else ["none"]
SIZES = [  # inputs, outputs
    *[(1, 1), (3, 17), (7, 768), (31, 16), (33, 1), (63, 33), (64, 64), (65, 3), (127, 31), (128, 129), (129, 65)],
    *[(767, 7), (768, 15), (769, 48), (0, 5), (5, 0)],
]
ROWS = [0, 1, 2, 7, 8, 9, 33]
CODES = [  # kind, bits, low, with a shift
    *[("sign", 1, 0, False), ("sign", 1, 0, True), ("levels", 1, 0, True), ("levels", 1, -1, False)],
    *[("levels", 2, 0, True), ("levels", 2, -2, False), ("levels", 4, 0, False), ("levels", 4, -8, True)],
    *[("levels", 8, 0, True), ("levels", 8, -128, False), ("token", 8, 0, False)],
]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 3e38, -3e38, 0.5, -0.5]


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


def signs_of(kind, outputs, inputs, seed=0):
    if kind == "random":
        return torch.rand(outputs, inputs, generator=generator(seed)) < 0.5
    return torch.full((outputs, inputs), kind == "ones")


def codes_by_formula(x, kind, bits, low, scale, shift):
    """Codes and the scale of the result as rebnn.h defines them, in float32 as it says; NaN is the lowest code."""
    if kind == "token":
        largest = (
            x.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(1, keepdim=True) if x.shape[1] else x.sum(1)[:, None]
        )
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (x / scale).round().nan_to_num(nan=-127.0, posinf=127, neginf=-127).clamp(-127, 127), scale
    value = x if shift is None else x + shift
    if kind == "sign":
        return torch.where(value >= 0, 1.0, -1.0), torch.tensor(scale)
    highest = low + 2**bits - 1
    codes = (value / torch.tensor(scale) + 0.5).floor().nan_to_num(nan=low, posinf=highest, neginf=low)
    return codes.clamp(low, highest), torch.tensor(scale)


def product_by_formula(codes, signs):
    """c b^T, exact."""
    return codes.double() @ torch.where(signs, 1.0, -1.0).double().T


def inputs_of(rows, inputs, scale, seed):
    """Normal numbers, a third of them exactly on thresholds or half-way between codes."""
    x = torch.randn(rows, inputs, generator=generator(seed)) * 3 * scale
    ties = torch.randint(-9, 10, x.shape, generator=generator(seed + 1)) * (scale / 2)
    return torch.where(torch.rand(x.shape, generator=generator(seed + 2)) < 0.33, ties, x)


def layout_of(signs, bits):
    return cpu.layout(pack_signs(signs), signs.shape[1], cpu.QUADS if bits == 8 else cpu.WORDS)


# Products


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
def test_products_are_exact_and_results_have_two_roundings(isa, kind, bits, low, shifted):
    for number, (inputs, outputs) in enumerate(SIZES):
        if kind == "token" and not inputs:
            continue
        rows = ROWS[number % len(ROWS)]
        scale = 0.25 if number % 2 else 0.3
        signs = signs_of(("random", "ones", "random", "minus")[number % 4], outputs, inputs, number)
        x = inputs_of(rows, inputs, scale, number)
        shift = torch.randn(inputs, generator=generator(number)) if shifted else None
        codes, input_scale = codes_by_formula(x, kind, bits, low, scale, shift)
        product = product_by_formula(codes, signs)
        layout = layout_of(signs, bits)
        one = torch.ones(outputs)
        if kind == "sign":
            assert torch.equal(cpu.linear(x, layout, one, None, kind, bits, low, 1.0, shift).double(), product)
        weight_scale = torch.rand(outputs, generator=generator(number)) + 0.01
        bias = torch.randn(outputs, generator=generator(number + 1))
        for b in (bias, None):
            y = cpu.linear(x, layout, weight_scale, b, kind, bits, low, scale, shift)
            factor = weight_scale * input_scale
            expected = product.float() * factor
            expected = expected if b is None else expected + b
            assert torch.equal(y, expected), (inputs, outputs, rows)
            exact = product * (weight_scale.double() * input_scale.double())
            bound = 2**-23 * (exact.abs() + (exact if b is None else exact + b).abs())
            assert ((y - (exact if b is None else exact + b)).abs() <= bound).all()


@pytest.mark.parametrize("outputs", [1, 16, 31])
def test_every_number_of_rows_and_the_longest_sums(isa, outputs):
    """Rows go in tiles; all codes at their largest and all signs alike give the largest sums."""
    signs = signs_of("ones", outputs, 769)
    signs[::2] = False
    one = torch.ones(outputs)
    for rows in range(1, 20):
        x = torch.randn(rows, 769, generator=generator(rows))
        for kind, bits, low in (("sign", 1, 0), ("levels", 2, 0), ("levels", 4, -8), ("levels", 8, 0)):
            x[0], x[-1] = 1e6, -1e6
            y = cpu.linear(x, layout_of(signs, bits), one, None, kind, bits, low, 1.0)
            codes, _ = codes_by_formula(x, kind, bits, low, 1.0, None)
            assert torch.equal(y.double(), product_by_formula(codes, signs))


@pytest.mark.parametrize("kind, bits, low, shifted", CODES)
def test_codes_of_special_values(isa, kind, bits, low, shifted):
    """NaN is below every threshold, infinities and denormals are ordinary."""
    x = torch.tensor(SPECIAL * 6)[None]  # 78: in and behind whole vectors
    x = torch.cat([x, x.flip(1), x.nan_to_num(0, 1, -1)])
    shift = torch.zeros(x.shape[1]) if shifted else None
    codes, scales = cpu.encode(x, kind, bits, low, 0.5, shift)
    expected, scale = codes_by_formula(x, kind, bits, low, 0.5, shift)
    from_zero = expected > 0 if kind == "sign" else expected + (128 if kind == "token" else -low)
    assert torch.equal(codes, from_zero.to(torch.uint8))
    if kind == "token":
        assert torch.equal(scales, scale[:, 0])
    elif kind == "sign":
        assert codes[0, :13].tolist() == [0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0]
    elif low == 0:
        assert codes[0, :13].tolist() == [0, 2**bits - 1, 0, 0, 0, 0, 0, 0, 0, 2**bits - 1, 0, 1, 0]


def test_denormals_are_not_flushed(isa):
    tiny = torch.tensor([[1e-45, -1e-45, 1e-40, -1e-40]])
    layout = layout_of(torch.ones(1, 1, dtype=torch.bool), 1)
    y = cpu.linear(tiny.T.contiguous(), layout, torch.tensor([1e-44]), None, "sign", 1)
    assert y.flatten().tolist() == [1.401298464324817e-45 * k for k in (7, -7, 7, -7)]
    codes, _ = cpu.encode(tiny, "levels", 2, -2, 1e-45)
    assert codes.tolist() == [[3, 1, 3, 0]]


def test_a_sum_with_its_shift_is_rounded_once(isa):
    """1 - (1 + 2^-24) is 0 in float32, therefore +1."""
    x = torch.tensor([[1.0, 1.0, -1.0]])
    shift = torch.tensor([-1.0, -1 - 2**-23, 1 - 2**-24])
    codes, _ = cpu.encode(x, "sign", 1, shift=shift)
    assert codes.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 31, 64, 65, 129])
@needs_library
def test_embedding_looks_up_signs_times_scale(width):
    signs = signs_of("random", 23, width, width)
    scale = torch.rand(23, generator=generator(width))
    scale[3], scale[4] = 0.0, 1e-45
    indices = torch.tensor([0, 22, 3, 4, 3, 11])
    y = cpu.embedding(indices, pack_signs(signs), scale, width)
    expected = torch.where(signs, scale[:, None], -scale[:, None])[indices]
    assert torch.equal(y.view(torch.int32), expected.view(torch.int32)), "also the sign of -0"
    assert cpu.embedding(indices[:0], pack_signs(signs), scale, width).shape == (0, width)


@needs_library
def test_layout_is_the_documented_order():
    for inputs, outputs in SIZES:
        signs = signs_of("random", outputs, inputs, inputs)
        blocks = -(-outputs // 16)
        padded = torch.zeros(blocks * 16, -(-max(inputs, 1) // 64) * 64, dtype=torch.bool)
        padded[:outputs, :inputs] = signs
        ones = padded.sum(1).int()
        for kind in (cpu.WORDS, cpu.QUADS):
            layout = cpu.layout(pack_signs(signs), inputs, kind)
            end = len(layout) - blocks * 64
            assert torch.equal(layout[end:].view(torch.int32), ones)
            step = 64 if kind == cpu.WORDS else 4
            count = -(-inputs // step)
            rows = padded[:, : count * step].reshape(blocks, 16, count, step).transpose(1, 2)
            words = rows.reshape(blocks * count * 16 * step // 64, 64)
            assert torch.equal(layout[:end], pack_signs(words).flatten())


# Properties


FLOATS = st.floats(width=32)
ELASTIC = st.tuples(st.sampled_from([1, 2, 4, 8]), st.booleans())
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@needs_library
@PROPERTY
@given(
    x=st.lists(FLOATS, min_size=1, max_size=70),
    shift=st.floats(-3, 3, width=32),
    scale=st.floats(2**-16, 2**16, width=32),
    elastic=ELASTIC,
    isa=st.sampled_from(ISAS),
)
@example(x=[0.25], shift=0.0, scale=0.5, elastic=(2, True), isa=ISAS[-1])
def test_codes_are_those_of_the_layer_for_any_floats(x, shift, scale, elastic, isa):
    bits, signed = elastic
    layer = Elastic(bits, signed, 1.0, len(x))
    with torch.no_grad():
        layer.shift.fill_(shift)
        layer.scale.fill_(scale)
    layer.check_calibration()
    x = torch.tensor([x])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ISA_ENVIRONMENT, isa)
        kind = "sign" if signed and bits == 1 else "levels"
        low = 0 if kind == "sign" else layer.low
        codes, _ = cpu.encode(x, kind, bits, low, layer.positive_scale().item(), layer.shift.detach())
    lowest = layer.low if kind == "levels" else -1
    expected = layer(x)[0].detach().nan_to_num(nan=lowest)
    assert torch.equal(codes, ((expected > 0) if kind == "sign" else expected - low).to(torch.uint8))


@needs_library
@PROPERTY
@given(
    rows=st.integers(0, 20),
    inputs=st.integers(1, 200),
    outputs=st.integers(0, 70),
    code=st.sampled_from(CODES),
    seed=st.integers(0, 1000),
    isa=st.sampled_from(ISAS),
)
def test_products_of_any_size(rows, inputs, outputs, code, seed, isa):
    kind, bits, low, shifted = code
    x = inputs_of(rows, inputs, 0.5, seed)
    signs = signs_of("random", outputs, inputs, seed)
    shift = torch.randn(inputs, generator=generator(seed)) if shifted else None
    weight_scale, bias = torch.rand(outputs, generator=generator(seed)), torch.rand(outputs)
    codes, scale = codes_by_formula(x, kind, bits, low, 0.5, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ISA_ENVIRONMENT, isa)
        y = cpu.linear(x, layout_of(signs, bits), weight_scale, bias, kind, bits, low, 0.5, shift)
    assert torch.equal(y, product_by_formula(codes, signs).float() * (weight_scale * scale) + bias)


@needs_library
@PROPERTY
@given(data=st.data(), entries=st.integers(1, 40), width=st.integers(0, 100))
def test_embedding_of_any_size(data, entries, width):
    indices = torch.tensor(data.draw(st.lists(st.integers(0, entries - 1), max_size=30)), dtype=torch.int64)
    signs, scale = signs_of("random", entries, width, width), torch.rand(entries)
    y = cpu.embedding(indices, pack_signs(signs), scale, width)
    assert torch.equal(y, torch.where(signs, scale[:, None], -scale[:, None])[indices])


# Attention


def heads_of(batch, heads, length, head, seed):
    return [torch.randn(batch, heads, length, head, generator=generator(seed + i)) for i in range(3)]


def attention_by_formula(query, key, value, mask, table, threshold, scale):
    """As rebnn.h defines it, with exact integers; sums of the table in float64."""
    query, key, value = (torch.where(x >= 0, 1.0, -1.0).double() for x in (query, key, value))
    counting = torch.ones(len(query), query.shape[2], dtype=torch.bool) if mask is None else mask
    counting = counting[:, None, None, :]
    product = query @ key.mT
    if table is None:
        active = (product >= 0) & counting
    else:
        share = table.double()[((query.shape[3] - product) / 2).long()]
        active = (share >= threshold * (share * counting).sum(-1, keepdim=True)) & counting
    return ((active.double() @ value).float() * scale).transpose(1, 2)


@pytest.mark.parametrize("head", [16, 48, 64, 80, 240])
def test_attention_is_the_formula(isa, head):
    """With a table of powers of two, whose sums have no rounding."""
    table = 2.0 ** -(torch.arange(head + 1) * 20 // head)
    for batch, heads, length in ((1, 1, 1), (2, 3, 7), (1, 2, 64), (2, 1, 65), (1, 1, 200), (0, 2, 3), (2, 2, 0)):
        inputs = heads_of(batch, heads, length, head, length)
        mask = torch.rand(batch, length, generator=generator(length)) < 0.7
        mask[-1:] = length % 2 == 0  # none at all: the context is 0
        for m in (None, mask):
            for t, threshold in ((None, 0.0), (table, 0.02), (table, 0.5), (table, 2.0), (table, 0.0)):
                found = cpu.attention(*inputs, m, t, threshold, 0.7)
                assert torch.equal(found, attention_by_formula(*inputs, m, t, threshold, 0.7)), (length, threshold)


@needs_library
def test_threads_give_equal_attention():
    inputs = heads_of(3, 5, 33, 64, 0)
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1, 20:] = False
    expected = attention_by_formula(*inputs, mask, None, 0.0, 1.0)
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.attention(*inputs, mask, None, 0.0, 1.0), expected)


@needs_library
def test_bad_arguments_of_attention_are_errors():
    good = [*heads_of(2, 3, 5, 32, 0), torch.ones(2, 5, dtype=torch.bool), torch.ones(33), 0.5, 1.0]
    assert cpu.attention(*good).shape == (2, 5, 3, 32)
    for place, value in (
        (0, torch.randn(2, 3, 5, 24)),
        (1, torch.randn(2, 3, 4, 32)),
        (2, torch.randn(2, 2, 5, 32)),
        (2, torch.randn(2, 3, 32, 5).mT),
        (1, torch.randn(2, 3, 5, 32).double()),
        (3, torch.ones(2, 4, dtype=torch.bool)),
        (3, torch.ones(2, 5)),
        (4, torch.ones(32)),
        (4, torch.ones(66)[::2]),
        (4, torch.ones(33, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError):
            cpu.attention(*good[:place], value, *good[place + 1 :])
    for head in (8, 24, 256):
        with pytest.raises(ValueError):
            cpu.attention(*heads_of(1, 1, 2, head, 0), None, None, 0.0, 1.0)
    with pytest.raises(ValueError):
        cpu.attention(*heads_of(1, 1, 2, 16, 0)[:2], torch.randn(2, 16), None, None, 0.0, 1.0)


def padding_of(lengths, size, dtype=torch.float32):
    mask = torch.zeros(len(lengths), 1, size, size, dtype=dtype)
    for row, length in enumerate(lengths):
        mask[row, :, :, length:] = torch.finfo(dtype).min
    return mask


def one_bit_attention(kind, seed, head=32):
    """A module, its queries, keys and values, of which no probability is near a threshold."""
    torch.manual_seed(seed)
    rule = ActivationRule("sign", 1) if kind is BoolAttention else ActivationRule("elastic", 1)
    attention, inputs = kind(rule), heads_of(2, 3, 9, head, seed)
    if kind is ElasticAttention:
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            attention.get_submodule(name).calibrate(x)
        attention.probabilities.calibrate(torch.full((3, 9), 1 / 20))
    return attention, inputs


@pytest.mark.parametrize("kind", [BoolAttention, ElasticAttention])
@pytest.mark.parametrize("head", [16, 64, 80])
@needs_library
def test_attention_of_the_engine_is_that_of_the_module(kind, head):
    for seed in range(4):
        attention, inputs = one_bit_attention(kind, seed, head)
        for mask in (None, padding_of([9, 4], 9), padding_of([9, 4], 9)[:, :, :1]):
            holder = nn.Module()
            holder.binary_attention = attention
            with torch.no_grad(), Recorded() as ops:
                found, weights = binary_attention(holder, *inputs, mask)
            assert ops.names == ["rebnn::attention"] and weights is None
            with torch.no_grad(), kernels.use_backend("reference"):
                expected, weights = binary_attention(holder, *inputs, mask)
                assert 0.02 < weights.ne(0).float().mean() < 0.98
                if kind is ElasticAttention:
                    scores = attention.scores(*inputs[:2], head**-0.5) + (0 if mask is None else mask)
                    distance = (scores.softmax(-1) / attention.threshold() - 1).abs().min()
                    assert distance > 1e-5, "else two ways to add may differ; take another seed"
            torch.testing.assert_close(found, expected)


@needs_library
def test_attention_with_gradients_or_other_masks_is_left_to_the_module():
    holder = nn.Module()
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 9, 9)
    soft = padding_of([9, 4], 9)
    soft[1] = soft[1].clamp_min(-0.5)
    raised = padding_of([9, 4], 9)
    raised[0, ..., 3] = 2.0
    one = padding_of([4], 9)
    for kind in (BoolAttention, ElasticAttention):
        holder.binary_attention, inputs = one_bit_attention(kind, 0)
        for mask in (causal, soft, raised, one):
            with torch.no_grad(), Recorded() as ops:
                found, _ = binary_attention(holder, *inputs, mask)
            expected, _ = holder.binary_attention(*inputs, mask, 32**-0.5, 0.0)
            if mask is not one:
                assert ops.names == []
            torch.testing.assert_close(found, expected.transpose(1, 2))
        for wanted in range(3):
            holder.requires_grad_(False)
            leaves = [x.clone().requires_grad_(number == wanted) for number, x in enumerate(inputs)]
            context, _ = binary_attention(holder, *leaves, None)
            assert context.requires_grad
            context.square().sum().backward()
            assert leaves[wanted].grad is not None
        for parameter in holder.parameters():
            holder.requires_grad_(False)
            parameter.requires_grad_(True)
            assert binary_attention(holder, *inputs, None)[0].requires_grad


# Layers


RULES = {
    "float": (ActivationRule(), True),
    "sign": (ActivationRule("sign", 1), True),
    "rsign": (ActivationRule("rsign", 1), True),
    "elastic1": (ActivationRule("elastic", 1), True),
    "elastic1u": (ActivationRule("elastic", 1), False),
    "elastic2": (ActivationRule("elastic", 2), True),
    "elastic4u": (ActivationRule("elastic", 4), False),
    "elastic8": (ActivationRule("elastic", 8), True),
    "elastic8u": (ActivationRule("elastic", 8), False),
    "token": (ActivationRule("token", 8), True),
}


def packed_layer(rule, inputs=65, outputs=33, bias=True):
    """A packed layer with random weights and bias, and shifts and scales as after training."""
    torch.manual_seed(inputs)
    rule, signed = RULES[rule]
    latent = BinaryLinear.from_float(nn.Linear(inputs, outputs, bias), WeightRule())
    latent.input_binarizer = binarizer_of(rule, inputs, signed)
    if isinstance(latent.input_binarizer, Elastic):
        latent.input_binarizer.calibrate(torch.randn(9, inputs))
    if getattr(latent.input_binarizer, "shift", None) is not None:
        nn.init.normal_(latent.input_binarizer.shift, std=0.3)
    return latent.pack()


@pytest.mark.parametrize("rule", RULES)
def test_layer_gives_the_reference_in_float64(isa, rule):
    """Codes in float32, as both compute them; everything behind them in float64."""
    for inputs, outputs, bias in ((65, 33, True), (128, 300, True), (7, 1, False), (769, 17, False)):
        layer = packed_layer(rule, inputs, outputs, bias)
        x = torch.randn(2, 3, inputs)
        with torch.no_grad(), Recorded() as ops:
            y = layer(x)
        assert ops.names == ["rebnn::linear"]
        codes, scale = codes_of(x, layer.input_binarizer, torch.float32)
        signs = unpack_signs(layer.weight, inputs, torch.float64)
        scale = layer.weight_scale.double() * (1 if scale is None else scale.double())
        exact = (codes.double() @ signs.T) * scale
        magnitude = (codes.double().abs() @ signs.T.abs()) * scale if rule == "float" else exact.abs()
        result = exact if layer.bias is None else exact + layer.bias.double()
        roundings = inputs if rule == "float" else 1
        assert ((y - result).abs() <= 2**-23 * (roundings * magnitude + result.abs())).all()
        torch.testing.assert_close(y, layer.reference(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["float", "sign", "token"])
@needs_library
def test_half_precision_is_computed_in_float32(rule, dtype):
    layer = packed_layer(rule).to(dtype)
    x = torch.randn(4, 65).to(dtype)
    wide = packed_layer(rule)
    wide.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in layer.state_dict().items()})
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, wide(x.float()).to(dtype))


@pytest.mark.parametrize("shape", [(65,), (0, 65), (2, 0, 65), (1, 1, 1, 65)])
@pytest.mark.parametrize("rule", ["float", "sign", "elastic4u", "token"])
@needs_library
def test_shapes_are_those_of_the_reference(rule, shape):
    layer = packed_layer(rule)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.reference(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rule", ["float", "sign", "elastic1u"])
@needs_library
def test_a_layer_without_inputs_gives_its_bias(rule):
    layer = PackedLinear(0, 5)
    layer.weight, layer.weight_scale = torch.empty(5, 0, dtype=torch.uint8), torch.ones(5)
    layer.input_binarizer = packed_layer(rule).input_binarizer
    if hasattr(layer.input_binarizer, "shift"):
        layer.input_binarizer.shift = nn.Parameter(torch.empty(0))
    nn.init.normal_(layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(torch.empty(3, 2, 0)), layer.bias.expand(3, 2, 5))


@needs_library
def test_inputs_that_are_not_contiguous():
    layer = packed_layer("elastic4u")
    x = torch.randn(65, 2, 4)
    with torch.no_grad():
        assert torch.equal(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))
        assert torch.equal(layer(x[..., 0].T.expand(2, 65)), layer(x[..., 0].T.clone()))


@pytest.mark.parametrize("rule", RULES)
@needs_library
def test_gradients_are_those_of_the_reference(rule):
    layer = packed_layer(rule)
    x = torch.randn(5, 65, requires_grad=True)
    upstream = torch.randn(5, 33)
    results = []
    for call in (layer, layer.reference):
        layer.zero_grad()
        x.grad = None
        with Recorded() as ops:
            call(x).backward(upstream)
        assert ("rebnn::linear" in ops.names) == (call is layer)
        results.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in results[0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_library
def test_gradients_of_the_bias_alone_and_of_a_frozen_layer():
    layer = packed_layer("elastic1")
    layer(torch.randn(5, 65)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((33,), 5.0))
    assert layer.input_binarizer.scale.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(5, 65)).requires_grad


@needs_library
def test_changed_bits_get_a_new_layout():
    layer, other = packed_layer("sign"), packed_layer("sign")
    x = torch.randn(3, 65)
    with torch.no_grad():
        before = layer(x)
        layer.weight.bitwise_not_()
        layer.weight[:, -1] &= 1  # spare bits stay clear
        torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), before)
        layer.weight = pack_signs(signs_of("random", 33, 65))
        torch.testing.assert_close(layer(x), layer.reference(x))
        layer.weight.data = pack_signs(signs_of("random", 33, 65, 1))
        torch.testing.assert_close(layer(x), layer.reference(x))


@needs_library
def test_bits_at_an_old_address_get_a_new_layout():
    """The allocator gives the memory of a tensor that was dropped to the next one."""
    layer = packed_layer("sign")
    x = torch.randn(3, 65)
    other = pack_signs(signs_of("random", 33, 65, 7))
    with torch.no_grad():
        layer(x)
        for _ in range(20):
            layer.weight = None
            layer.weight = other.clone()
            torch.testing.assert_close(layer(x), layer.reference(x))
            layer.weight = None
            layer.weight = ~other
            layer.weight[:, -1] &= 1
            torch.testing.assert_close(layer(x), layer.reference(x))


@needs_library
def test_the_layout_is_not_saved():
    layer = packed_layer("sign")
    layer(torch.randn(1, 65))
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


@needs_library
def test_packed_embedding_looks_up_like_the_reference():
    torch.manual_seed(0)
    layer = BinaryEmbedding(30, 19, padding_idx=0, rule=WeightRule()).pack()
    indices = torch.tensor([[0, 29, 5], [5, 7, 0]])
    with Recorded() as ops:
        y = layer(indices)
    assert ops.names == ["rebnn::embedding"]
    with kernels.use_backend("reference"):
        assert torch.equal(layer(indices), y)
    for integers in (indices.int(), indices[:0], indices[0, 0], indices.T):
        assert torch.equal(layer(integers), layer.to_float()(integers))
    assert layer.bfloat16()(indices).dtype == torch.bfloat16


@pytest.mark.parametrize("index", [-1, 30, 2**40, -(2**62)])
@needs_library
def test_an_index_out_of_range_is_an_error(index):
    layer = BinaryEmbedding(30, 19, rule=WeightRule()).pack()
    with pytest.raises(IndexError, match="the table has 30 rows"):
        layer(torch.tensor([3, index]))


@needs_library
def test_indices_that_are_not_integers_are_an_error():
    layer = BinaryEmbedding(30, 19, rule=WeightRule()).pack()
    for indices in (torch.tensor([1.7]), torch.tensor([True])):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            layer(indices)


# Threads


@needs_library
@pytest.mark.parametrize("kind, bits", [("sign", 1), ("levels", 2), ("token", 8)])
@pytest.mark.parametrize("rows, inputs, outputs", [(33, 769, 700), (5, 1700, 2000)])
def test_threads_give_equal_results(kind, bits, rows, inputs, outputs):
    """Large enough to be split: by rows, or, where they are few, by outputs."""
    assert rows * inputs * outputs >= 2**24, "below, one thread computes everything"
    x, signs = torch.randn(rows, inputs), signs_of("random", outputs, inputs)
    layout, scale = layout_of(signs, bits), torch.rand(outputs)
    codes, input_scale = codes_by_formula(x, kind, bits, 0, 0.4, None)
    expected = product_by_formula(codes, signs).float() * (scale * input_scale)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.linear(x, layout, scale, None, kind, bits, 0, 0.4), expected)


@needs_library
def test_threads_look_up_equal_rows():
    signs, scale = signs_of("random", 500, 131), torch.rand(500)
    indices = torch.randint(500, (2001,), generator=generator(0))
    expected = torch.where(signs, scale[:, None], -scale[:, None])[indices]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.embedding(indices, pack_signs(signs), scale, 131), expected)


@needs_library
def test_calls_from_several_python_threads():
    """Also the first call of a layer, in which its layout is made."""
    torch.set_num_threads(2)
    layers = [packed_layer(rule, 600, 500) for rule in ("sign", "elastic2", "token")]
    inputs = [torch.randn(60, 600) for _ in range(3)]
    with torch.no_grad(), kernels.use_backend("reference"):
        expected = [[layer(x) for x in inputs] for layer in layers]
    start = threading.Barrier(4)

    def work(seed):
        start.wait()
        with torch.no_grad():
            return [[layer(x) for x in inputs] for _ in range(3) for layer in layers]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            for number, results in enumerate(found):
                for ours, theirs in zip(results, expected[number % 3], strict=True):
                    torch.testing.assert_close(ours, theirs)


@needs_library
def test_the_gil_is_released():
    """Python goes on while the library computes. Nothing else lets this thread run between the two times: the other
    one would keep the lock for ten seconds."""
    rows, inputs, outputs = 3000, 2048, 2048
    x, signs = torch.randn(rows, inputs), signs_of("random", outputs, inputs)
    layout, scale, y = layout_of(signs, 1), torch.rand(outputs), torch.empty(rows, outputs)
    codes = cpu._Input(cpu.CODES["sign"], 1, 0, 1.0, None)
    arguments = [cpu.isa(), 1, rows, inputs, outputs, x.data_ptr(), ctypes.byref(codes)]
    arguments += [layout.data_ptr(), scale.data_ptr(), None, y.data_ptr()]
    function, times, stamps = cpu._library().rebnn_linear, [], []

    def work():
        times.append(time.perf_counter())
        function(*arguments)
        times.append(time.perf_counter())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    begin, end = times
    assert any(begin < stamp < end for stamp in stamps)
    assert torch.equal(y[:3], cpu.linear(x[:3], layout, scale, None, "sign", 1))


# Arguments that do not fit


def good():
    """Arguments of cpu.linear that fit."""
    signs = signs_of("random", 33, 65)
    return {
        "x": torch.randn(4, 65),
        "layout": layout_of(signs, 1),
        "weight_scale": torch.rand(33),
        "bias": torch.rand(33),
        "codes": "sign",
        "width": 1,
        "low": 0,
        "scale": 1.0,
        "shift": torch.rand(65),
    }


BAD = {
    "double": {"x": torch.randn(4, 65).double()},
    "not contiguous": {"x": torch.randn(65, 4).T},
    "three dimensions": {"x": torch.randn(2, 2, 65)},
    "one dimension": {"x": torch.randn(65)},
    "too many features": {"x": torch.randn(4, 129)},
    "another device": {"x": torch.randn(4, 65, device="meta")},
    "layout cut": {"layout": torch.zeros(100, dtype=torch.uint8)},
    "layout too long": {"layout": torch.zeros(10**5, dtype=torch.uint8)},
    "layout of floats": {"layout": torch.zeros(1216)},
    "layout of the other kind": {"codes": "token", "width": 8},
    "layout empty": {"layout": torch.zeros(0, dtype=torch.uint8)},
    "scales of one block more": {"weight_scale": torch.rand(50), "bias": None},
    "scales of half precision": {"weight_scale": torch.rand(33).half()},
    "scale as a matrix": {"weight_scale": torch.rand(33, 1)},
    "bias too short": {"bias": torch.rand(32)},
    "bias not contiguous": {"bias": torch.rand(66)[::2]},
    "shift too long": {"shift": torch.rand(66)},
    "shift of integers": {"shift": torch.ones(65, dtype=torch.int32)},
    "unknown codes": {"codes": "sine"},
    "float codes": {"codes": "float"},
    "no bits": {"width": 0},
    "negative bits": {"codes": "levels", "width": -1},
    "three bits": {"codes": "levels", "width": 3},
    "many bits": {"codes": "levels", "width": 64},
    "two bits of sign": {"width": 2},
    "low of sign": {"low": -1},
    "low above zero": {"codes": "levels", "low": 1},
    "low too low": {"codes": "levels", "low": -2},
    "no scale": {"codes": "levels", "scale": 0.0},
    "negative scale": {"codes": "levels", "scale": -1.0},
    "scale is NaN": {"codes": "levels", "scale": float("nan")},
}


@pytest.mark.parametrize("case", BAD)
@needs_library
def test_bad_arguments_of_linear_are_errors(case):
    with pytest.raises((ValueError, IndexError)):
        cpu.linear(**{**good(), **BAD[case]})
    assert cpu.linear(**good()).shape == (4, 33)


@needs_library
def test_more_bad_arguments_are_errors():
    bits, scale = pack_signs(signs_of("random", 5, 20)), torch.rand(5)
    index = torch.tensor([1, 2])
    for call in (
        lambda: cpu.layout(bits, 30, cpu.WORDS),
        lambda: cpu.layout(bits, -8, cpu.WORDS),
        lambda: cpu.layout(bits, 20, 7),
        lambda: cpu.layout(bits.float(), 20, cpu.WORDS),
        lambda: cpu.layout(bits.flatten(), 20, cpu.WORDS),
        lambda: cpu.layout(torch.empty(1, 2**20, dtype=torch.uint8), 2**23, cpu.WORDS),
        lambda: cpu.embedding(index.int(), bits, scale, 20),
        lambda: cpu.embedding(index[None], bits, scale, 20),
        lambda: cpu.embedding(index, bits, scale[:4], 20),
        lambda: cpu.embedding(index, bits, scale, 25),
        lambda: cpu.embedding(index, bits, scale, -4),
        lambda: cpu.embedding(index, bits.int(), scale, 20),
        lambda: cpu.embedding(index, bits.T, scale, 20),
        lambda: cpu.encode(torch.randn(2, 3).double(), "sign", 1),
        lambda: cpu.encode(torch.randn(2, 3), "levels", 5),
        lambda: cpu.encode(torch.randn(2, 3), "sign", 1, shift=torch.randn(2)),
    ):
        with pytest.raises(ValueError):
            call()


@needs_library
def test_bad_arguments_of_the_operators_are_errors():
    layer = packed_layer("elastic1")
    x = torch.randn(4, 65)
    scale, shift = torch.ones(1), torch.zeros(65)
    arguments = [x, layer.weight, layer.layout(cpu.WORDS), layer.weight_scale, layer.bias, "sign", 1, 0, scale, shift]
    good = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    assert torch.ops.rebnn.linear(*good).shape == (4, 33)
    for place, value in (
        (0, torch.randn(4, 80)),
        (0, torch.randn(4, 64)),
        (1, layer.weight[:30]),
        (1, layer.weight[:, :5]),
        (1, layer.weight.int()),
        (2, torch.zeros(64, dtype=torch.uint8)),
        (3, torch.rand(30)),
        (4, torch.rand(40)),
        (5, "bits"),
        (6, 9),
        (8, torch.ones(3)),
        (9, torch.zeros(64)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.rebnn.linear(*good[:place], value, *good[place + 1 :])


@pytest.mark.parametrize("rule", RULES)
@needs_library
def test_a_layer_refuses_inputs_of_another_size(rule):
    """Also of sizes whose bits take as many words or bytes as its own."""
    layer = packed_layer(rule)
    for size in (64, 66, 72, 80, 128, 1):
        for backend in ("cpu", "reference"):
            with kernels.use_backend(backend), torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
                layer(torch.randn(2, size))


DANGEROUS = """
import os, sys, types, torch
package = sys.modules["rebnn_hf"] = types.ModuleType("rebnn_hf")  # without transformers, for speed
package.__path__ = sys.argv[1:]
from rebnn_hf.kernels import cpu
from rebnn_hf.packing import pack_signs
for isa in [name for name, runs in cpu.instruction_sets().items() if runs]:
    os.environ['REBNN_ISA'] = isa
    print(isa, flush=True)
    torch.manual_seed(0)
    outputs, inputs = 40, 130
    for kind, codes, bits in ((cpu.WORDS, "sign", 1), (cpu.WORDS, "levels", 4), (cpu.QUADS, "token", 8)):
        layout = cpu.layout(pack_signs(torch.rand(outputs, inputs) < 0.5), inputs, kind)
        x, scale = torch.randn(9, inputs), torch.rand(outputs)
        expected = cpu.linear(x, layout, scale, None, codes, bits)
        for offset in (1, 4, 8, 32):
            moved = torch.empty(len(layout) + offset, dtype=torch.uint8)[offset:].copy_(layout)
            assert torch.equal(cpu.linear(x, moved, scale, None, codes, bits), expected), offset
    for tensor in (torch.empty(0), torch.empty(0, 0), torch.empty(0, 70), torch.empty(70, 0)):
        for call in (
            lambda: cpu.linear(tensor, tensor, tensor, tensor, "sign", 1),
            lambda: cpu.linear(torch.randn(3, 70), tensor.byte(), tensor, None, "token", 8),
            lambda: cpu.layout(tensor.byte(), 0, 0),
            lambda: cpu.embedding(tensor.long(), tensor.byte(), tensor, 0),
            lambda: cpu.embedding(torch.tensor([0]), tensor.byte(), tensor.flatten(), 0),
            lambda: cpu.encode(tensor, "token", 8),
            lambda: cpu.encode(tensor, "sign", 1),
            lambda: cpu.encoder(tensor, None, tensor.byte()),
        ):
            try:
                call()
            except (ValueError, IndexError):
                pass
print("survived")
"""


@needs_library
def test_misaligned_and_empty_buffers_do_not_crash():
    result = subprocess.run([sys.executable, "-c", DANGEROUS, *rebnn_hf.__path__], capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()) == (0, [*ISAS, "survived"]), result.stderr


# Which backend


@pytest.fixture
def library_at(monkeypatch):
    """Pretend that the library is somewhere else, or nowhere."""

    def change(path):
        monkeypatch.setattr(cpu, "_path", lambda: path)
        cpu._load.cache_clear()

    yield change
    monkeypatch.undo()
    cpu._load.cache_clear()


@pytest.fixture(autouse=True)
def no_backend_chosen(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(kernels, "_chosen", None)


def ops_of(layer, x):
    with torch.no_grad(), Recorded() as ops:
        layer(x)
    return ops.names


def test_without_the_library_everything_runs_on_the_reference(library_at, monkeypatch):
    library_at(None)
    layer, x = packed_layer("elastic1"), torch.randn(3, 65)
    assert not cpu.available() and "without a C compiler" in cpu.why_not()
    assert kernels.backend() == "reference" and ops_of(layer, x) == []
    torch.testing.assert_close(layer(x), layer.reference(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"backend='cpu' asks for the C library.*without a C compiler"):
        kernels.set_backend("cpu")
    monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    with pytest.raises(RuntimeError, match=r"REBNN_BACKEND='cpu' asks for the C library.*without a C compiler"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"engine is not available.*without a C compiler"):
        cpu.encode(x, "sign", 1)


def test_a_library_that_cannot_be_used_says_why(library_at, tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    library_at(tmp_path / "text.so")
    assert "text.so cannot be loaded" in cpu.why_not() and kernels.backend() == "reference"
    library_at(ctypes.util.find_library("m"))
    assert "has no rebnn_abi_version; reinstall" in cpu.why_not() and kernels.backend() == "reference"


@needs_library
def test_a_library_of_another_version_is_not_used(library_at, monkeypatch):
    found = cpu.ABI_VERSION
    monkeypatch.setattr(cpu, "ABI_VERSION", 99)
    cpu._load.cache_clear()
    assert f"ABI {found}" in cpu.why_not() and kernels.backend() == "reference"
    library_at(None)  # the fixture's end restores the cache


@needs_library
def test_the_backend_is_chosen(monkeypatch):
    layer, x = packed_layer("sign"), torch.randn(2, 65)
    engine = ["rebnn::linear"]
    assert kernels.backend() == "cpu" and ops_of(layer, x) == engine
    kernels.set_backend("reference")
    assert kernels.backend() == "reference" and ops_of(layer, x) == []
    with kernels.use_backend("cpu"):
        assert ops_of(layer, x) == engine
        with pytest.raises(RuntimeError, match="stop"), kernels.use_backend("reference"):
            raise RuntimeError("stop")
        assert ops_of(layer, x) == engine
    assert kernels.backend() == "reference"
    kernels.set_backend(None)
    for name, expected in (("reference", []), ("cpu", engine), ("auto", engine)):
        monkeypatch.setenv(kernels.ENVIRONMENT, name)
        assert ops_of(layer, x) == expected
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    with kernels.use_backend("cpu"):
        assert ops_of(layer, x) == engine, "the program wins over the environment"


def test_an_unknown_backend_is_an_error(monkeypatch):
    for call in (lambda: kernels.set_backend("gpu"), lambda: kernels.use_backend("gpu").__enter__()):
        with pytest.raises(ValueError, match="backend='gpu' is not a backend; expected one of auto, reference, cpu"):
            call()
    monkeypatch.setenv(kernels.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="REBNN_BACKEND='fast' is not a backend"):
        kernels.backend()


@needs_library
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, "mmx")
    with pytest.raises(RuntimeError, match=r"REBNN_ISA='mmx' cannot be used; this build has .*portable"):
        cpu.encode(torch.randn(1, 1), "sign", 1)
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, "")
    assert cpu.isa_name() == ISAS[0]


@needs_library
def test_what_the_engine_leaves_to_the_reference():
    layer, x = packed_layer("sign"), torch.randn(2, 65)
    assert ops_of(layer.double(), x.double()) == []
    layer = packed_layer("sign")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops_of(layer, x) == []
        assert layer(x).dtype == torch.bfloat16
    layer.input_binarizer.ties = "released"
    assert ops_of(layer, x) == []
    assert kernels.serves(x) and not kernels.serves(x.to("meta"))


# torch


def linear_arguments(rule, requires_grad=False):
    layer = packed_layer(rule, 20, 6)
    codes = engine_codes(layer.input_binarizer)
    layout = None if codes.kind == "float" else layer.layout(codes.layout)
    tensors = (layer.weight_scale, layer.bias.detach())
    scale = None if codes.scale is None else codes.scale.detach()
    shift = None if codes.shift is None else codes.shift.detach()
    return (torch.randn(2, 3, 20), layer.weight, layout, *tensors, codes.kind, codes.width, codes.low, scale, shift)


@pytest.mark.parametrize("rule", ["float", "elastic1", "elastic4u", "token"])
@needs_library
def test_linear_is_a_proper_operator(rule):
    torch.library.opcheck(torch.ops.rebnn.linear.default, linear_arguments(rule))


@needs_library
def test_linear_makes_its_own_layout_and_reads_half_precision():
    x, bits, layout, scale, bias, *codes = linear_arguments("elastic4u")
    expected = torch.ops.rebnn.linear(x, bits, layout, scale, bias, *codes)
    assert torch.equal(torch.ops.rebnn.linear(x, bits, None, scale, bias, *codes), expected)
    torch.library.opcheck(torch.ops.rebnn.linear.default, (x.bfloat16(), bits, None, scale, None, *codes))


@needs_library
def test_embedding_is_a_proper_operator():
    bits, indices = pack_signs(signs_of("random", 9, 20)), torch.tensor([[1, 2], [8, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.rebnn.embedding.default, (indices, bits, torch.rand(9).to(dtype), 20))


@needs_library
def test_attention_is_a_proper_operator():
    for table, mask in ((None, None), (torch.ones(33), padding_of([5, 2], 5))):
        arguments = (*heads_of(2, 3, 5, 32, 0), mask, table, torch.ones(1), torch.ones(1))
        torch.library.opcheck(torch.ops.rebnn.attention.default, arguments)
    halves = [x.bfloat16() for x in heads_of(2, 3, 5, 32, 0)]
    torch.library.opcheck(torch.ops.rebnn.attention.default, (*halves, None, None, torch.ones(1), torch.ones(1)))


def recording(graphs):
    """A compiler that keeps the code of what it is given."""

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    return backend


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ran_before", [True, False])
@needs_library
def test_compiled_layer(rule, ran_before):
    layer, x = packed_layer(rule), torch.randn(3, 65)
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(x) if ran_before else packed_layer(rule)(x)
        found = torch.compile(layer, backend=recording(graphs := []), fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert ["ops.rebnn.linear" in graph for graph in graphs] == [True]


@needs_library
def test_compiled_layer_gives_the_same_gradients():
    layer, x = packed_layer("elastic1"), torch.randn(3, 65, requires_grad=True)
    results = []
    torch.compiler.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        results.append((x.grad, layer.bias.grad, layer.input_binarizer.shift.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rule", ["float", "elastic1", "token"])
@needs_library
def test_exported_layer(rule):
    layer = packed_layer(rule).requires_grad_(False)
    x = torch.randn(3, 65)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert "rebnn.linear" in program.graph_module.code
    x = torch.randn(7, 65)
    assert torch.equal(program.module()(x), layer(x))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_ceiling_does_what_it_is_asked_for(isa, monkeypatch):
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
    once = cpu.ceiling(1)
    assert once > 0 and cpu.ceiling(0) == 0
    assert cpu.ceiling(2 * once) == 2 * once and cpu.ceiling(2 * once + 1) == 3 * once


@needs_library
def test_a_prepared_call_reads_its_inputs_when_it_is_called():
    bits = pack_signs(torch.randn(5, 70) > 0)
    scale, x = torch.rand(5), torch.randn(3, 70)
    call = cpu.prepare_linear(x, cpu.layout(bits, 70, cpu.WORDS), scale, None, "sign", 1, 0, 1.0, None)
    first = call().clone()
    x.neg_()
    assert torch.equal(call(), -first)
