"""ResNet-18 and -34 with 1-bit 3x3 convolutions, each with a shortcut of its own.

Papers:
* ReBNN, Resilient Binary Neural Network: https://arxiv.org/abs/2302.00956 (`rebnn_*`: learned scales)
* ReActNet: https://arxiv.org/abs/2003.03488 (`reactnet_*`: closed-form scales; RSign and RPReLU in both)
* Bi-Real Net (the shortcuts): https://arxiv.org/abs/1808.00278
* ResNet: https://arxiv.org/abs/1512.03385

The stem, the 1x1 convolutions of shortcuts, BatchNorm, RPReLU and the classifier are float (A10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..functional import WeightRule
from .backbone import BinaryBackbone, image_cfg
from .blocks import REACTNET, AveragePool, BinaryUnit, Stem, StemPool
from .checkpoints import checkpoint_filter_fn

CHANNELS = (64, 128, 256, 512)


class BinaryResNet(BinaryBackbone):
    """ResNet of 1-bit units (D6). Features: the stem before its pool, and four stages.

    Args:
        depths: 3x3 convolutions in each stage.
        rule: how their weights become binary.
        binary_weights: False keeps them float behind the same signs (W32A1, stage one of two-stage training).
        stem: `imagenet`, 7x7 convolution of stride 2 and max pool; `cifar`, 3x3 of stride 1 without pool.
        num_classes, in_chans, global_pool, drop_rate: as in timm.

    Shapes: images [N, in_chans, H, W]; last features [N, 512, H / 32, W / 32], with the CIFAR stem H / 8.

    Raises:
        ValueError: an unknown stem.
    """

    released_names = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^fc\.", "head.fc."),
        *((rf"^layer{i + 1}\.", f"stages.{i}.") for i in range(len(CHANNELS))),
        (r"\.move0\.bias$", ".conv.input_binarizer.shift"),
        (r"\.binary_conv\.weight$", ".conv.weight"),
        (r"\.binary_conv\.scaling_factor$", ".conv.weight_scale"),
        (r"(?<=\d)\.bn1\.", ".norm."),
        (r"\.move1\.bias$", ".act.shift_in"),
        (r"\.prelu\.weight$", ".act.slope"),
        (r"\.move2\.bias$", ".act.shift_out"),
        (r"\.downsample\.", ".shortcut."),
    )

    def __init__(
        self,
        depths: Sequence[int],
        rule: WeightRule,
        binary_weights: bool = True,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem={stem!r} is unknown; expected 'imagenet' or 'cifar'.")
        large = stem == "imagenet"
        kernel_size, stride = (7, 2) if large else (3, 1)
        rule = rule if binary_weights else None
        super().__init__(
            stem=Stem(in_chans, CHANNELS[0], kernel_size, stride, apply_act=False),
            pool=StemPool(3, stride=2, padding=1) if large else None,
            stages=[_stage(i, depth, rule) for i, depth in enumerate(depths)],
            channels=(CHANNELS[0], *CHANNELS),
            reductions=(2, 4, 8, 16, 32) if large else (1, 1, 2, 4, 8),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def _stage(index: int, depth: int, rule: WeightRule | None) -> nn.Sequential:
    """All stages but the first halve the sides of their input."""
    chs = CHANNELS[index]
    units = [BinaryUnit(chs, chs, 3, rule=rule) for _ in range(depth)]
    if index:
        in_chs = CHANNELS[index - 1]
        shortcut = nn.Sequential(AveragePool(), nn.Conv2d(in_chs, chs, 1, bias=False), nn.BatchNorm2d(chs))
        units[0] = BinaryUnit(in_chs, chs, 3, 2, shortcut, rule)
    return nn.Sequential(*units)


default_cfgs = generate_default_cfgs(
    {
        "rebnn_resnet18": image_cfg("2302.00956"),
        "rebnn_resnet34": image_cfg("2302.00956"),
        "reactnet_resnet18": image_cfg("2003.03488"),
        "reactnet_resnet34": image_cfg("2003.03488"),
    }
)


def _create(name: str, pretrained: bool, depths: Sequence[int], rule: WeightRule, **kwargs) -> BinaryResNet:
    return build_model_with_cfg(
        BinaryResNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        depths=depths,
        rule=rule,
        **kwargs,
    )


@register_model
def rebnn_resnet18(pretrained: bool = False, **kwargs) -> BinaryResNet:
    """ResNet-18 with the weights of ReBNN; arguments as `BinaryResNet`."""
    return _create("rebnn_resnet18", pretrained, (4, 4, 4, 4), WeightRule(), **kwargs)


@register_model
def rebnn_resnet34(pretrained: bool = False, **kwargs) -> BinaryResNet:
    """ResNet-34 with the weights of ReBNN; arguments as `BinaryResNet`."""
    return _create("rebnn_resnet34", pretrained, (6, 8, 12, 6), WeightRule(), **kwargs)


@register_model
def reactnet_resnet18(pretrained: bool = False, **kwargs) -> BinaryResNet:
    """ResNet-18 with the weights of ReActNet; arguments as `BinaryResNet`."""
    return _create("reactnet_resnet18", pretrained, (4, 4, 4, 4), REACTNET, **kwargs)


@register_model
def reactnet_resnet34(pretrained: bool = False, **kwargs) -> BinaryResNet:
    """ResNet-34 with the weights of ReActNet; arguments as `BinaryResNet`."""
    return _create("reactnet_resnet34", pretrained, (6, 8, 12, 6), REACTNET, **kwargs)
