"""The balance rule's passes over weights: the C library against torch, and both against numbers."""

import math

import pytest
import torch

from rebnn_hf import kernels
from rebnn_hf.functional import WeightRule, latent_mean, scale_gradient
from rebnn_hf.kernels import cpu
from rebnn_hf.passes import count_flips, measure, pull

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_library)]
CENTERS = {
    "none": WeightRule(),
    "row": WeightRule(center="row"),
    "tensor": WeightRule(center="tensor", granularity="tensor"),
}
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 33), (400, 769)]  # the last one is shared by threads


def numbers(*shape, seed=0):
    """Weights around 0, some of them 0 and -0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = x.flatten()
    flat[::5] = 0.0
    flat[::7] = -0.0
    return x


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def on_both(function):
    """Results of the two backends."""
    results = []
    for backend in ("reference", "cpu"):
        with kernels.use_backend(backend):
            results.append(function())
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    """alpha = 0.3, gamma = 0.5 in the first row, 0 in the second."""
    weight, gradient = torch.tensor([[0.1, -0.5], [0.0, 2.0]]), torch.tensor([[1.0, -4.0], [8.0, 0.0]])
    with kernels.use_backend(backend):
        signs, largest = measure(weight, None, gradient)
        by_scale = pull(weight, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.0]), gradient)
        flips, flips_back = count_flips(torch.tensor([[0.1, 0.5], [-1.0, -2.0]]), None, signs, None)
    assert largest.tolist() == [4, 8]
    torch.testing.assert_close(gradient, torch.tensor([[1 + 0.5 * (0.1 - 0.3), -4 + 0.5 * (-0.5 + 0.3)], [8.0, 0.0]]))
    torch.testing.assert_close(by_scale, torch.tensor([-0.5 * (0.6 - 2 * 0.3), 0.0]))
    assert signs.tolist() == [[False, True], [True, True]]  # now: which have flipped
    assert flips.tolist() == [1, 2] and flips_back.tolist() == [0, 0]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", CENTERS.values(), ids=CENTERS)
def test_c_measures_and_counts_what_torch_does(shape, rule, threads):
    weight, later, gradient = numbers(*shape), numbers(*shape, seed=1), numbers(*shape, seed=2)
    earlier = numbers(*shape, seed=3) > 0

    def passes():
        signs, largest = measure(weight, latent_mean(weight, rule), gradient)
        before = signs.clone()
        counts = count_flips(later, latent_mean(later, rule), signs, earlier)
        return before, largest, signs, *counts

    mine, theirs = on_both(passes)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert mine[3].sum() > 0 or weight.numel() == 1


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_c_pulls_as_torch_does(shape, granularity, threads):
    """Gradients of weights to the bit; those of scales, small differences of large sums, to the rounding of these."""
    weight, gamma = numbers(*shape), numbers(shape[0], seed=4).abs()
    gamma[1::3] = 0.0
    scale = 0.1 + numbers(shape[0] if granularity == "row" else 1, seed=5).abs()

    def passes():
        gradient = numbers(*shape, seed=2)
        return pull(weight, scale, gamma, gradient), gradient

    (by_scale, gradient), (c_by_scale, c_gradient) = on_both(passes)
    assert torch.equal(c_gradient, gradient)
    assert torch.equal(gradient, numbers(*shape, seed=2)) == (not gamma.any())
    norm, width = weight.double().abs().sum(-1), shape[1]
    exact = scale_gradient(norm, width, scale.double(), gamma.double())
    rounding = 2e-6 * gamma * (norm + width * scale)
    rounding = rounding if granularity == "row" or shape[0] == 1 else rounding.sum(0, True)
    for result in (by_scale, c_by_scale):
        assert ((result - exact).abs() <= rounding).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(backend, spoiled):
    """Wherever in its row it stands, and whatever stands beside it."""
    for place in range(19):
        gradient = torch.full((2, 19), 1e38)
        gradient[1, place] = spoiled
        with kernels.use_backend(backend):
            _, largest = measure(torch.ones(2, 19), None, gradient)
        assert largest.isfinite().tolist() == [True, False]


@needs_library
def test_what_does_not_fit_is_refused():
    weight, signs = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gradient must be .* of shape \(2, 3\)"):
        cpu.balance_measure(weight, None, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"mean must be .* of shape \(2,\)"):
        cpu.balance_measure(weight, torch.ones(3), weight)
    with pytest.raises(ValueError, match="weight must be a contiguous"):
        cpu.balance_count(torch.ones(3, 2).T, None, signs, None)
    with pytest.raises(ValueError, match="earlier must be"):
        cpu.balance_count(weight, None, signs, signs[:1])
    with pytest.raises(ValueError, match="gamma must be"):
        cpu.balance_pull(weight, torch.ones(2), torch.ones(1), weight.clone())
