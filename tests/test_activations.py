"""Activation functions against the worked examples (B2, B3, C1, C2, D1, D2) and explicit autograd formulations."""

import math

import pytest
import torch
import torch.nn.functional as F

from rebnn_hf import activations
from rebnn_hf.activations import (
    ActivationRule,
    bool_gate,
    clipped_sign,
    elastic_levels,
    elastic_sign,
    integer_product,
    lsq_gradient,
    quadratic_sign,
    rprelu,
    token_int8,
)


def tensor(*values, grad=True):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


UP = tensor(1, -2, 3, 4, -5, grad=False)


def test_elastic_sign_worked_example():
    """Oracle C1."""
    x, scale = tensor(-0.9, -0.2, 0.1, 0.6, 1.2), tensor(0.8)
    graded = lsq_gradient(scale, x.numel())
    out = elastic_sign(x, graded) * graded
    assert out.tolist() == [-0.8, -0.8, 0.8, 0.8, 0.8]
    out.backward(UP)
    torch.testing.assert_close(x.grad, tensor(0, -2, 3, 4, 0, grad=False))
    assert scale.grad.item() == pytest.approx(3 / math.sqrt(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_elastic_sign_window_is_exact_at_its_bounds(dtype):
    """Bounds are compared in units of the scale; no scale may round a value into or out of the window."""
    torch.manual_seed(0)
    for scale in (torch.rand(200, dtype=torch.float64) * 4 + 0.01).to(dtype).unsqueeze(-1):
        beside = [torch.nextafter(scale, end * torch.ones_like(scale)) for end in (0, math.inf)]
        x = torch.cat([scale, *beside, -scale, -beside[0], -beside[1]]).requires_grad_()
        elastic_sign(x, scale).backward(torch.ones_like(x))
        assert torch.equal(x.grad, torch.where(x.abs() <= scale, 1 / scale, 0))


@pytest.mark.parametrize("ties, middle", [("up", 0.6), ("released", 0.0)])
def test_elastic_unsigned_worked_example(ties, middle):
    """Oracle C2: 0.3 is exactly half-way, where paper and code differ; so does the gradient of the scale there."""
    x, scale, shift = tensor(-0.1, 0.1, 0.3, 0.5, 0.9), tensor(0.6), tensor(0.0)
    graded = lsq_gradient(scale, x.numel())
    out = elastic_levels(x + shift, graded, 0, 1, ties) * graded
    torch.testing.assert_close(out, tensor(0, 0, middle, 0.6, 0.6, grad=False))
    out.backward(UP)
    torch.testing.assert_close(x.grad, tensor(0, -2, 3, 4, 0, grad=False))
    assert shift.grad.item() == pytest.approx(5)
    per_element = [0, -1 / 6, 1 / 2 if ties == "up" else -1 / 2, 1 / 6, 1]
    expected = sum(g * u for g, u in zip(per_element, UP.tolist(), strict=True)) / math.sqrt(5)
    assert scale.grad.item() == pytest.approx(expected)
    if ties == "released":
        assert scale.grad.item() == pytest.approx(-2.459675, abs=1e-6)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3), (-2, 1), (-8, 7), (0, 255), (-128, 127)])
def test_elastic_levels_equal_the_explicit_formula(low, high):
    torch.manual_seed(high)
    x = (3 * torch.randn(200, dtype=torch.float64)).requires_grad_()
    scale = tensor(3.0 / max(high, 1))
    upstream = torch.randn(200, dtype=torch.float64)
    (elastic_levels(x, scale, low, high) * scale).backward(upstream)
    y, a = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    u = (y / a).clamp(low, high)
    (a * (u + (torch.floor(u + 0.5) - u).detach())).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(scale.grad, a.grad)


def test_lsq_gradient_divides_by_the_root_of_inputs_times_levels():
    scale = tensor(0.7)
    (lsq_gradient(scale, 50, 3) * 2.0).sum().backward()
    assert scale.grad.item() == pytest.approx(2 / math.sqrt(150))


def test_clipped_sign_passes_the_closed_window():
    """B2: inclusive for linear inputs, strict for queries, keys and values."""
    x = tensor(-1.5, -1.0, 0.0, 0.5, 1.0)
    out = clipped_sign(x)
    out.backward(UP)
    assert out.tolist() == [-1, -1, 1, 1, 1] and x.grad.tolist() == [0, -2, 3, 4, -5]
    x.grad = None
    clipped_sign(x, "released", open_window=True).backward(UP)
    assert x.grad.tolist() == [0, 0, 3, 4, 0]
    assert clipped_sign(x, "released").tolist() == [-1, -1, 0, 1, 1]


def test_quadratic_sign_worked_example():
    """Oracle D1, and the slopes as the derivative of the surrogate 2x + x^2 (x < 0), 2x - x^2 (x >= 0)."""
    values = [-1.5, -0.75, -0.25, 0.25, 0.75, 1.5]
    x = tensor(*values)
    quadratic_sign(x).sum().backward()
    assert x.grad.tolist() == [0, 0.5, 1.5, 1.5, 0.5, 0]
    y = tensor(*values)
    z = y.clamp(-1, 1)
    surrogate = torch.where(z < 0, 2 * z + z * z, 2 * z - z * z)
    assert surrogate[[1, 3]].tolist() == [-0.9375, 0.4375]
    surrogate.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_rprelu_worked_example():
    """Oracle D2."""
    x = tensor(-1, 0.5, 2)
    like = torch.ones(3, dtype=torch.float64)
    out = rprelu(x, -0.5 * like, 0.25 * like, 0.1 * like)
    torch.testing.assert_close(out, tensor(-0.275, 0.1, 1.6, grad=False))


@pytest.mark.parametrize(
    "ties, out, grad", [("up", [0, 0, 1, 1, 1], [0, -2, 3, 4, 0]), ("released", [0, 0, 0, 1, 1], 0)]
)
def test_bool_gate(ties, out, grad):
    scores = tensor(-2, -1, 0, 0.5, 1.5)
    active = bool_gate(scores, ties)
    active.backward(UP)
    assert active.tolist() == out
    assert scores.grad.tolist() == (grad or [0, 0, 3, 4, 0])


def test_token_int8_is_as_fine_as_a_127th_of_the_largest():
    torch.manual_seed(0)
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    codes, scale = token_int8(x)
    assert codes.abs().amax(-1).tolist() == [127.0] * 4 and torch.equal(codes, codes.round())
    assert ((codes * scale - x).abs() <= scale / 2 + 1e-12).all()
    upstream = torch.randn_like(x)
    (codes * scale).backward(upstream)
    torch.testing.assert_close(x.grad, upstream)
    zero, tiny = token_int8(torch.zeros(2, 5))
    assert not zero.any() and tiny.isfinite().all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "sign", "bits": 2}, "'sign' comes in 1 bits"),
        ({"kind": "elastic", "bits": 3}, "'elastic' comes in 1, 2, 4, 8 bits"),
        ({"kind": "elastic"}, "activation_bits=32"),
        ({"kind": "binary"}, "kind='binary' is unknown; expected one of 'none', 'sign'"),
        ({"kind": "elastic", "bits": 1, "signed_init": 0.0}, "signed_init=0.0 must be a finite number > 0"),
    ],
)
def test_impossible_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ActivationRule(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, rows", [((3, 5, 33), 7), ((1, 1), 1), ((4, 768), 64), ((2, 3072), 3), ((0, 8), 4), ((9,), 5)]
)
def test_integer_product_is_that_of_floats_bit_for_bit(shape, rows, dtype, monkeypatch):
    monkeypatch.setattr(activations, "INT8_PRODUCTS", True)
    torch.manual_seed(rows)
    results = []
    codes, signs = torch.randint(-128, 128, shape).to(dtype), torch.randn(rows, shape[-1]).sign().to(dtype)
    upstream = torch.randn(*shape[:-1], rows).to(dtype)
    for product in (integer_product, F.linear):
        inputs = [t.clone().requires_grad_() for t in (codes, signs)]
        out = product(*inputs)
        out.backward(upstream)
        results.append((out, *(t.grad for t in inputs)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
