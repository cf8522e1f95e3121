"""1-bit convolutions: values and gradients from the equations, padding, packing, the balance rule."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rebnn_hf import kernels
from rebnn_hf.activations import ActivationRule
from rebnn_hf.binarizers import ClippedSign, Elastic, ShiftedSign, TokenInt8, binarizer_of
from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d
from rebnn_hf.functional import BalanceRule, WeightRule
from rebnn_hf.kernels import cpu, use_backend
from rebnn_hf.layers import BinaryLinear
from rebnn_hf.resilience import attach

DOUBLE = torch.float64
GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "1x1": {"kernel_size": 1, "bias": False},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "groups": 2},
}
ON_ENGINE = {"3x3", "stride", "1x1", "oblong"}


def convolution(name="3x3", channels=6, outputs=5, rule=None, binarizer=None, dtype=None, seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, outputs * (2 if name == "groups" else 1), **GEOMETRIES[name], dtype=dtype)
    latent = BinaryConv2d.from_float(conv, rule or WeightRule())
    latent.input_binarizer = binarizer
    return latent


def shifted(channels=6, dtype=None):
    binarizer = ShiftedSign(channels).to(dtype)
    with torch.no_grad():
        binarizer.shift.copy_(torch.linspace(-1, 1, channels))
    return binarizer


def images(*size, dtype=None, seed=1):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rule", [WeightRule(), WeightRule(scale="mean_abs", slope="unit")], ids=["learned", "closed"])
def test_forward_is_the_equation(name, rule):
    """y = alpha * (sign(x + shift) * sign(W)) + bias, zeros at padded positions (A1, D1)."""
    latent = convolution(name, rule=rule, binarizer=shifted(dtype=DOUBLE), dtype=DOUBLE)
    x = images(2, 6, 7, 8, dtype=DOUBLE)
    signs = torch.where(latent.weight >= 0, 1.0, -1.0).to(DOUBLE)
    alpha = latent.weight.abs().mean((1, 2, 3)).view(-1, 1, 1, 1)
    codes = torch.where(x + latent.input_binarizer.shift.view(-1, 1, 1) >= 0, 1.0, -1.0).to(DOUBLE)
    geometry = (latent.stride, latent.padding, latent.dilation, latent.groups)
    torch.testing.assert_close(latent(x), F.conv2d(codes, alpha * signs, latent.bias, *geometry))


def test_padding_is_neither_plus_nor_minus_one():
    """Of a 3x3 kernel of +1 on positive pixels, a corner sees 4 of 9, an edge 6; a shift is not added to padding."""
    latent = BinaryConv2d(1, 1, 3, padding=1, bias=False)
    latent.input_binarizer = ShiftedSign(1)
    with torch.no_grad():
        latent.weight.fill_(0.5)
        latent.weight_scale.fill_(1.0)
        latent.input_binarizer.shift.fill_(3.0)
    seen = torch.tensor([[[[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]]])
    assert torch.equal(latent(torch.ones(1, 1, 3, 3)), seen)
    packed = latent.pack()
    assert torch.equal(packed(torch.ones(1, 1, 3, 3)), seen) and torch.equal(
        packed.reference(torch.ones(1, 1, 3, 3)), seen
    )


def test_gradients_are_those_of_the_linear_layer_it_unfolds_to():
    """A2 for a convolution: each window is a row of inputs of a linear layer with the same rows of weights."""
    latent = convolution(dtype=DOUBLE)
    with torch.no_grad():
        latent.weight[0, 0] = 1.5  # outside the window of the straight-through gradient
    linear = BinaryLinear(54, 5, dtype=DOUBLE)
    linear.load_state_dict({n: t.flatten(1) if n == "weight" else t for n, t in latent.state_dict().items()})
    x, upstream = images(2, 6, 7, 8, dtype=DOUBLE), images(2, 5, 7, 8, dtype=DOUBLE, seed=2)
    windows = F.unfold(x, 3, padding=1).transpose(1, 2)
    y, flat = latent(x), linear(windows)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), flat)
    (y * upstream).sum().backward()
    (flat * upstream.flatten(2).transpose(1, 2)).sum().backward()
    torch.testing.assert_close(latent.weight.grad.flatten(1), linear.weight.grad)
    torch.testing.assert_close(latent.weight_scale.grad, linear.weight_scale.grad)
    assert (latent.weight.grad[0, 0] == 0).all()


@pytest.mark.parametrize("form", ["gradient", "decoupled"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_balance_rule_holds_it_as_it_holds_the_linear_layer(form, channels_last):
    """The same steps, signs and balance, row by row, in any memory format."""
    latent, x = convolution(dtype=DOUBLE), images(4, 6, 5, 5, dtype=DOUBLE)
    with torch.no_grad():
        latent.weight.mul_(0.05)  # small enough that steps flip signs
        latent.weight_scale.fill_(0.3)
    linear = BinaryLinear(54, 5, dtype=DOUBLE)
    linear.load_state_dict({n: t.flatten(1) if n == "weight" else t for n, t in latent.state_dict().items()})
    if channels_last:
        latent.to(memory_format=torch.channels_last)
    windows = F.unfold(x, 3, padding=1).transpose(1, 2)
    target = images(4, 5, 5, 5, dtype=DOUBLE, seed=3)
    balances = []
    for layer, inputs, wanted in ((latent, x, target), (linear, windows, target.flatten(2).transpose(1, 2))):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        handle = attach(optimizer, layer, BalanceRule(form=form, strength=0.5))
        seen = []
        for _ in range(6):
            optimizer.zero_grad()
            (layer(inputs) - wanted).square().mean().backward()
            optimizer.step()
            seen.append(layer.balance.clone())
        (statistics,) = handle.statistics().values()
        balances.append((torch.stack(seen), statistics))
    (of_conv, conv_statistics), (of_linear, linear_statistics) = balances
    assert (of_conv > 0).any()
    torch.testing.assert_close(of_conv, of_linear)
    torch.testing.assert_close(latent.weight.flatten(1), linear.weight)
    assert conv_statistics == pytest.approx(linear_statistics)


BINARIZERS = {
    "rsign": lambda: shifted(),
    "sign": lambda: ClippedSign(),
    "elastic": lambda: binarizer_of(ActivationRule("elastic", 1), 6),
    "elastic-unsigned": lambda: binarizer_of(ActivationRule("elastic", 1), 6, signed=False),
    "elastic-4": lambda: binarizer_of(ActivationRule("elastic", 4), 6),
    "elastic-8": lambda: binarizer_of(ActivationRule("elastic", 8), 6),
}


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
@pytest.mark.parametrize("binarizer", BINARIZERS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_packed_equals_latent_on_both_backends(name, binarizer):
    x = images(3, 6, 9, 8)
    latent = convolution(name, binarizer=BINARIZERS[binarizer]()).eval()
    if isinstance(latent.input_binarizer, Elastic):
        latent.input_binarizer.calibrate(x.movedim(1, -1))
    packed = copy.deepcopy(latent).pack()
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (len(latent.weight), -(-packed.width // 8))
    with torch.inference_mode():
        expected = latent(x)
        with use_backend("reference"):
            assert torch.equal(packed(x), expected)
        with use_backend("cpu"):
            torch.testing.assert_close(packed(x), expected, rtol=1e-6, atol=1e-6)
            assert (packed._layout.value is not None) == (name in ON_ENGINE)


def test_what_the_engine_does_not_compute_is_left_to_the_reference():
    x = images(6, 7, 7)  # a single image; float inputs
    for latent, inputs in ((convolution(binarizer=shifted()), x), (convolution(), x[None])):
        packed = latent.eval().pack()
        torch.testing.assert_close(packed(inputs), latent(inputs))
        assert packed._layout.value is None


def test_gradients_flow_through_a_packed_convolution():
    latent = convolution(binarizer=shifted())
    packed = copy.deepcopy(latent).pack()
    gradients = []
    for layer in (latent, packed):
        x = images(2, 6, 5, 5).requires_grad_()
        (layer(x) * images(2, 5, 5, 5, seed=4)).sum().backward()
        gradients.append((x.grad, layer.bias.grad, layer.input_binarizer.shift.grad))
    for of_latent, of_packed in zip(*gradients, strict=True):
        torch.testing.assert_close(of_packed, of_latent)


def test_to_float_and_half_precision():
    latent = convolution("groups", binarizer=None)
    x = images(2, 6, 7, 7)
    for layer in (latent, copy.deepcopy(latent).pack()):
        plain = layer.to_float()
        assert type(plain) is nn.Conv2d and plain.groups == 2
        torch.testing.assert_close(plain(x), latent(x))
    small = convolution(channels=2).half().pack()
    with torch.no_grad():
        small.weight.fill_(255)
        small.weight_scale.fill_(1e-4)
        small.bias.zero_()
        ones = torch.full((1, 2, 4, 4), 1e4, dtype=torch.float16)
        assert small.reference(ones)[0, 0, 1, 1].item() == pytest.approx(18, rel=1e-2)  # unscaled: 180000 > 65504


def test_errors():
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        BinaryConv2d(3, 4, 3, padding=1, padding_mode="reflect")
    latent = convolution(binarizer=TokenInt8())
    with pytest.raises(ValueError, match="scale for each position"):
        latent(images(1, 6, 5, 5))
    with pytest.raises(ValueError, match=r"expected inputs \[N, 6, H, W\], got \(1, 5, 5, 5\)"):
        convolution().pack()(images(1, 5, 5, 5))


def test_like_and_layout_follow_the_bits():
    conv = nn.Conv2d(6, 5, 3, padding=1)
    packed = PackedConv2d.like(conv)
    packed.input_binarizer = shifted()
    for seed in (0, 1):
        latent = convolution(seed=seed, binarizer=packed.input_binarizer)
        packed.load_state_dict(copy.deepcopy(latent).pack().state_dict())
        x = images(1, 6, 5, 5)
        torch.testing.assert_close(packed(x), latent(x))
    assert kernels.backend() in ("cpu", "reference")
