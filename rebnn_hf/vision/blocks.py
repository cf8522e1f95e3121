"""What 1-bit image models are made of: units of RSign, convolution, BatchNorm, shortcut and RPReLU, and float stems.

Papers:
* Bi-Real Net (a shortcut around every 1-bit convolution): https://arxiv.org/abs/1808.00278
* ReActNet (RSign, RPReLU): https://arxiv.org/abs/2003.03488
"""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..activations import rprelu
from ..binarizers import RPReLU, ShiftedSign, channel_codes_of
from ..functional import WeightRule
from ..kernels import Codes, Residual
from ..layers import BinaryConv2d, PackedConv2d
from ..states import Derived

REACTNET = WeightRule(scale="mean_abs", slope="unit")
"""The weights of ReActNet (D3): `alpha_i = mean_j |W_ij|`, taken as a constant, and a gradient without alpha."""


class BinaryUnit(nn.Module):
    """`y = RPReLU(BN(conv(sign(x + shift))) + shortcut(x))` (D5, D6).

    Args:
        in_chs: C.
        out_chs: O.
        kernel_size: of the convolution, which is padded to keep sizes (ceil(H / stride)).
        stride: of the convolution; the shortcut must do the same.
        shortcut: what brings x to the shape of y; None for the identity.
        rule: how weights become binary; None keeps them float (W32A1, stage one of two-stage training).

    Shapes: x [N, C, H, W], y [N, O, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        shortcut: nn.Module | None = None,
        rule: WeightRule | None = None,
    ):
        super().__init__()
        geometry = (in_chs, out_chs, kernel_size, stride, kernel_size // 2)
        if rule is None:
            self.conv = SignConv2d(*geometry, bias=False)
        else:
            self.conv = BinaryConv2d(*geometry, bias=False, rule=rule)
            self.conv._is_hf_initialized = True  # transformers would draw other weights, which the scales do not fit
        self.conv.input_binarizer = ShiftedSign(in_chs)
        self.norm = nn.BatchNorm2d(out_chs)
        self.shortcut = shortcut or nn.Identity()
        self.act = ChannelRPReLU(out_chs)
        self._folded = Derived()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W']; packed, in eval mode and without gradients, as one call of the engine."""
        codes = self._codes_for_one_call(x)
        if codes is None:
            return self.act(self.norm(self.conv(x)) + self.shortcut(x))
        residual = Residual(self.shortcut(x), self.act.shift_in, self.act.slope, self.act.shift_out)
        return self.conv.residual_unit(x, codes, *self._scale_and_bias(), residual)

    def _codes_for_one_call(self, x: Tensor) -> Codes | None:
        """How the engine makes codes of x; None where the layers have to run one by one."""
        parts = (self.conv, self.norm, self.act)
        if torch.is_grad_enabled() or self.norm.training or not isinstance(self.conv, PackedConv2d):
            return None
        if _global_forward_hooks or _global_forward_pre_hooks:
            return None
        if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
            return None  # what watches a layer, or stands in for it (an export, accelerate), must be asked
        return self.conv.engine_codes(x)

    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Scales of the convolution with BatchNorm folded in: [O] each."""
        norm = self.norm
        tensors = (self.conv.weight_scale, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if torch.compiler.is_compiling():
            return fold(*tensors, norm.eps)
        return self._folded.of(tensors, lambda: fold(*tensors, norm.eps), norm.eps)


def fold(
    scale: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and bias for which `scale' y + bias' = BN(scale y)`, BatchNorm in eval mode; in float32.

    Args:
        scale: of the convolution before it, which has no bias, [O].
        weight, bias, mean, variance: of BatchNorm, [O].
        eps: of BatchNorm.
    """
    factor = weight.double() / (variance.double() + eps).sqrt()
    return (scale * factor).float(), (bias - mean * factor).float()


class SignConv2d(nn.Conv2d):
    """Float convolution of a binarized input: a `BinaryConv2d` before its weights are made 1-bit, with the same names.

    Shapes: as `nn.Conv2d`, with an `input_binarizer` whose features are the channels.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("input_binarizer", None)

    def forward(self, x: Tensor) -> Tensor:
        """`sign(x + shift) * W`: [N, C, H, W] -> [N, O, H', W']."""
        codes, _ = channel_codes_of(x, self.input_binarizer, x.dtype)
        return super().forward(codes)


class ChannelRPReLU(RPReLU):
    """`RPReLU` of images: the features are the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return rprelu(x, self.shift_in, self.slope, self.shift_out, images=True)


class Stem(ConvNormAct):
    """timm's convolution with BatchNorm, computed channels last, which on a CPU takes a fifth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W'], channels last in memory."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class StemPool(nn.MaxPool2d):
    """Max pool, computed channels last, which on a CPU takes a tenth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        return super().forward(x.contiguous(memory_format=torch.channels_last)).contiguous()


class AveragePool(nn.AvgPool2d):
    """2x2 average pool of stride 2 whose odd sizes round up, as those of a padded 3x3 convolution of stride 2 do."""

    def __init__(self):
        super().__init__(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        if torch.is_grad_enabled() or x.shape[-2] % 2 or x.shape[-1] % 2:
            return super().forward(x)
        # The same sums in the same order, which on a CPU take a third of the time.
        return (x[..., ::2, ::2] + x[..., ::2, 1::2]).add_(x[..., 1::2, ::2]).add_(x[..., 1::2, 1::2]).mul_(0.25)
