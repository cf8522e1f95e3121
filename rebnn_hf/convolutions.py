"""2-D convolutions in their two states, latent and packed: what `layers` has for linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .binarizers import channel_codes_of
from .functional import WeightRule, binarize_rows
from .packing import unpack_signs
from .states import Latent, PackedProduct, compute_dtype, take_over


class BinaryConv2d(Latent, nn.Conv2d):
    """2-D convolution with latent float weights, used as `y = alpha * (x * sign(W)) + bias` (ReBNN A1, gradients A2).

    A row of the weights is an output channel, M = in_channels / groups * kh * kw. With an `input_binarizer` (a layer
    of `activations`, whose features are the channels), x are its codes, and y takes their scale beside alpha. Padding
    comes behind it: padded positions are 0, neither -1 nor +1.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as `nn.Conv2d`.
        rule: how weights become binary, see `WeightRule`.

    Shapes: `weight` [O, C / groups, kh, kw], `weight_scale` [O] (absent for closed-form scales, [1] per tensor),
    `balance` [O]; input [N, C, H, W], output [N, O, H', W'].

    Raises:
        ValueError: a padding mode other than zeros.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *args, rule: WeightRule | None = None, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode={self.padding_mode!r} is not supported by 1-bit convolutions; use 'zeros'.")
        self.register_module("input_binarizer", None)
        self._init_rule(rule or WeightRule())

    @classmethod
    def from_float(cls, conv: nn.Conv2d, rule: WeightRule) -> BinaryConv2d:
        """Take over the parameters of a float layer (the very same objects, no copy)."""
        latent = cls(
            *_geometry(conv), bias=conv.bias is not None, padding_mode=conv.padding_mode, rule=rule, device="meta"
        )
        return take_over(latent, conv)

    def forward(self, x: Tensor) -> Tensor:
        """`alpha * (x * b) + bias`: [N, C, H, W] -> [N, O, H', W']."""
        dtype = compute_dtype(x, self.weight)
        codes, input_scale = channel_codes_of(x, self.input_binarizer, dtype)
        signs, scale = binarize_rows(self.rows(), self.weight_scale, self.rule, dtype=dtype)
        return _binary_conv(self, codes, signs.view(self.weight.shape), scale, input_scale)

    def pack(self) -> PackedConv2d:
        """Inference form with the same bits, scales and bias."""
        packed = PackedConv2d(*_geometry(self), bias=self.bias is not None, device="meta")
        packed._take(self)
        packed.bias = self.bias
        packed.input_binarizer = self.input_binarizer
        return packed.train(self.training)

    def to_float(self) -> nn.Conv2d:
        """Plain `nn.Conv2d` with weight `alpha * b`."""
        return _float_conv(self)


class PackedConv2d(PackedProduct, nn.Conv2d):
    """2-D convolution with one bit per weight: `y = scale * (x * b) + bias`, as `BinaryConv2d` computes it.

    Shapes: `weight` uint8 [O, ceil(M / 8)], M = in_channels / groups * kh * kw in that order; `weight_scale` and `bias`
    [O]; input [N, C, H, W], output [N, O, H', W']. On a CPU the engine computes convolutions of few-bit inputs without
    groups and dilation, the reference all others.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *args, bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, out_channels, kernel_size, *args, bias=bias, device="meta")
        self._init_product()
        self._init_bits(out_channels, self.width, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))

    @property
    def width(self) -> int:
        """Signs in a row."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @classmethod
    def like(cls, conv: nn.Conv2d) -> PackedConv2d:
        """Empty packed layer of the shape, device and dtype of `conv`, for a checkpoint to fill."""
        return cls(*_geometry(conv), bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype)

    def _check_features(self, x: Tensor) -> None:
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"expected inputs [N, {self.in_channels}, H, W], got {tuple(x.shape)}.")

    def engine_codes(self, x: Tensor) -> kernels.Codes | None:
        """How the engine makes codes of x; None where the reference has to compute."""
        plain = self.groups == 1 and self.dilation == (1, 1) and not isinstance(self.padding, str)
        codes = super().engine_codes(x) if plain and x.ndim == 4 else None
        return None if codes is None or codes.kind == "float" else codes

    def _make_layout(self, kind: int) -> Tensor:
        return kernels.cpu.conv_layout(self.weight, self.in_channels, self.kernel_size, kind)

    def _by_engine(self, x: Tensor, layout: Tensor | None, codes: kernels.Codes) -> Tensor:
        geometry = (self.kernel_size, self.stride, self.padding)
        return kernels.conv2d(x, self.weight, layout, self.weight_scale, self.bias, codes, *geometry)

    def residual_unit(
        self, x: Tensor, codes: kernels.Codes, scale: Tensor, bias: Tensor, residual: kernels.Residual
    ) -> Tensor:
        """`(x * b) scale + bias`, shortcut and RPReLU as one call of the engine, without gradients.

        Args:
            x: [N, C, H, W].
            codes: of x, what `engine_codes` says.
            scale, bias: [O], in place of the layer's: what follows it may be folded into them.
            residual: what follows.

        Returns:
            [N, O, H', W'].
        """
        geometry = (self.kernel_size, self.stride, self.padding)
        return kernels.conv2d(x, self.weight, self.layout(codes.layout), scale, bias, codes, *geometry, residual)

    def reference(self, x: Tensor) -> Tensor:
        """`scale * (x * b) + bias`: [N, C, H, W] -> [N, O, H', W'], in floats and with gradients."""
        dtype = compute_dtype(x, self.weight_scale)
        codes, input_scale = channel_codes_of(x, self.input_binarizer, dtype)
        signs = unpack_signs(self.weight, self.width, dtype).view(_weight_shape(self))
        return _binary_conv(self, codes, signs, self.weight_scale, input_scale)

    def to_float(self) -> nn.Conv2d:
        """Plain `nn.Conv2d` with weight `scale * b`."""
        return _float_conv(self)


def _binary_conv(conv: nn.Conv2d, x: Tensor, signs: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """`scale * (x * b) + bias` in the type of the signs, as a layer strides and pads; scales as in `_binary_linear`."""
    bias = None if conv.bias is None else conv.bias.to(signs.dtype).view(-1, 1, 1)
    scale = (scale if input_scale is None else scale * input_scale).to(signs.dtype).view(-1, 1, 1)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if signs.dtype == torch.float16:
        # A sum of M unscaled inputs can pass 65504 where the scaled one does not.
        y = F.conv2d(x, signs * scale.unsqueeze(-1), None, *geometry)
        return y if bias is None else y + bias
    product = F.conv2d(x, signs, None, *geometry)
    return product * scale if bias is None else torch.addcmul(bias, product, scale)


def _geometry(conv: nn.Conv2d) -> tuple:
    """The arguments of `nn.Conv2d` up to `groups`."""
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size)
    return *sizes, conv.stride, conv.padding, conv.dilation, conv.groups


def _weight_shape(conv: nn.Conv2d) -> tuple[int, ...]:
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


def _float_conv(layer) -> nn.Conv2d:
    conv = nn.Conv2d(*_geometry(layer), bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(layer.binary_weight().view(_weight_shape(layer)))
    conv.bias = layer.bias
    return conv.train(layer.training)
