"""The balance rule in an optimizer step: snapshot, reconstruction gradient, flips, balance, oscillation statistics.

It lives in step hooks of the optimizer, not in a custom backward, because there the task gradients are final:
accumulated over micro-batches, reduced over processes, unscaled by a gradient scaler (which also skips the hooks when
it skips a step). The reconstruction term therefore enters exactly once per step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import config_of
from .functional import (
    BalanceRule,
    balance,
    center,
    decoupled_share,
    largest_gradient,
    latent_mean,
    reconstruction_gradients,
    reconstruction_loss,
    sign,
)
from .layers import LATENT_TYPES
from .passes import count_flips, measure, pull
from .shards import is_sharded, local, local_rows, require_row_shards, sum_over_shards

_attached: weakref.WeakSet = weakref.WeakSet()

NEAR_ZERO = 0.1
"""A latent weight is near its flipping point where |w| < 0.1 alpha."""

USE_INSTEAD = "use DistributedDataParallel (accelerate, torchrun) or, in a loop of your own, FSDP2 (fully_shard)"


@dataclass
class _Layer:
    """A latent layer under the rule, with what one step must remember for the next."""

    module: nn.Module
    signs: Tensor | None = None
    largest_grad: Tensor | None = None
    flipped: Tensor | None = None
    window: dict[str, Tensor | float] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """Latent weights [rows, M] that this process has; a convolution has a row for each output channel."""
        return local(self.module.weight).flatten(1)

    @property
    def gradient(self) -> Tensor:
        """Their gradient, shaped like the parameter."""
        return local(self.module.weight.grad)

    @property
    def balance(self) -> Tensor:
        """Their rows of the balance, which is whole on every process."""
        return self.module.balance[local_rows(self.module.weight)]

    def measure(self) -> None:
        """Record signs and largest gradients of the rows before the step."""
        rule, weight = self.module.rule, self.weight
        self.signs, magnitude = measure(weight, latent_mean(weight, rule), self.gradient.flatten(1))
        self.largest_grad = largest_gradient(magnitude, self.module.scale(), rule)

    def count_flips(self) -> Tensor:
        """Compare signs with those before the step, for statistics; the flips of each row."""
        flips, flips_back = count_flips(
            self.weight, latent_mean(self.weight, self.module.rule), self.signs, self.flipped
        )
        self.count("steps", 1)
        self.count("flips", flips.sum())
        self.count("flip_backs", flips_back.sum())
        self.flipped = self.signs
        return flips

    def forget(self) -> None:
        """Drop what was measured: the step is done, or was not taken."""
        self.signs, self.largest_grad = None, None

    def count(self, name: str, amount: Tensor | float) -> None:
        """Add to a number of the window that statistics report."""
        self.window[name] = self.window.get(name, 0) + amount

    def counted(self) -> list[float]:
        """Sums over the rows of this process: flips, flips back, alpha / mean|w|, weights near zero."""
        magnitude, scale = self.module.centered().abs(), self.module.scale()
        relative = scale / magnitude.mean(-1).clamp_min(1e-12)
        near = (magnitude < NEAR_ZERO * scale.unsqueeze(-1)).sum()
        return [float(x) for x in (self.window["flips"], self.window["flip_backs"], relative.sum(), near)]


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

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layers under the rule by their names."""
        return {name: layer.module for name, layer in self._layers.items()}

    def detach(self) -> None:
        """Take the hooks off the optimizer; the balance stays in the layers."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _attached.discard(optimizer)

    @torch.no_grad()
    def reconstruction_loss(self) -> float:
        """Value of L_R, summed over layers (A1), with the present weights, scales and balance.

        With sharded weights every process has to call it.
        """
        total = 0.0
        for layer in self._layers.values():
            module = layer.module
            centered = module.centered()
            total += reconstruction_loss(centered, sign(centered), module.scale(), layer.balance).item()
        return sum_over_shards(torch.tensor(total, dtype=torch.float64), self._weights()).item()

    @torch.no_grad()
    def statistics(self) -> dict[str, dict[str, float]]:
        """Oscillation statistics of each layer since the last call (A9). With sharded weights every process has to ask.

        Returns:
            For each layer name: `weights`, their number; `flip_ratio`, share of weights whose sign changed, mean per
            step; `flip_back_ratio`, share that changed in a step and back in the next, mean per step;
            `scale_to_mean_abs`, mean over rows of alpha / mean|w|; `near_zero_share`, share of |w| < 0.1 alpha;
            `balance_mean` and `balance_max`, over rows. Empty before the first step.
        """
        layers = {name: layer for name, layer in self._layers.items() if layer.window}
        if not layers:
            return {}
        counted = [layer.counted() for layer in layers.values()]
        sums = sum_over_shards(torch.tensor(counted, dtype=torch.float64), self._weights()).tolist()
        report = {}
        for (name, layer), (flips, flip_backs, relative_scales, near_zero) in zip(layers.items(), sums, strict=True):
            module, steps = layer.module, layer.window["steps"]
            weights = module.weight.numel()
            report[name] = {
                "weights": weights,
                "flip_ratio": flips / (steps * weights),
                "flip_back_ratio": flip_backs / (steps * weights),
                "scale_to_mean_abs": relative_scales / len(module.weight),
                "near_zero_share": near_zero / weights,
                "balance_mean": module.balance.mean().item(),
                "balance_max": module.balance.max().item(),
            }
            layer.window = {}
        return report

    def _weights(self) -> list[Tensor]:
        return [layer.module.weight for layer in self._layers.values()]

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        _refuse_hidden_gradients(optimizer, args, kwargs)
        _require_held(optimizer, self.modules)
        # Without gradient it is not part of this step: the optimizer leaves the weight alone, so do we.
        layers = {name: layer for name, layer in self._layers.items() if layer.module.weight.grad is not None}
        for name, layer in layers.items():
            _require_fit_shards(name, layer.module)
            layer.measure()
        self._require_finite(layers)
        if self.rule.form == "gradient" and self.rule.rule != "none":
            for layer in layers.values():
                if self.rule.rule in ("maxgrad", "const"):  # known before the step, needs no flips
                    layer.balance.copy_(balance(layer.largest_grad, layer.largest_grad, self.rule))
                _add_reconstruction(layer)

    def _require_finite(self, layers: dict[str, _Layer]) -> None:
        """Refuse a step that would spoil the weights, on all processes together, before anything changed."""
        if not layers:
            return
        finite = {name: layer.largest_grad.isfinite().all() for name, layer in layers.items()}
        device = next(iter(finite.values())).device
        spoiled = torch.stack([~flag.to(device) for flag in finite.values()]).any().to(torch.int32)
        if not sum_over_shards(spoiled, self._weights()).item():
            return
        for layer in layers.values():
            layer.forget()
        first = next((name for name, flag in finite.items() if not flag), "a layer on another process")
        raise ValueError(
            f"the gradient of {first or 'the layer'} holds NaN or infinity, and the step was not taken: weights, signs "
            "and balance are those of the step before. Lower the learning rate or clip gradients; in fp16 use a "
            "GradScaler (Trainer: fp16=True), which skips such steps, or bf16."
        )

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        paces = _paces(optimizer) if self.rule.form == "decoupled" else {}
        layers = [layer for layer in self._layers.values() if layer.signs is not None]
        for layer in layers:
            share = layer.count_flips().to(layer.balance.dtype) / layer.weight.shape[1]
            if self.rule.form == "decoupled":
                layer.balance.copy_(decoupled_share(share, self.rule))
                self._pull(layer, paces[id(layer.module.weight)])
            else:
                layer.balance.copy_(balance(share, layer.largest_grad, self.rule))
            layer.forget()
        _share_balance([layer.module for layer in layers])

    def _pull(self, layer: _Layer, pace: float) -> None:
        """Decoupled form: move the weight toward alpha b by the normalised balance (see `decoupled_share`)."""
        centered = layer.module.centered()
        rate = (self.rule.strength * pace * layer.balance).clamp_(max=1.0)
        by_weight, _ = reconstruction_gradients(centered, sign(centered), layer.module.scale(), rate)
        weight = local(layer.module.weight)
        weight.sub_(by_weight.view(weight.shape))


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, rule: BalanceRule | None = None) -> Resilience:
    """Hold the latent weights of a model by the balance rule in every step of an optimizer (A3, A4).

    In each step: the task gradient is final; m_i = max_j |G_ij| and the signs are recorded; the gradient of the
    reconstruction loss with the current balance is added; the optimizer steps; flips are counted and the balance of
    the next step is set. Works with any torch optimizer, loop, gradient accumulation, `clip_grad_norm_`, DDP, FSDP2
    (`fully_shard` first, then the optimizer, then this) and `GradScaler` (whose skipped steps leave balance and signs
    alone). A step whose gradient is not finite is refused before it changes anything. Warns of latent weights narrower
    than float32, which lose small updates.

    Args:
        optimizer: a torch optimizer (or accelerate's wrapper of one) that holds the latent weights.
        model: holds layers made by `binarize`; frozen ones are left alone.
        rule: default that of the config the model was binarized with; without one, the paper's.

    Returns:
        The handle: `statistics()`, `reconstruction_loss()`, `detach()`.

    Raises:
        ValueError: no trainable latent layer, a latent weight that the optimizer does not hold, `nn.DataParallel`,
            FSDP1 or DeepSpeed, weights sharded otherwise than by rows, or a rule that is already attached to this
            optimizer.

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
        raise ValueError(f"nn.DataParallel trains copies that are thrown away; {USE_INSTEAD}.")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(f"FSDP1 flattens weights, and the balance belongs to rows; {USE_INSTEAD}.")
    if type(optimizer).__module__.startswith("deepspeed") or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(f"DeepSpeed steps flat copies of the weights out of sight of the balance rule; {USE_INSTEAD}.")
    every = {_plain_name(n): m for n, m in model.named_modules() if isinstance(m, LATENT_TYPES)}
    latent = {name: module for name, module in every.items() if module.weight.requires_grad}
    if not latent:
        frozen = "all are frozen, as under adapters, and frozen weights need no balance"
        raise ValueError(
            f"the model has no trainable latent layer: {frozen if every else 'call rebnn_hf.binarize(model) first'}."
        )
    _require_held(optimizer, latent)
    for name, module in latent.items():
        _require_fit_shards(name, module)
    _warn_of_narrow_weights(latent)
    layers = {name: _Layer(module) for name, module in latent.items()}
    return Resilience(optimizer, layers, rule or _configured_rule(model))


def overall(statistics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Statistics of all layers as one: means weighted by the number of weights, the largest of what is a maximum."""
    layers = list(statistics.values())
    weights = sum(layer["weights"] for layer in layers)
    names = [name for name in (layers[0] if layers else {}) if name != "weights"]
    means = {name: sum(layer[name] * layer["weights"] for layer in layers) / weights for name in names}
    return means | {name: max(layer[name] for layer in layers) for name in names if name.endswith("_max")}


def _add_reconstruction(layer: _Layer) -> None:
    """Add the gradients of L_R (A2) to those of the task."""
    module, scale = layer.module, layer.module.scale()
    gradient = layer.gradient
    rows = gradient.flatten(1)
    if module.rule.center == "none":
        by_scale = pull(layer.weight, scale, layer.balance, rows)
    else:
        centered = center(layer.weight, module.rule)
        by_weight, by_scale = reconstruction_gradients(centered, sign(centered), scale, layer.balance)
        rows += _through_centering(by_weight, module.rule)
    if not gradient.is_contiguous():  # then the rows may be a copy
        gradient.copy_(rows.view(gradient.shape))
    if module.weight_scale is not None and module.weight_scale.grad is not None:
        direction = torch.sign(local(module.weight_scale))  # the layer uses |a|
        local(module.weight_scale.grad).add_(by_scale * direction)


def _share_balance(modules: Sequence[nn.Module]) -> None:
    """Give every process the balance of all rows, where each has found that of its own: one sum for all layers."""
    modules = [module for module in modules if is_sharded(module.weight)]
    if not modules:
        return
    parts = [torch.zeros_like(module.balance) for module in modules]
    for module, part in zip(modules, parts, strict=True):
        mine = local_rows(module.weight)
        part[mine] = module.balance[mine]
    whole = sum_over_shards(torch.cat(parts), [module.weight for module in modules])
    for module, part in zip(modules, whole.split([len(part) for part in parts]), strict=True):
        module.balance.copy_(part)


def _through_centering(grad: Tensor, rule) -> Tensor:
    """Gradient of the centered weights -> gradient of the weights: P = I - 11^T/M where centering has a Jacobian."""
    if rule.center == "none" or not rule.center_gradient:
        return grad
    return grad - (grad.mean(-1, keepdim=True) if rule.center == "row" else grad.mean())


def _configured_rule(model: nn.Module) -> BalanceRule:
    """The rule in the config of a model, which may be wrapped (DDP, torch.compile)."""
    config = next((config for module in model.modules() if (config := config_of(module)) is not None), None)
    return BalanceRule() if config is None else config.balance()


def _paces(optimizer) -> dict[int, float]:
    """Learning rate of each parameter relative to its initial one, which schedulers note in the group."""
    return {
        id(parameter): float(group["lr"]) / (float(group.get("initial_lr", group["lr"])) or 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _require_held(optimizer: torch.optim.Optimizer, layers: dict[str, nn.Module]) -> None:
    """Refuse an optimizer without some of the weights, also later: DeepSpeed exchanges them behind the scenes."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: module.weight for name, module in layers.items() if module.weight.requires_grad}
    missing = [name for name, weight in trainable.items() if id(weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} of {len(trainable)} latent weights (first: {missing[0]}); "
            "build it after binarize() and fully_shard(), from model.parameters(), or freeze what should not train. "
            f"FSDP1 and DeepSpeed put flat copies in their place: {USE_INSTEAD}."
        )


def _require_fit_shards(name: str, module: nn.Module) -> None:
    """Refuse sharded weights where what the rule needs is not on one process."""
    require_row_shards(name, module.weight)
    if is_sharded(module.weight) and "tensor" in (module.rule.center, module.rule.granularity):
        raise ValueError(
            f"{name} has one mean or scale for its whole weight, which is sharded over processes; use "
            "scale_granularity='row' and weight_center='none' or 'row', or DistributedDataParallel."
        )


def _warn_of_narrow_weights(layers: dict[str, nn.Module]) -> None:
    narrow = {n: m.weight.dtype for n, m in layers.items() if torch.finfo(m.weight.dtype).bits < 32}
    if narrow:
        name, dtype = next(iter(narrow.items()))
        warnings.warn(
            f"{len(narrow)} of {len(layers)} latent weights are {dtype} (first: {name}), too short for small updates, "
            "which it rounds away. from_pretrained() takes the type of the file: load the model with "
            "dtype=torch.float32; to compute in half precision use autocast (Trainer: bf16=True).",
            stacklevel=3,
        )


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
