"""What the image models share: stem, stages and head, as timm expects them of classifiers and feature extractors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class BinaryBackbone(nn.Module):
    """Float stem, stages of 1-bit units, float classifier.

    No activation follows the stem: behind a ReLU the sign of every input of the first 1-bit layer would be +1.
    Weights start as torch's layers make them: BatchNorm takes out their size, and learned scales start from it.

    Args:
        stem: images to the first features, with pooling apart, so that timm can take the features before it.
        pool: what follows the stem, None for nothing.
        stages: one module for each resolution.
        channels: of the feature levels, which are the stages, with the stem before them where there is one more.
        reductions: by how much the sides of the feature levels are smaller than those of the image.
        num_classes: 0 for no classifier.
        global_pool: as in timm: avg, max, avgmax, catavgmax, or '' for none (without classifier only).
        drop_rate: dropout before the classifier.
    """

    released_names: ClassVar[Sequence[tuple[str, str]]] = ()
    """Patterns and replacements that turn names of the authors' checkpoints into ours, see `checkpoints`."""

    def __init__(
        self,
        stem: nn.Module,
        pool: nn.Module | None,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ):
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = channels[-1]
        self.stem = stem
        self.pool = pool or nn.Identity()
        self.stages = nn.Sequential(*stages)
        modules = ["stem", *(f"stages.{i}" for i in range(len(stages)))][-len(channels) :]
        self.feature_info = [
            {"num_chs": num_chs, "reduction": reduction, "module": module}
            for num_chs, reduction, module in zip(channels, reductions, modules, strict=True)
        ]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features

    def get_classifier(self) -> nn.Module:
        """The last linear layer; the identity where there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and another pooling if one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> last features [N, num_features, H', W']."""
        return self.stages(self.pool(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last features -> logits [N, num_classes], or pooled features [N, head_hidden_size] with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of several levels, in timm's form.

        Args:
            x: images.
            indices: of the levels in `feature_info`; the last n for an int, all for None.
            norm: without effect, there is no norm behind the stages.
            stop_early: whether stages behind the last wanted level are left out.
            output_fmt: NCHW.
            intermediates_only: whether to return the levels alone.

        Returns:
            The levels, or the last features that were computed and the levels.

        Raises:
            ValueError: another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; the features of these models are 'NCHW'.")
        taken, deepest = feature_take_indices(len(self.feature_info), indices)
        first = len(self.stages) + 1 - len(self.feature_info)  # 0 if the stem is a level
        x = self.stem(x)
        levels = [x]
        for stage in self.stages[: deepest + first] if stop_early else self.stages:
            x = stage(self.pool(x) if len(levels) == 1 else x)
            levels.append(x)
        features = [levels[first + i] for i in taken]
        return features if intermediates_only else (x, features)


def image_cfg(paper: str) -> dict[str, Any]:
    """What timm has to know about a model for ImageNet; there are no weights to download yet."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "paper_ids": f"arXiv:{paper}",
    }
