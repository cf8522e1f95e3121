"""The passes over all latent weights that the balance rule makes in a step: in C on the CPU, in torch elsewhere.

In C each is one pass through memory. Both give the same signs, flips and gradients of the weights, to the bit; the
norms of the rows may differ by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import is_positive, reconstruction_gradients, scale_gradient, sign
from .kernels import backend, cpu


def measure(weight: Tensor, mean: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Before the step: where `W - mu >= 0`, and `max_j |dW_ij|`.

    Args:
        weight: W [O, M].
        mean: mu [O, 1] or [], what the weight rule subtracts; None for 0.
        gradient: dW [O, M].

    Returns:
        Signs, bool [O, M], and the largest magnitudes [O]: NaN where a row of the gradient holds one.
    """
    if _in_c(weight, gradient):
        return cpu.balance_measure(weight, _by_row(mean, weight), gradient)
    return is_positive(_centered(weight, mean)), gradient.abs().amax(-1)  # several times faster than the infinity norm


def pull(weight: Tensor, scale: Tensor, gamma: Tensor, gradient: Tensor) -> Tensor:
    """Add `gamma_i (w_i - alpha_i b_i)` (A2) to the gradient of weights that are not centered, in place.

    Args:
        weight: W [O, M].
        scale: alpha [O] or [1].
        gamma: [O].
        gradient: dW [O, M], changed.

    Returns:
        dL_R/dalpha, shaped like `scale`.
    """
    if _in_c(weight, gradient):
        norm = cpu.balance_pull(weight, scale.expand_as(gamma).contiguous(), gamma, gradient)
        return scale_gradient(norm, weight.shape[1], scale, gamma)
    by_weight, by_scale = reconstruction_gradients(weight, sign(weight), scale, gamma)
    gradient += by_weight
    return by_scale


def count_flips(weight: Tensor, mean: Tensor | None, signs: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
    """After the step: which signs have changed, and how many.

    Args:
        weight: W [O, M], after the step.
        mean: as for `measure`.
        signs: those before it, bool [O, M]; becomes where they have changed.
        earlier: where they changed in the step before, bool [O, M], or None.

    Returns:
        Changed signs of each row, and those of them that changed in the step before too, integers [O].
    """
    if _in_c(weight):
        return cpu.balance_count(weight, _by_row(mean, weight), signs, earlier)
    flipped = signs.bitwise_xor_(is_positive(_centered(weight, mean)))
    flips = _true_per_row(flipped)
    return flips, torch.zeros_like(flips) if earlier is None else _true_per_row(flipped & earlier)


def _in_c(*tensors: Tensor) -> bool:
    fit = all(t.device.type == "cpu" and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
    return fit and backend() == "cpu"


def _by_row(mean: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if mean is None else mean.expand(len(weight), 1).contiguous().flatten()


def _centered(weight: Tensor, mean: Tensor | None) -> Tensor:
    return weight if mean is None else weight - mean


def _true_per_row(mask: Tensor) -> Tensor:
    """Number of true entries of each row; in 32 bits it is four times faster than the default of 64."""
    return mask.sum(-1, dtype=torch.int32)
