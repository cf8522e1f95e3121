"""The equations against worked numbers (float64) and against explicit autograd formulations."""

import math

import pytest
import torch

from rebnn_hf.functional import (
    BalanceRule,
    WeightRule,
    balance,
    binarize_rows,
    decoupled_share,
    largest_gradient,
    mean_abs_scale,
    reconstruction_gradients,
    reconstruction_loss,
    sign,
    through_window,
)

DOUBLE = torch.float64
BWN = WeightRule(scale="mean_abs", slope="unit")


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=DOUBLE, requires_grad=grad)


def latent_gradient(weight, upstream, rule, scale=None):
    """dW for a given G = dL/dW_hat."""
    weight = weight.clone().requires_grad_()
    signs, scale = binarize_rows(weight, scale, rule)
    (signs * scale.unsqueeze(-1) * upstream).sum().backward()
    return weight.grad


def test_sign_of_zero_is_plus_one():
    assert sign(tensor(-0.0, 0.0, -1e-300, 1e-300)).tolist() == [1, 1, -1, 1]


def test_rebnn_forward_and_gradients():
    weight = tensor([0.3, -0.1, 0.05, -0.45], [1.2, -0.2, 0.4, -0.6], grad=True)
    alpha = tensor(0.2, 0.5, grad=True)
    gamma = tensor(0.01, 0.04)
    x, upstream = tensor(1, 2, -1, 0.5), tensor(1, -2)
    signs, scale = binarize_rows(weight, alpha, WeightRule())
    y = (signs @ x) * scale
    torch.testing.assert_close(y, tensor(-0.5, -1.25))
    y.backward(upstream)
    torch.testing.assert_close(alpha.grad, tensor(-2.5, 5))  # task part
    assert weight.grad[1, 0] == 0  # |1.2| > 1 is outside the window
    torch.testing.assert_close(largest_gradient(weight.grad.abs().amax(-1), scale, WeightRule()), tensor(2, 4))

    by_weight, by_scale = reconstruction_gradients(weight.detach(), signs.detach(), scale.detach(), gamma)
    torch.testing.assert_close(by_scale, tensor(-0.001, -0.016))
    torch.testing.assert_close(
        weight.grad + by_weight, tensor([0.201, 0.401, -0.2015, 0.0975], [0.028, -1.988, 0.996, -0.504])
    )
    torch.testing.assert_close(alpha.grad + by_scale, tensor(-2.501, 4.984))
    loss = reconstruction_loss(weight.detach(), signs, scale.detach(), gamma)
    assert loss.item() == pytest.approx(0.012525, abs=1e-12)
    torch.testing.assert_close(mean_abs_scale(weight.detach()), tensor(0.225, 0.6))  # minimises L_R


def test_closed_form_scale_minimises_the_reconstruction_loss():
    weight = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    best = mean_abs_scale(weight)
    _, by_scale = reconstruction_gradients(weight, sign(weight), best, torch.ones(3, dtype=DOUBLE))
    torch.testing.assert_close(by_scale, torch.zeros(3, dtype=DOUBLE))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_reconstruction_gradients_equal_autograd(granularity):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, dtype=DOUBLE, generator=generator).requires_grad_()
    scale = torch.rand(4 if granularity == "row" else 1, dtype=DOUBLE, generator=generator).requires_grad_()
    gamma = torch.rand(4, dtype=DOUBLE, generator=generator)
    signs = sign(weight.detach())
    reconstruction_loss(weight, signs, scale, gamma).backward()
    by_weight, by_scale = reconstruction_gradients(weight.detach(), signs, scale.detach(), gamma)
    torch.testing.assert_close(by_weight, weight.grad)
    torch.testing.assert_close(by_scale, scale.grad)


def test_balance_of_flips_and_largest_gradient():
    flips = tensor(0.25, 0)
    largest = tensor(2, 4)
    assert balance(flips, largest, BalanceRule()).tolist() == [0.5, 0]
    assert balance(flips, largest, BalanceRule("maxgrad")).tolist() == [2, 4]
    assert balance(flips, largest, BalanceRule("const")).tolist() == [2e-4, 2e-4]
    assert balance(flips, largest, BalanceRule("none")).tolist() == [0, 0]
    assert balance(flips, largest, BalanceRule(lower=0.1, upper=0.3)).tolist() == [0.3, 0.1]
    assert decoupled_share(flips, BalanceRule(form="decoupled")).tolist() == [0.25, 0]
    assert decoupled_share(flips, BalanceRule("const", value=0.01, form="decoupled")).tolist() == [0.01, 0.01]


def test_bounds_are_not_the_released_code_s():
    """Its swapped clamp returns 2e-4 for every input; ours is a clamp (oracle A7)."""
    p = tensor(0, 1e-7, 1e-5, 1e-4, 1, 100)
    ours = balance(p, torch.ones_like(p), BalanceRule(lower=1e-5, upper=2e-4))
    torch.testing.assert_close(ours, tensor(1e-5, 1e-5, 1e-5, 1e-4, 2e-4, 2e-4))


def test_gradient_of_scale_is_not_the_released_code_s():
    """With alpha = 0.02 s: w=[1,-.1], G=[.1,.5] gives dL/ds = -.008; the released code has +.05 (oracle A7)."""
    s = tensor(1.0, grad=True)
    signs, scale = binarize_rows(tensor([1, -0.1]), 0.02 * s, WeightRule())
    (signs * scale.unsqueeze(-1) * tensor([0.1, 0.5])).sum().backward()
    assert s.grad.item() == pytest.approx(-0.008, abs=1e-15)


@pytest.mark.parametrize("grad, plain, held", [(-0.3, 0.005, -0.0048), (-0.4, 0.01, 0.0002)])
def test_flip_threshold_under_sgd(grad, plain, held):
    """eta=.1, alpha=.5, gamma=.2, w=-.01: S moves the threshold from G < -.2 to G < -.396 (oracle A3, A5)."""
    eta, alpha, gamma, weight = 0.1, tensor(0.5), tensor(0.2), tensor([-0.01])
    task = alpha * grad
    by_weight, _ = reconstruction_gradients(weight, sign(weight), alpha, gamma)
    assert (weight - eta * task).item() == pytest.approx(plain, abs=1e-12)
    assert (weight - eta * (task + by_weight)).item() == pytest.approx(held, abs=1e-12)


def test_no_flip_when_the_balance_is_the_largest_gradient_of_the_step():
    """gamma = max_j |G_j| of the same step forbids every flip under SGD; gamma = 0 does not (oracle A5)."""
    generator = torch.Generator().manual_seed(2)
    weight = 0.02 * torch.randn(64, 32, dtype=DOUBLE, generator=generator)
    alpha = mean_abs_scale(weight)
    grad = torch.randn(64, 32, dtype=DOUBLE, generator=generator)
    gamma = grad.abs().amax(-1)
    by_weight, _ = reconstruction_gradients(weight, sign(weight), alpha, gamma)
    task = alpha.unsqueeze(-1) * grad
    eta = 0.9 / gamma.max()
    assert (sign(weight - eta * task) != sign(weight)).any()
    assert not (sign(weight - eta * (task + by_weight)) != sign(weight)).any()


def test_row_centering_as_bibert():
    weight = tensor([0.4, -0.2, 0.13, 0.1])  # 0.13, not 0.1: a tie with the mean would be decided by rounding
    rule = WeightRule(scale="mean_abs", center="row", slope="unit")
    signs, scale = binarize_rows(weight, None, rule)
    assert signs.tolist() == [[1, -1, 1, -1]]
    assert scale.item() == pytest.approx(0.2075)  # mean |W| of the row before centering
    torch.testing.assert_close(
        latent_gradient(tensor([0.4, -0.2, 0.1, 0.1]), tensor([1, 2, 3, -2]), rule), tensor([0, 1, 2, -3])
    )


def test_tensor_centering_as_bit():
    weight = tensor([0.5, -0.1], [0.2, -0.4])
    rule = WeightRule(
        scale="mean_abs", granularity="tensor", center="tensor", center_gradient=False, ste="identity", slope="unit"
    )
    signs, scale = binarize_rows(weight, None, rule)
    torch.testing.assert_close(signs * scale, tensor([0.3, -0.3], [0.3, -0.3]))
    upstream = tensor([1, -2], [3, 4])
    torch.testing.assert_close(latent_gradient(weight, upstream, rule), upstream)


@pytest.mark.parametrize(
    "rule, expected",
    [
        (BWN, [1, -1, 2, 0]),  # ReActNet
        (WeightRule(scale="mean_abs"), [0.55, -0.55, 1.1, 0]),
        (WeightRule(scale="mean_abs", scale_gradient="xnor"), [0.8, -0.8, 1.6, 0.125]),
        (WeightRule(scale="mean_abs", scale_gradient="exact"), [1.675, -1.675, 2.225, 1.125]),
        (WeightRule(scale="mean_abs", slope="unit", ste="identity"), [1, -1, 2, 0.5]),
    ],
    ids=["reactnet", "alpha-ste", "xnor", "exact", "identity"],
)
def test_gradients_of_closed_form_rules(rule, expected):
    weight, upstream = tensor([0.6, -0.2, 0.1, 1.3]), tensor([1, -1, 2, 0.5])
    assert mean_abs_scale(weight).item() == pytest.approx(0.55)
    torch.testing.assert_close(latent_gradient(weight, upstream, rule), tensor(expected))


def test_window_includes_its_bounds():
    weight = tensor([1, -1, 1 + 1e-12, -1 - 1e-12])
    assert latent_gradient(weight, torch.ones(1, 4, dtype=DOUBLE), BWN).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("center", ["none", "row", "tensor"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_learned_rule_equals_explicit_autograd(center, granularity):
    """W_hat = alpha (clip(W~) + (sign(W~) - clip(W~)).detach()): the textbook straight-through estimator."""
    generator = torch.Generator().manual_seed(3)
    weight = (0.7 * torch.randn(5, 7, dtype=DOUBLE, generator=generator)).requires_grad_()
    alpha = torch.rand(5 if granularity == "row" else 1, dtype=DOUBLE, generator=generator).requires_grad_()
    upstream = torch.randn(5, 7, dtype=DOUBLE, generator=generator)

    signs, scale = binarize_rows(weight, alpha, WeightRule(center=center, granularity=granularity))
    (signs * scale.unsqueeze(-1) * upstream).sum().backward()
    ours = weight.grad.clone(), alpha.grad.clone()
    weight.grad = alpha.grad = None

    mean = {"none": 0, "row": weight.mean(-1, keepdim=True), "tensor": weight.mean()}[center]
    centered = weight - mean
    clipped = centered.clamp(-1, 1)
    surrogate = clipped + (sign(centered) - clipped).detach()
    (alpha.unsqueeze(-1) * surrogate * upstream).sum().backward()
    torch.testing.assert_close(ours, (weight.grad, alpha.grad))


def test_scales_stay_positive():
    _, scale = binarize_rows(tensor([1.0, -1]), tensor(-0.5), WeightRule())
    assert scale.item() == 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WeightRule(scale="median"), "scale='median' is unknown; expected one of 'learned', 'mean_abs'"),
        (lambda: WeightRule(scale_gradient="exact"), "closed-form scale"),
        (lambda: BalanceRule("max"), "rule='max' is unknown"),
        (lambda: BalanceRule(lower=2.0, upper=1.0), "lower=2.0 is above upper=1.0"),
        (lambda: BalanceRule("none", lower=1e-5), "rule='none' has a balance of 0, and no bounds (lower=1e-05"),
        (lambda: BalanceRule("none", upper=0.0), "leave them out"),
        (lambda: BalanceRule(value=-1.0), "must be a finite number >= 0"),
        (lambda: BalanceRule("maxgrad", form="decoupled"), "no decoupled form"),
        (lambda: binarize_rows(tensor([1.0]), None, WeightRule()), "needs learned_scale"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1), (0, 3), (-2, 1), (-8, 7), (0, 255), (-128, 127)])
def test_window_is_closed_to_the_last_float(low, high, dtype):
    bounds = torch.tensor([low, high], dtype=dtype)
    beside = [torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-math.inf, math.inf)]
    beside = [
        x.where((x == 0) | (x.abs() >= torch.finfo(dtype).tiny), x.sign() * torch.finfo(dtype).tiny) for x in beside
    ]
    x = torch.cat([bounds, *beside, torch.tensor([-0.0, math.inf, -math.inf, 0.5, -0.5], dtype=dtype)])
    grad = torch.arange(1, len(x) + 1, dtype=dtype)
    expected = torch.where((x >= low) & (x <= high), grad, 0)
    assert torch.equal(through_window(grad, x, low, high), expected)
