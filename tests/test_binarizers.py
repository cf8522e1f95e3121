"""Activation layers: calibration, saving, and their place in linear layers of both states."""

import math

import pytest
import torch
from torch import nn

from rebnn_hf import calibrate
from rebnn_hf.activations import ActivationRule
from rebnn_hf.binarizers import Elastic, RPReLU, ShiftedSign, binarizer_of
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryLinear

KINDS = [("sign", 1), ("rsign", 1), ("elastic", 1), ("elastic", 2), ("elastic", 4), ("elastic", 8), ("token", 8)]
WIDTHS = [1, 3, 8, 33, 64, 127]


def layer(kind, bits, width=33, signed=True, dtype=torch.float64):
    torch.manual_seed(width)
    latent = BinaryLinear.from_float(nn.Linear(width, 5, dtype=dtype), WeightRule())
    binarizer = binarizer_of(ActivationRule(kind, bits), width, signed)
    latent.input_binarizer = binarizer.to(dtype)
    for parameter in binarizer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return latent


def explicit_input(binarizer, x):
    """x_b written out from the formulas, not from the layer."""
    kind = type(binarizer).__name__
    if kind == "ClippedSign":
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    if kind == "ShiftedSign":
        return torch.where(x + binarizer.shift >= 0, 1.0, -1.0).to(x.dtype)
    if kind == "TokenInt8":
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step
    a, z = binarizer.scale.abs(), x + binarizer.shift
    if binarizer.signed and binarizer.bits == 1:
        return a * torch.where(z >= 0, 1.0, -1.0).to(x.dtype)
    k = binarizer.bits
    low, high = (-(2 ** (k - 1)), 2 ** (k - 1) - 1) if binarizer.signed else (0, 2**k - 1)
    return a * (z / a + 0.5).floor().clamp(low, high)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind, bits", KINDS)
def test_linear_multiplies_few_bits_with_signs_in_both_states(kind, bits, width, signed):
    latent = layer(kind, bits, width, signed)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    calibrate(latent, {"x": x})
    expected = explicit_input(latent.input_binarizer, x) @ latent.binary_weight().T + latent.bias
    torch.testing.assert_close(latent(x), expected)
    assert torch.equal(latent.pack()(x), latent(x))


@pytest.mark.parametrize("kind, bits", KINDS)
def test_gradients_are_those_of_the_product_of_binary_input_and_weight(kind, bits):
    """Codes and scales are kept apart for exactness; autograd through both is that of y = x_b W_hat^T."""
    latent, x = layer(kind, bits), torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    calibrate(latent, {"x": x.detach()})
    upstream = torch.randn(4, 5, dtype=torch.float64)
    latent(x).backward(upstream)
    grad_input = upstream @ latent.binary_weight()  # dL/dx_b
    binarizer = latent.input_binarizer
    shift = getattr(binarizer, "shift", None)
    z = x.detach() if shift is None else x.detach() + shift.detach()
    if kind == "elastic":
        a = binarizer.scale.detach().abs()
        low, high = (-1, 1) if bits == 1 else (binarizer.low, binarizer.high)
        window = (low * a <= z) & (z <= high * a)
        u, code = z / a, explicit_input(binarizer, x.detach()) / a
        by_scale = code if bits == 1 else torch.where(window, code - u, code)
        expected = (by_scale * grad_input).sum() / math.sqrt(z.numel() * max(binarizer.high, 1))
        torch.testing.assert_close(binarizer.scale.grad, expected.reshape(1) * binarizer.scale.sign())
        slope = window.to(z.dtype)
    else:
        slope = {"sign": (z.abs() <= 1).double(), "rsign": (2 - 2 * z.abs()).clamp_min(0), "token": torch.ones_like(z)}[
            kind
        ]
    torch.testing.assert_close(x.grad, grad_input * slope)
    if shift is not None:
        torch.testing.assert_close(shift.grad, (grad_input * slope).sum(0))
    torch.testing.assert_close(latent.bias.grad, upstream.sum(0))


@pytest.mark.parametrize(
    "bits, signed, expected",
    [(1, True, 1.2), (1, False, 2.4), (2, True, 1.2), (2, False, 2.4 / math.sqrt(3)), (8, True, 1.2 / math.sqrt(127))],
)
def test_scale_starts_from_the_mean_of_the_data(bits, signed, expected):
    """Oracle C1: 2 mean|x| = 1.2 signed, 4 mean|x| unsigned; divided by the root of the largest code."""
    elastic = Elastic(bits, signed, 2.0 if signed else 4.0, features=5)
    elastic.calibrate(torch.tensor([-0.9, -0.2, 0.1, 0.6, 1.2]))
    assert elastic.scale.item() == pytest.approx(expected)


def test_probabilities_worked_example():
    """Oracle C3: four keys, scale 4/4 = 1, so only what passes one half stays."""
    elastic = Elastic(1, False, 4.0)
    probabilities = torch.tensor([0.125, 0.125, 0.125, 0.625])
    elastic.calibrate(probabilities)
    codes, scale = elastic(probabilities)
    assert (codes * scale).tolist() == [0, 0, 0, 1]


class Two(nn.Module):
    """A second layer whose inputs depend on the scale of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layer("elastic", 1, 8), layer("elastic", 2, 5)

    def forward(self, x):
        return self.second(self.first(x))


def test_calibration_sees_what_calibrated_layers_make_of_the_batch_and_happens_once():
    model, x = Two(), torch.randn(6, 8, dtype=torch.float64)
    first, second = model.first.input_binarizer, model.second.input_binarizer
    model.train()
    assert calibrate(model, {"x": x}) == 2 and model.training
    assert first.scale.item() == pytest.approx(2 * (x + first.shift).abs().mean().item())
    with torch.no_grad():
        hidden = model.first(x)
    assert second.scale.item() == pytest.approx(2 * (hidden + second.shift).abs().mean().item())
    before = first.scale.clone()
    assert calibrate(model, {"x": 3 * x}) == 0 and torch.equal(first.scale, before)


@pytest.mark.parametrize("parts", [0, -1, 2.0, True, None])
def test_parts_are_a_number_of_parts(parts):
    model = Two()
    with pytest.raises(ValueError, match="must be an integer >= 1: processes times gradient accumulation steps"):
        calibrate(model, {"x": torch.randn(6, 8, dtype=torch.float64)}, parts=parts)
    assert not model.first.input_binarizer.calibrated


def test_without_a_scale_there_is_an_error_in_words_and_no_answer():
    with pytest.raises(RuntimeError, match=r"no scale yet: train with ReBNNTrainer, or call\s+rebnn_hf.calibrate"):
        layer("elastic", 1)(torch.zeros(1, 33, dtype=torch.float64))


def test_layers_out_of_reach_are_named():
    model = Two()
    model.forward = lambda x: model.first(x)
    with pytest.raises(ValueError, match=r"1 elastic activations were not reached by the batch \(first: second"):
        calibrate(model, {"x": torch.randn(2, 8, dtype=torch.float64)})


def test_a_failed_calibration_leaves_no_scale_and_no_mode_behind():
    model = Two()
    model.train()
    model.second.eval()
    good, model.second.forward = model.second.forward, lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        calibrate(model, {"x": torch.randn(2, 8, dtype=torch.float64)})
    assert not model.first.input_binarizer.calibrated and not model.first.input_binarizer.scale.any()
    assert model.training and model.first.training and not model.second.training
    model.second.forward = good
    assert calibrate(model, {"x": torch.randn(2, 8, dtype=torch.float64)}) == 2


def test_codes_of_eight_bits_are_exact_in_bfloat16():
    """bfloat16 cannot hold 128.5: rounding by adding a half would give 129 for 128."""
    elastic = Elastic(8, False, 4.0).to(torch.bfloat16)
    with torch.no_grad():
        elastic.scale.fill_(1.0)
    elastic.check_calibration()
    x = torch.arange(256).to(torch.bfloat16)
    assert torch.equal(elastic(x)[0].float(), torch.arange(256.0))


def test_a_loaded_scale_counts_as_calibrated():
    source, target = Elastic(2, True, 2.0, 4), Elastic(2, True, 2.0, 4)
    target.load_state_dict(source.state_dict())
    assert not target.calibrated
    source.calibrate(torch.ones(3, 4))
    target.load_state_dict(source.state_dict())
    assert target.calibrated and torch.equal(target(torch.ones(2, 4))[0], source(torch.ones(2, 4))[0])


def test_scales_stay_positive_whatever_the_optimizer_does():
    elastic = Elastic(1, True, 2.0)
    elastic.calibrate(torch.ones(4))
    with torch.no_grad():
        elastic.scale.fill_(-0.5)
    assert elastic(torch.ones(4))[1].item() == 0.5
    with torch.no_grad():
        elastic.scale.fill_(-1e-9)
    assert elastic(torch.ones(4))[1].item() == pytest.approx(1e-5)


def test_layers_start_as_published():
    assert ShiftedSign(4).shift.tolist() == [0] * 4
    rprelu = RPReLU(2)
    assert rprelu(torch.tensor([-4.0, 2.0])).tolist() == [-1, 2]
    assert {name for name, _ in rprelu.named_parameters()} == {"shift_in", "slope", "shift_out"}


def test_half_precision_int8_does_not_overflow():
    """127 * 768 passes 65504; with both scales applied the result does not."""
    latent = BinaryLinear(768, 1, bias=False, dtype=torch.float16)
    nn.init.constant_(latent.weight, 0.03)
    latent.reset_scale()
    latent.input_binarizer = binarizer_of(ActivationRule("token", 8), 768)
    x = torch.full((1, 768), 2.0, dtype=torch.float16)
    expected = torch.tensor([[768 * 2 * 0.03]], dtype=torch.float16)
    torch.testing.assert_close(latent(x), expected, rtol=2e-3, atol=0)
