"""ReActNet-A: MobileNetV1 whose 3x3 and 1x1 convolutions are full, 1-bit, and have shortcuts of their own.

Papers:
* ReActNet: https://arxiv.org/abs/2003.03488 (`reactnet_a`: closed-form scales)
* ReBNN, Resilient Binary Neural Network: https://arxiv.org/abs/2302.00956 (`rebnn_reactnet_a`: learned scales)
* MobileNets: https://arxiv.org/abs/1704.04861

The stem, BatchNorm, RPReLU and the classifier are float (D5).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..functional import WeightRule
from .backbone import BinaryBackbone, image_cfg
from .blocks import REACTNET, AveragePool, BinaryUnit, Stem
from .checkpoints import checkpoint_filter_fn

STEM = 32
STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
"""Channels and number of blocks; all stages but the first halve the sides of their input."""


def _released_blocks() -> Iterator[tuple[str, str]]:
    """The authors number stem and blocks in one list."""
    yield r"^feature\.0\.conv1\.", "stem.conv."
    yield r"^feature\.0\.bn1\.", "stem.bn."
    places = [(stage, block) for stage, (_, depth) in enumerate(STAGES) for block in range(depth)]
    for number, (stage, block) in enumerate(places, start=1):
        yield rf"^feature\.{number}\.", f"stages.{stage}.{block}."


class BinaryMobileNet(BinaryBackbone):
    """MobileNetV1 of 1-bit units (D5). Features: five stages.

    Args:
        rule: how weights become binary.
        binary_weights: False keeps them float behind the same signs (W32A1, stage one of two-stage training).
        num_classes, in_chans, global_pool, drop_rate: as in timm.

    Shapes: images [N, in_chans, H, W]; last features [N, 1024, H / 32, W / 32].
    """

    released_names = (
        *_released_blocks(),
        (r"^fc\.", "head.fc."),
        # `weights` in stage two, `weight` in stage one; `_down1` and `_down2` are the halves of a doubling convolution.
        (r"\.binary_3x3\.weights?$", ".spatial.conv.weight"),
        (r"\.binary_pw(_down[12])?\.weights?$", ".pointwise.conv.weight"),
        (r"(?<=\d)\.bn1\.", ".spatial.norm."),
        (r"(?<=\d)\.bn2(_[12])?\.", ".pointwise.norm."),
        *(
            pair
            for number, unit in ((1, "spatial"), (2, "pointwise"))
            for pair in (
                (rf"\.move{number}1\.bias$", f".{unit}.conv.input_binarizer.shift"),
                (rf"\.move{number}2\.bias$", f".{unit}.act.shift_in"),
                (rf"\.prelu{number}\.weight$", f".{unit}.act.slope"),
                (rf"\.move{number}3\.bias$", f".{unit}.act.shift_out"),
            )
        ),
    )

    def __init__(
        self,
        rule: WeightRule,
        binary_weights: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        rule = rule if binary_weights else None
        channels = [chs for chs, _ in STAGES]
        strides = [1, 2, 2, 2, 2]
        super().__init__(
            stem=Stem(in_chans, STEM, 3, stride=2, apply_act=False),
            pool=None,
            stages=[
                nn.Sequential(_block(in_chs, chs, stride, rule), *(_block(chs, chs, 1, rule) for _ in range(depth - 1)))
                for (in_chs, chs), (_, depth), stride in zip(pairwise([STEM, *channels]), STAGES, strides, strict=True)
            ],
            channels=channels,
            reductions=(2, 4, 8, 16, 32),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def _block(in_chs: int, out_chs: int, stride: int, rule: WeightRule | None) -> nn.Sequential:
    """1-bit 3x3 from C to C, then 1-bit 1x1 to C or 2C.

    The paper doubles channels by two 1x1 convolutions from C to C, side by side. They see the same signs, and scale,
    BatchNorm and RPReLU belong to single channels: one convolution from C to 2C is the same.
    """
    spatial = BinaryUnit(in_chs, in_chs, 3, stride, AveragePool() if stride == 2 else None, rule)
    pointwise = BinaryUnit(in_chs, out_chs, 1, shortcut=Twice() if out_chs == 2 * in_chs else None, rule=rule)
    return nn.Sequential(OrderedDict(spatial=spatial, pointwise=pointwise))


class Twice(nn.Module):
    """The input beside itself: [N, C, H, W] -> [N, 2C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """`concat(x, x)` over channels."""
        return torch.cat([x, x], dim=1)


default_cfgs = generate_default_cfgs(
    {"rebnn_reactnet_a": image_cfg("2302.00956"), "reactnet_a": image_cfg("2003.03488")}
)


def _create(name: str, pretrained: bool, rule: WeightRule, **kwargs) -> BinaryMobileNet:
    return build_model_with_cfg(
        BinaryMobileNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        rule=rule,
        **kwargs,
    )


@register_model
def rebnn_reactnet_a(pretrained: bool = False, **kwargs) -> BinaryMobileNet:
    """ReActNet-A with the weights of ReBNN; arguments as `BinaryMobileNet`."""
    return _create("rebnn_reactnet_a", pretrained, WeightRule(), **kwargs)


@register_model
def reactnet_a(pretrained: bool = False, **kwargs) -> BinaryMobileNet:
    """ReActNet-A with the weights of its paper; arguments as `BinaryMobileNet`."""
    return _create("reactnet_a", pretrained, REACTNET, **kwargs)
