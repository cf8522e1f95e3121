"""Faster R-CNN with a feature pyramid on a backbone of timm, 1-bit or float: importing this module registers it.

    import rebnn_hf.vision.detection
    from transformers import AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained("path/to/a/detector")

Papers:
* Faster R-CNN (region proposals): https://arxiv.org/abs/1506.01497
* Feature Pyramid Networks: https://arxiv.org/abs/1612.03144

Pyramid, proposals and heads are torchvision's and stay float; what is 1-bit is the backbone, which is a model of
`rebnn_hf.vision` or any float one of timm. `rebnn_hf.binarize`, `pack` and `save_pretrained` work as on classifiers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .checkpoints import require_keys

try:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
except ModuleNotFoundError as error:
    if error.name != "torchvision":
        raise
    raise ImportError(
        "rebnn_hf.vision.detection needs torchvision; install it with: pip install 'rebnn_hf[detection]'"
    ) from error

__all__ = ["DetectorOutput", "FasterRCNNConfig", "FasterRCNNForObjectDetection", "load_classifier"]

LEVELS = ("0", "1", "2", "3")
"""What torchvision calls the levels of the backbone, from fine to coarse; one more is pooled from the last."""

ASPECT_RATIOS = (0.5, 1.0, 2.0)
"""Height by width of the anchors."""

ROI_SIZE, ROI_SAMPLES = 7, 2
"""Side of the features that the head sees of a region, and samples along each side of one of them."""


class FasterRCNNConfig(PreTrainedConfig):
    """What a `FasterRCNNForObjectDetection` is made of.

    Args:
        backbone: name of a model in timm, whose last four levels of features are used, each half as large as the one
            before.
        backbone_args: arguments for `timm.create_model`, for example `{"stem": "cifar"}`.
        min_size: images are resized until their shorter side has this size,
        max_size: or their longer side has this one.
        image_mean, image_std: what images of values from 0 to 1 are normalized by.
        fpn_channels: of all levels of the pyramid.
        head_size: of the two hidden layers of the head.
        anchor_sizes: side of the anchors for each level, five of them.
        detector_args: further arguments of torchvision's `FasterRCNN`, for example `{"box_score_thresh": 0.01}`.
        **kwargs: `id2label` and others of transformers; the background is not among the labels.

    Raises:
        ValueError: not five anchor sizes, or a size that is not positive.
    """

    model_type = "rebnn_faster_rcnn"

    backbone: str = "rebnn_resnet18"
    backbone_args: dict[str, Any] | None = None
    min_size: int = 800
    max_size: int = 1333
    image_mean: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_STD))
    fpn_channels: int = 256
    head_size: int = 1024
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    detector_args: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if len(self.anchor_sizes) != len(LEVELS) + 1:
            raise ValueError(
                f"anchor_sizes={self.anchor_sizes} has {len(self.anchor_sizes)} sizes; expected {len(LEVELS) + 1}, one "
                "for each level of the pyramid."
            )
        sizes = {name: getattr(self, name) for name in ("min_size", "max_size", "fpn_channels", "head_size")}
        for name, size in {**sizes, "anchor_sizes": min(self.anchor_sizes)}.items():
            if size <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        super().__post_init__(**kwargs)


@dataclass
class DetectorOutput(ModelOutput):
    """What a detector returns.

    Attributes:
        loss: in training, the sum of the parts below.
        losses: in training, by torchvision's names: `loss_objectness` and `loss_rpn_box_reg` of the proposals,
            `loss_classifier` and `loss_box_reg` of the head.
        detections: in eval mode, for each image `boxes` [D, 4] (x1, y1, x2, y2 in its pixels), `labels` [D] (keys of
            `config.id2label`) and `scores` [D], the best first.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    detections: list[dict[str, Tensor]] | None = None


class FasterRCNNForObjectDetection(PreTrainedModel):
    """torchvision's Faster R-CNN with a feature pyramid on the features of a timm model.

    The backbone is the base model: what `binarize` chooses lies there, and its weights have the names they have in a
    classifier of the same architecture (`load_classifier`). Made from a config, everything starts as timm and
    torchvision start it.

    Raises:
        ValueError: a backbone without four such levels of features.

    Example:
        >>> model = FasterRCNNForObjectDetection(FasterRCNNConfig(backbone="rebnn_resnet18", num_labels=20))
        >>> rebnn_hf.binarize(model)
    """

    config: FasterRCNNConfig
    config_class = FasterRCNNConfig
    base_model_prefix = "backbone"
    main_input_name = "images"  # not pixel_values: the Trainer counts what is in the main input, and this is a list
    input_modalities = ("image",)

    def __init__(self, config: FasterRCNNConfig):
        super().__init__(config)
        self.backbone = timm.create_model(
            config.backbone, num_classes=0, global_pool="", **(config.backbone_args or {})
        )
        self.fpn = FeaturePyramidNetwork(_channels(self.backbone, config), config.fpn_channels, LastLevelMaxPool())
        parts = _detector(self.fpn, config)
        self.transform, self.rpn, self.roi_heads = parts.transform, parts.rpn, parts.roi_heads
        if not next(self.parameters()).is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # transformers would draw other weights
        self.post_init()

    def forward(
        self, pixel_values: Sequence[Tensor] | Tensor, labels: Sequence[dict[str, Tensor]] | None = None
    ) -> DetectorOutput:
        """Losses in training, detections in eval mode.

        Args:
            pixel_values: images [3, H, W] of any sizes with values from 0 to 1, or a batch [N, 3, H, W]. They are
                normalized, resized and padded here.
            labels: needed in training and not looked at in eval mode: for each image `boxes` [B, 4] as x1, y1, x2, y2
                in its pixels, 0 <= x1 < x2 <= W, and `class_labels` [B], keys of `config.id2label`. B may be 0.

        Returns:
            See `DetectorOutput`.

        Raises:
            ValueError: training without labels, or labels that do not fit images or config.
        """
        sizes = [tuple(image.shape[-2:]) for image in pixel_values]
        targets = self._targets(sizes, labels) if self.training else None
        images, targets = self.transform([image.to(self.dtype) for image in pixel_values], targets)
        levels = self.backbone.forward_intermediates(images.tensors, indices=len(LEVELS), intermediates_only=True)
        features = self.fpn(OrderedDict(zip(LEVELS, levels, strict=True)))
        proposals, rpn_losses = self.rpn(images, features, targets)
        detections, head_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        if self.training:
            losses = {**rpn_losses, **head_losses}
            return DetectorOutput(loss=sum(losses.values()), losses=losses)
        detections = self.transform.postprocess(detections, images.image_sizes, sizes)
        return DetectorOutput(detections=[{**found, "labels": found["labels"] - 1} for found in detections])

    def _targets(self, sizes: list[tuple[int, int]], labels: Sequence[dict[str, Tensor]] | None):
        """The labels as torchvision takes them: its class 0 is the background."""
        if labels is None:
            raise ValueError("a detector in training needs labels; pass them, or call model.eval() for detections.")
        if len(labels) != len(sizes):
            raise ValueError(f"{len(sizes)} images have {len(labels)} labels; expected one dictionary for each image.")
        for index, (size, label) in enumerate(zip(sizes, labels, strict=True)):
            _check_label(index, size, label, self.config.num_labels)
        return [{"boxes": one["boxes"].to(self.dtype), "labels": one["class_labels"] + 1} for one in labels]


def _channels(backbone: nn.Module, config: FasterRCNNConfig) -> list[int]:
    """Of the levels that the pyramid reads."""
    levels = list(getattr(backbone, "feature_info", ()))[-len(LEVELS) :]
    reductions = [level["reduction"] for level in levels]
    halving = all(coarse == 2 * fine for fine, coarse in pairwise(reductions))
    if len(levels) < len(LEVELS) or not halving or not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"backbone={config.backbone!r} has features of 1/{', 1/'.join(map(str, reductions))} of the image's size; "
            f"expected a model of timm with forward_intermediates() and {len(LEVELS)} levels, each half as large as "
            "the one before, such as 'rebnn_resnet18' or 'resnet18'."
        )
    return [level["num_chs"] for level in levels]


def _detector(fpn: FeaturePyramidNetwork, config: FasterRCNNConfig) -> FasterRCNN:
    """torchvision's detector behind the pyramid, which stands in for its backbone: its parts are used one by one."""
    fpn.out_channels = config.fpn_channels
    anchors = AnchorGenerator(
        tuple((size,) for size in config.anchor_sizes), (ASPECT_RATIOS,) * len(config.anchor_sizes)
    )
    return FasterRCNN(
        fpn,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), ROI_SIZE, ROI_SAMPLES),
        box_head=TwoMLPHead(config.fpn_channels * ROI_SIZE**2, config.head_size),
        box_predictor=FastRCNNPredictor(config.head_size, config.num_labels + 1),
        **(config.detector_args or {}),
    )


def _check_label(index: int, size: tuple[int, int], label: dict[str, Tensor], num_labels: int) -> None:
    if missing := {"boxes", "class_labels"} - label.keys():
        raise ValueError(f"labels[{index}] lacks {', '.join(sorted(missing))}; it has {', '.join(label) or 'nothing'}.")
    boxes, classes = label["boxes"], label["class_labels"]
    if boxes.shape != (len(classes), 4):
        raise ValueError(
            f"labels[{index}]: boxes are {tuple(boxes.shape)} and class_labels {tuple(classes.shape)}; expected [B, 4] "
            "and [B]."
        )
    if not len(classes):
        return
    if classes.min() < 0 or classes.max() >= num_labels:
        raise ValueError(
            f"labels[{index}]: class_labels are {classes.min().item()} to {classes.max().item()}; the config has "
            f"{num_labels} labels, 0 to {num_labels - 1}, without a background."
        )
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    wrong = (boxes[:, 2:] <= boxes[:, :2]).any(1) | (boxes < 0).any(1) | ~(boxes <= limits).all(1)
    if wrong.any():
        raise ValueError(
            f"labels[{index}]: the box {boxes[wrong][0].tolist()} is empty or leaves its image of {width} x {height} "
            "pixels; boxes are x1, y1, x2, y2 in pixels."
        )


def load_classifier(model: FasterRCNNForObjectDetection, classifier: nn.Module) -> None:
    """Give the backbone the weights of a classifier of the same architecture, all but those of its last layer.

    Args:
        model: float or latent; unchanged if the weights do not fit.
        classifier: a model of timm, or transformers' wrapper of one, such as `recipes/image_classification.py` leaves.

    Raises:
        ValueError: missing or unexpected weights, or others of another shape.
    """
    network = getattr(classifier, "timm_model", classifier)
    last = [name for name, module in network.named_modules() if name and module is network.get_classifier()]
    state = {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] not in last}
    own = model.backbone.state_dict()
    require_keys(state.keys(), own.keys())
    if wrong := [key for key, value in state.items() if value.shape != own[key].shape]:
        sizes = f"{tuple(state[wrong[0]].shape)} in place of {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"{len(wrong)} weights of the classifier have other shapes (first: {wrong[0]}, {sizes}).")
    model.backbone.load_state_dict(state)


AutoConfig.register(FasterRCNNConfig.model_type, FasterRCNNConfig)
AutoModelForObjectDetection.register(FasterRCNNConfig, FasterRCNNForObjectDetection)
