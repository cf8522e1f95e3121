"""What the layers of `layers` and `convolutions` share in their two states: latent (trainable) and packed (one bit per
weight)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .binarizers import engine_codes
from .functional import SCALE_FLOOR, WeightRule, binarize_rows, center, is_positive, mean_abs_scale
from .packing import pack_signs, packed_width, unpack_signs
from .shards import local


class Latent:
    """What latent layers share: the rule, the learned scale, the balance of each row."""

    def _init_rule(self, rule: WeightRule) -> None:
        self.rule = rule
        rows = self.weight.shape[0]
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        if rule.scale == "learned":
            size = rows if rule.granularity == "row" else 1
            self.weight_scale = nn.Parameter(torch.empty(size, **like), requires_grad=self.weight.requires_grad)
        else:
            self.register_parameter("weight_scale", None)
        # Not called gamma: checkpoint loaders rename keys that contain it.
        self.register_buffer("balance", torch.empty(rows, **like))
        self.reset_scale()

    def rows(self) -> Tensor:
        """Latent weights as rows, [O, M]: a convolution's have one per output channel.

        Of weights that are sharded over processes (FSDP2), the rows of this one, here and in what is computed of them.
        """
        return local(self.weight).flatten(1)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Start from the closed form, `alpha_i = mean_j |W_ij|` (A6), and from a balance of zero."""
        if self.weight_scale is not None:
            self.weight_scale.copy_(mean_abs_scale(self.rows(), self.rule.granularity).clamp_min(SCALE_FLOOR))
        self.balance.zero_()

    @torch.no_grad()
    def scale(self) -> Tensor:
        """Scales in force, alpha > 0, without gradient: [rows] or [1]."""
        if self.weight_scale is not None:
            return local(self.weight_scale).abs()
        return mean_abs_scale(self.rows(), self.rule.granularity)

    @torch.no_grad()
    def centered(self) -> Tensor:
        """Rows as the sign sees them, `W - mu` [O, M] (the weights themselves where nothing is centered)."""
        return center(self.rows(), self.rule)

    @torch.no_grad()
    def signs(self) -> Tensor:
        """Boolean [rows, M]: true where the binary weight is +1."""
        return is_positive(self.centered())

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """Float binary weights `W_hat = alpha * b`, [rows, M], for export and inspection."""
        signs, scale = binarize_rows(self.rows(), self.weight_scale, self.rule)
        return signs * scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        """State and rule, for print(model)."""
        return f"{super().extra_repr()}, 1-bit latent, scale={self.rule.scale}"


class Packed:
    """What packed layers share: bits and scales as buffers."""

    def _init_bits(self, rows: int, width: int, device=None, dtype=None) -> None:
        del self.weight
        # Garbage until loaded or packed into, like every module built for loading.
        self.register_buffer("weight", torch.empty(rows, packed_width(width), dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, device=device, dtype=dtype))

    @torch.no_grad()
    def _take(self, latent) -> None:
        """Keep the signs and scales of a latent layer of the same shape."""
        self.weight = pack_signs(latent.signs())
        self.weight_scale = latent.scale().expand(latent.weight.shape[0]).clone()

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """Float binary weights `W_hat = alpha * b`, [rows, M]: a copy, for export and inspection."""
        return unpack_signs(self.weight, self.width, self.weight_scale.dtype) * self.weight_scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        """State, for print(model)."""
        return f"{super().extra_repr()}, 1-bit packed"


class PackedProduct(Packed):
    """What packed linear layers and convolutions share: inputs as codes, and the engine's layout of the bits."""

    def _init_product(self) -> None:
        self.register_module("input_binarizer", None)
        self._layout = Derived()

    def engine_codes(self, x: Tensor) -> kernels.Codes | None:
        """How the engine makes codes of x; None where the reference has to compute."""
        return engine_codes(self.input_binarizer) if kernels.serves(x) else None

    def forward(self, x: Tensor) -> Tensor:
        """By the engine where it serves x, else `reference`.

        Raises:
            TypeError: x is not floating point.
            ValueError: x has another number of features than the layer.
        """
        if not x.is_floating_point():
            raise TypeError(f"expected floating point inputs, got {x.dtype}; convert them first.")
        self._check_features(x)
        codes = self.engine_codes(x)
        if codes is None:
            return self.reference(x)
        layout = None if codes.kind == "float" else self.layout(codes.layout)
        if torch.is_grad_enabled():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if x.requires_grad or parameters:
                return _EngineProduct.apply(self, codes, layout, x, *parameters)
        return self._by_engine(x, layout, codes)

    def layout(self, kind: int) -> Tensor | None:
        """The bits in the order of the kernels: made when they are first needed, never saved, and made anew for other
        bits. None while a compiler traces, where they are made in each call unless the layer ran before."""
        if torch.compiler.is_compiling():
            return self._layout.value
        return self._layout.of((self.weight,), partial(self._make_layout, kind), kind)


class Derived:
    """What is made of tensors, kept until they change; copies and pickles make theirs themselves."""

    def __init__(self):
        self.value: Any = None
        self._made_of: tuple[Tensor, ...] = ()
        self._state: list = []

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], Any], *options: Hashable) -> Any:
        """What `make` makes of these tensors and options: the same again for the same."""
        state = [*options, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)]
        # The tensors themselves too: another one can get the address of one that is gone.
        if state != self._state or not all(map(is_, tensors, self._made_of)):
            self.value = make()
            self._made_of, self._state = tensors, state
        return self.value

    def __reduce__(self) -> tuple:
        return Derived, ()


class _EngineProduct(torch.autograd.Function):
    """A packed layer by the engine; the backward pass is that of the reference, computed again."""

    @staticmethod
    def forward(ctx, layer, codes, layout, x, *parameters):
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return layer._by_engine(x, layout, codes)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[3])
            y = ctx.layer.reference(x)
        wanted = [x] * x.requires_grad + parameters
        grads = list(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, None, grads.pop(0) if x.requires_grad else None, *grads


def take_over(latent, source: nn.Module):
    """Give a new latent layer the parameters and the mode of a float one."""
    latent.weight = source.weight
    if getattr(source, "bias", None) is not None:
        latent.bias = source.bias
    latent._init_rule(latent.rule)
    return latent.train(source.training)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the product: autocast's where it is on, else that of the float parameters."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
