"""The balance rule in an optimizer step: snapshot, reconstruction gradient, flips, balance, oscillation statistics.

It lives in step hooks of the optimizer, not in a custom backward, because there the task gradients are final:
accumulated over micro-batches, reduced over processes, unscaled by a gradient scaler (which also skips the hooks when
it skips a step). The reconstruction term therefore enters exactly once per step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import ReBNNConfig
from .functional import (
    BalanceRule,
    balance,
    center,
    decoupled_share,
    is_positive,
    largest_gradient,
    reconstruction_gradients,
    reconstruction_loss,
    sign,
)
from .layers import LATENT_TYPES

_attached: weakref.WeakSet = weakref.WeakSet()

NEAR_ZERO = 0.1
"""A latent weight is near its flipping point where |w| < 0.1 alpha."""

BLOCK = 2**17
"""Weights in a block of rows on a CPU: with gradient, signs and intermediate results it stays in the L2 cache."""


@dataclass
class _Layer:
    """A latent layer under the rule, with what one step must remember for the next."""

    module: nn.Module
    signs: Tensor | None = None
    largest_grad: Tensor | None = None
    flipped: Tensor | None = None
    window: dict[str, Tensor | float] = field(default_factory=dict)

    def count(self, name: str, amount: Tensor | float) -> None:
        self.window[name] = self.window.get(name, 0) + amount


class Resilience:
    """Handle of the rule attached to one optimizer. Made by `attach`.

    Attributes:
        rule: the balance rule in force.
        layers: names of the layers it holds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: dict[str, _Layer], rule: BalanceRule):
        self.rule = rule
        self._layers = layers
        self._optimizer = weakref.ref(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    @property
    def layers(self) -> list[str]:
        """Names of the layers under the rule."""
        return list(self._layers)

    def detach(self) -> None:
        """Take the hooks off the optimizer; the balance stays in the layers."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _attached.discard(optimizer)

    @torch.no_grad()
    def reconstruction_loss(self) -> float:
        """Value of L_R, summed over layers (A1), with the present weights, scales and balance."""
        total = 0.0
        for layer in self._layers.values():
            module = layer.module
            centered = module.centered()
            total += reconstruction_loss(centered, sign(centered), module.scale(), module.balance).item()
        return total

    @torch.no_grad()
    def statistics(self) -> dict[str, dict[str, float]]:
        """Oscillation statistics of each layer since the last call (A9).

        Returns:
            For each layer name: `weights`, their number; `flip_ratio`, share of weights whose sign changed, mean per
            step; `flip_back_ratio`, share that changed in a step and back in the next, mean per step;
            `scale_to_mean_abs`, mean over rows of alpha / mean|w|; `near_zero_share`, share of |w| < 0.1 alpha;
            `balance_mean` and `balance_max`, over rows. Empty before the first step.
        """
        report = {}
        for name, layer in self._layers.items():
            if not layer.window:
                continue
            module, window = layer.module, layer.window
            magnitude, scale = module.centered().abs(), module.scale().unsqueeze(-1)
            weights = window["steps"] * magnitude.numel()
            report[name] = {
                "weights": magnitude.numel(),
                "flip_ratio": float(window["flips"]) / weights,
                "flip_back_ratio": float(window["flip_backs"]) / weights,
                "scale_to_mean_abs": (scale.squeeze(-1) / magnitude.mean(-1).clamp_min(1e-12)).mean().item(),
                "near_zero_share": (magnitude < NEAR_ZERO * scale).float().mean().item(),
                "balance_mean": module.balance.mean().item(),
                "balance_max": module.balance.max().item(),
            }
            layer.window = {}
        return report

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        _refuse_hidden_gradients(optimizer, args, kwargs)
        for layer in self._layers.values():
            module = layer.module
            if module.weight.grad is None:  # not part of this step: the optimizer leaves the weight alone, so do we
                continue
            layer.signs = torch.empty(len(module.weight), _width(module), dtype=torch.bool, device=module.weight.device)
            layer.largest_grad = torch.empty_like(module.balance)
            scale = module.scale()
            scales = scale.expand_as(module.balance)  # also where there is one for the tensor
            for rows in _row_blocks(module):
                layer.signs[rows] = is_positive(center(module.weight[rows].flatten(1), module.rule))
                gradient = module.weight.grad[rows].flatten(1)
                layer.largest_grad[rows] = largest_gradient(gradient, scales[rows], module.rule)
            if self.rule.form == "gradient":
                if self.rule.rule in ("maxgrad", "const"):  # known before the step, needs no flips
                    module.balance.copy_(balance(layer.largest_grad, layer.largest_grad, self.rule))
                for rows in _held_blocks(module):
                    _add_reconstruction(module, rows, scale)

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        paces = _paces(optimizer) if self.rule.form == "decoupled" else {}
        for layer in self._layers.values():
            if layer.signs is None:
                continue
            module = layer.module
            flips, flips_back = torch.zeros_like(module.balance, dtype=torch.int32).repeat(2, 1)
            for rows in _row_blocks(module):
                signs = is_positive(center(module.weight[rows].flatten(1), module.rule))
                flipped = layer.signs[rows].bitwise_xor_(signs)  # in place of the signs, which are done with
                flips[rows] = _true_per_row(flipped)
                if layer.flipped is not None:
                    flips_back[rows] = _true_per_row(flipped & layer.flipped[rows])
            layer.count("steps", 1)
            layer.count("flips", flips.sum())
            layer.count("flip_backs", flips_back.sum())
            share = flips.to(module.balance.dtype) / _width(module)
            if self.rule.form == "decoupled":
                module.balance.copy_(decoupled_share(share, self.rule))
                self._pull(module, paces[id(module.weight)])
            else:
                module.balance.copy_(balance(share, layer.largest_grad, self.rule))
            layer.flipped, layer.signs, layer.largest_grad = layer.signs, None, None

    def _pull(self, module, pace: float) -> None:
        """Decoupled form: move the weight toward alpha b by the normalised balance (see `decoupled_share`)."""
        centered = module.centered()
        rate = (self.rule.strength * pace * module.balance).clamp_(max=1.0)
        by_weight, _ = reconstruction_gradients(centered, sign(centered), module.scale(), rate)
        module.weight.sub_(by_weight.view(module.weight.shape))


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, rule: BalanceRule | None = None) -> Resilience:
    """Hold the latent weights of a model by the balance rule in every step of an optimizer (A3, A4).

    In each step: the task gradient is final; m_i = max_j |G_ij| and the signs are recorded; the gradient of the
    reconstruction loss with the current balance is added; the optimizer steps; flips are counted and the balance of
    the next step is set. Works with any torch optimizer, loop, gradient accumulation, `clip_grad_norm_`, DDP and
    `GradScaler` (whose skipped steps leave balance and signs alone).

    Args:
        optimizer: a torch optimizer (or accelerate's wrapper of one) that holds the latent weights.
        model: holds layers made by `binarize`; frozen ones are left alone.
        rule: default that of the config the model was binarized with; without one, the paper's.

    Returns:
        The handle: `statistics()`, `reconstruction_loss()`, `detach()`.

    Raises:
        ValueError: no trainable latent layer, a latent weight that the optimizer does not hold, sharded weights, or a
            rule that is already attached to this optimizer.

    Example:
        >>> resilience = attach(optimizer, model)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper skips steps around the inner one
    if optimizer in _attached:
        raise ValueError("a balance rule is already attached to this optimizer; call detach() on its handle first.")
    if isinstance(model, nn.DataParallel):
        raise ValueError("nn.DataParallel is not supported; use DistributedDataParallel (accelerate or torchrun).")
    every = {_plain_name(n): m for n, m in model.named_modules() if isinstance(m, LATENT_TYPES)}
    latent = {name: module for name, module in every.items() if module.weight.requires_grad}
    if not latent:
        frozen = "all are frozen, as under adapters, and frozen weights need no balance"
        raise ValueError(
            f"the model has no trainable latent layer: {frozen if every else 'call rebnn_hf.binarize(model) first'}."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, module in latent.items() if id(module.weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} of {len(latent)} latent weights (first: {missing[0]}); "
            "build it after binarize(), from model.parameters(), or freeze what should not train. "
            "Sharded weights (FSDP, ZeRO) are not supported; use DDP."
        )
    sharded = [name for name, module in latent.items() if hasattr(module.weight, "placements")]
    if sharded:
        raise ValueError(f"the weight of {sharded[0]} is sharded, and flips are counted per row; use DDP, not FSDP.")
    layers = {name: _Layer(module) for name, module in latent.items()}
    return Resilience(optimizer, layers, rule or _configured_rule(model))


def overall(statistics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Statistics of all layers as one: means weighted by the number of weights, the largest of `balance_max`."""
    layers = list(statistics.values())
    weights = sum(layer["weights"] for layer in layers)
    names = [name for name in (layers[0] if layers else {}) if name not in ("weights", "balance_max")]
    means = {name: sum(layer[name] * layer["weights"] for layer in layers) / weights for name in names}
    return means | ({"balance_max": max(layer["balance_max"] for layer in layers)} if layers else {})


def _true_per_row(mask: Tensor) -> Tensor:
    """Number of true entries of each row; in 32 bits it is four times faster than the default of 64."""
    return mask.sum(-1, dtype=torch.int32)


def _row_blocks(module) -> list[slice]:
    """Rows of a weight in blocks that stay in the cache of a CPU from one operation to the next."""
    rows, size = len(module.weight), _rows_per_block(module)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _held_blocks(module) -> Sequence[slice | Tensor]:
    """Blocks of the rows that have a balance: few, once training settles and few weights flip in a step.

    On GPUs, which would have to wait for the index, all rows; also where most have one, and picking them costs more.
    """
    if not _in_blocks(module):
        return _row_blocks(module)
    held = module.balance.nonzero().squeeze(-1)
    return _row_blocks(module) if 2 * len(held) > len(module.balance) else held.split(_rows_per_block(module))


def _rows_per_block(module) -> int:
    return max(1, BLOCK // _width(module)) if _in_blocks(module) else len(module.weight)


def _width(module) -> int:
    """Weights in a row: a convolution has a row for each output channel."""
    return module.weight[0].numel()


def _in_blocks(module) -> bool:
    """Blocks do not help on GPUs, and a mean of the whole tensor depends on all rows."""
    return module.weight.device.type == "cpu" and module.rule.center != "tensor"


def _add_reconstruction(module, rows: slice | Tensor, scale: Tensor) -> None:
    """Add the gradients of L_R (A2) in some rows to those of the task."""
    weight = module.weight[rows]
    centered = center(weight.flatten(1), module.rule)
    by_row = rows if module.rule.granularity == "row" else slice(None)
    # On a CPU to find the signs again is several times faster than to make floats of booleans.
    by_weight, by_scale = reconstruction_gradients(centered, sign(centered), scale[by_row], module.balance[rows])
    module.weight.grad[rows] += _through_centering(by_weight, module.rule).view(weight.shape)
    if module.weight_scale is not None and module.weight_scale.grad is not None:
        module.weight_scale.grad[by_row] += by_scale * torch.sign(module.weight_scale[by_row])  # the layer uses |a|


def _through_centering(grad: Tensor, rule) -> Tensor:
    """Gradient of the centered weights -> gradient of the weights: P = I - 11^T/M where centering has a Jacobian."""
    if rule.center == "none" or not rule.center_gradient:
        return grad
    return grad - (grad.mean(-1, keepdim=True) if rule.center == "row" else grad.mean())


def _configured_rule(model: nn.Module) -> BalanceRule:
    """The rule in the config of a model, which may be wrapped (DDP, torch.compile)."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(config, ReBNNConfig):
            return config.balance()
    return BalanceRule()


def _paces(optimizer) -> dict[int, float]:
    """Learning rate of each parameter relative to its initial one, which schedulers note in the group."""
    return {
        id(parameter): float(group["lr"]) / (float(group.get("initial_lr", group["lr"])) or 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _refuse_hidden_gradients(optimizer, args, kwargs) -> None:
    """Closures compute gradients, and fused optimizers unscale them, inside step(): out of the hooks' sight."""
    if kwargs.get("closure") is not None or (args and args[-1] is not None and callable(args[-1])):
        raise ValueError("step(closure) computes gradients after the balance rule has run; call step() without one.")
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError(
            "a fused optimizer unscales fp16 gradients inside step(); use fused=False (Trainer: optim='adamw_torch') "
            "or bf16."
        )


def _plain_name(name: str) -> str:
    """Module name without the wrappers of DDP and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
