"""Units of the image models against their equations, forward and backward, in float64."""

import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")

import equations
from operators import Recorded
from torch import nn

from rebnn_hf import kernels
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryConv2d
from rebnn_hf.vision.blocks import REACTNET, AveragePool, BinaryUnit, ChannelRPReLU, SignConv2d, fold
from rebnn_hf.vision.reactnet import _block
from rebnn_hf.vision.resnet import _stage

KINDS = {"learned": WeightRule(), "mean_abs": REACTNET, "float": None}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def image(chs, height=5, width=7):
    return torch.randn(2, chs, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_resnet_units(kind):
    first, second = equations.randomize(_stage(1, 2, KINDS[kind]).double())
    x = image(64)
    y = first(x)
    assert y.shape == (2, 128, 3, 4)
    torch.testing.assert_close(y, equations.unit(first, x, kind, equations.downsampled(first), stride=2))
    torch.testing.assert_close(second(y), equations.unit(second, y, kind, lambda x: x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out_chs", [8, 16])
def test_mobilenet_block(kind, stride, out_chs):
    block = equations.randomize(_block(8, out_chs, stride, KINDS[kind]).double())
    x = image(8)
    spatial = equations.unit(block.spatial, x, kind, equations.halve if stride == 2 else lambda x: x, stride)
    expected = equations.unit(block.pointwise, spatial, kind, lambda x: torch.cat([x] * (out_chs // 8), 1))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("height, width", [(6, 8), (5, 8), (7, 7)])
def test_average_pool_is_the_same_with_and_without_gradients(height, width):
    x = image(3, height, width).float()
    with torch.no_grad():
        found = AveragePool()(x)
    assert torch.equal(found, AveragePool()(x))
    torch.testing.assert_close(found, equations.halve(x))


def test_padding_is_behind_the_sign(kind):
    unit = equations.randomize(BinaryUnit(1, 1, 3, rule=KINDS[kind]).double())
    y = unit.conv(torch.ones(1, 1, 1, 1, dtype=torch.float64) * 9)
    torch.testing.assert_close(y[0, 0], equations.weight_of(unit.conv, kind)[0, :, 1, 1].view(1, 1))


def test_gradients_of_a_unit(kind):
    """dW = G * 1[|W| <= 1], times alpha for the chain rule of learned scales; d alpha = sum G b (A2, D3); D1 for x."""
    unit = equations.randomize(BinaryUnit(4, 6, 3, 2, nn.AvgPool2d(2), KINDS[kind]).double())
    unit.shortcut = nn.Conv2d(4, 6, 1, stride=2, bias=False).double()  # any shortcut
    x = image(4, 6, 6).requires_grad_()
    conv, shift = unit.conv, unit.conv.input_binarizer.shift
    unit(x).sin().sum().backward()

    z = x.detach() + equations.by_channel(shift.detach())
    codes = equations.sign(z).requires_grad_()
    weight = equations.weight_of(conv, kind).detach().requires_grad_()
    by_shortcut = x.detach().requires_grad_()
    y = equations.norm(equations.convolve(codes, weight, 2), unit.norm) + unit.shortcut(by_shortcut)
    equations.rprelu(y, unit.act.shift_in, unit.act.slope, unit.act.shift_out).sin().sum().backward()

    G, window = weight.grad, (conv.weight.abs() <= 1).double()
    assert 0 < window.mean() < 1
    if kind == "learned":
        alpha = conv.weight_scale
        torch.testing.assert_close(conv.weight.grad, G * window * alpha.detach().abs()[:, None, None, None])
        by_scale = (G * equations.sign(conv.weight.detach())).sum((1, 2, 3)) * alpha.detach().sign()
        torch.testing.assert_close(alpha.grad, by_scale)
    else:
        torch.testing.assert_close(conv.weight.grad, G * window if kind == "mean_abs" else G)
    by_codes = codes.grad * (2 - 2 * z.abs()).clamp(min=0)
    torch.testing.assert_close(x.grad, by_codes + by_shortcut.grad)
    torch.testing.assert_close(shift.grad, by_codes.sum((0, 2, 3)))


def test_rsign_oracle(kind):
    """D1: slopes 2 - 2|x| at +-1.5, +-.75, +-.25, whatever the channel they are in."""
    values = torch.tensor([1.5, -1.5, 0.75, -0.75, 0.25, -0.25], dtype=torch.float64)
    conv = BinaryUnit(6, 6, 1, rule=KINDS[kind]).double().conv
    with torch.no_grad():
        conv.weight.copy_(torch.eye(6)[:, :, None, None] * 2 - 1)  # signs +1 on the diagonal, else -1
        conv.input_binarizer.shift.copy_(values)
        if kind == "learned":
            conv.weight_scale.fill_(1)
    x = torch.zeros(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    codes = torch.tensor([1, -1, 1, -1, 1, -1], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), 2 * codes - codes.sum())
    y[0, 2].backward()
    slopes = torch.tensor([0, 0, 0.5, 0.5, 1.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(x.grad.flatten(), slopes * torch.tensor([-1, -1, 1, -1, -1, -1]))


def test_rprelu_oracle():
    """D2, and a channel of its own for each set of parameters."""
    act = ChannelRPReLU(2).double()
    assert [p.tolist() for p in act.parameters()] == [[0, 0], [0.25, 0.25], [0, 0]]
    with torch.no_grad():
        for parameter, values in zip(act.parameters(), ([-0.5, 0.0], [0.25, 0.5], [0.1, 3.0]), strict=True):
            parameter.copy_(torch.tensor(values))
    x = torch.tensor([-1, 0.5, 2], dtype=torch.float64).expand(1, 2, 1, 3)
    expected = torch.tensor([[[[-0.275, 0.1, 1.6]], [[2.5, 3.5, 5.0]]]], dtype=torch.float64)
    torch.testing.assert_close(act(x), expected, atol=1e-7, rtol=0)


def test_types_and_bias(kind):
    conv = BinaryUnit(4, 4, 3, rule=KINDS[kind]).conv
    assert type(conv) is (SignConv2d if kind == "float" else BinaryConv2d) and conv.bias is None
    assert (getattr(conv, "weight_scale", None) is not None) == (kind == "learned")


needs_engine = pytest.mark.skipif(not kernels.cpu.available(), reason=kernels.cpu.why_not() or "it is there")


def packed_units():
    """Two units, the first of stride 2, of a model in eval mode."""
    units = equations.randomize(_stage(1, 2, WeightRule())).eval()
    for unit in units:
        unit.conv = unit.conv.pack()
    return units


def calls_and_result(units, x):
    with torch.no_grad(), Recorded() as engine:
        y = units(x)
    return engine.names, y


@needs_engine
def test_a_packed_unit_is_one_call_and_gives_what_its_layers_give():
    first = packed_units()[0]
    x = image(64).float()
    with torch.no_grad():
        codes = equations.sign(first.conv.input_binarizer.shift[:, None, None] + x)
        y = equations.convolve(codes, first.conv.to_float().weight, 2)
        z = equations.norm(y, first.norm) + equations.downsampled(first)(x)
        expected = equations.rprelu(z, first.act.shift_in, first.act.slope, first.act.shift_out)
    names, found = calls_and_result(first, x)
    assert names == ["rebnn::conv2d"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found < first.act.shift_out[:, None, None]).any()  # the negative side too


@needs_engine
def test_what_happens_between_the_layers_of_a_unit_is_seen():
    """A hook, training of BatchNorm, gradients: the layers run one by one."""
    unit, x, seen = packed_units()[1], image(128).float(), []
    unit.norm.register_buffer("calls", torch.zeros(()))
    whole = calls_and_result(unit, x)[1]
    hook = unit.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(calls_and_result(unit, x)[1], whole, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert len(seen) == 1
    y = unit(x.requires_grad_())
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    unit.norm.train()
    before = unit.norm.running_mean.clone()
    calls_and_result(unit, x.detach())
    assert not torch.equal(unit.norm.running_mean, before)


@needs_engine
def test_a_changed_norm_is_folded_anew():
    unit, x = packed_units()[1], image(128).float()
    calls_and_result(unit, x)
    with torch.no_grad():
        unit.norm.running_mean.add_(3)
        unit.norm.weight.mul_(-2)
        expected = unit.act(unit.norm(unit.conv(x)) + x)
    torch.testing.assert_close(calls_and_result(unit, x)[1], expected, rtol=1e-5, atol=1e-5)


def test_folding_is_batch_norm():
    norm = equations.randomize(nn.BatchNorm2d(6)).double().eval()
    scale, y = torch.rand(6, dtype=torch.float64), image(6)
    factor, offset = fold(scale, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    found = factor.double()[:, None, None] * y + offset.double()[:, None, None]
    torch.testing.assert_close(found, norm(scale[:, None, None] * y), rtol=1e-6, atol=1e-6)
