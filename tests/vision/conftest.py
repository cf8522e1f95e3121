"""A torchvision whose C++ operators the installed torch cannot load: with schemas declared by hand it can be imported,
and with plain torch in place of two operators its detectors run. Where they load, torchvision's own are used."""

import importlib.util
import sys

import torch

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def plain_nms(boxes, scores, iou_threshold):
    """Indices of the boxes that overlap with no better one that is kept, the best first."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = sys.modules["torchvision.ops"].box_iou(boxes[order], boxes[order])
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for index in range(len(boxes)):
        if kept[index]:
            kept[index + 1 :] &= overlaps[index, index + 1 :] <= iou_threshold
    return order[kept]


if importlib.util.find_spec("torchvision"):
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        LIBRARY = torch.library.Library("torchvision", "DEF")  # declared for as long as this object lives
        for name in ("nms", "qnms"):
            LIBRARY.define(name + NMS)
        LIBRARY.impl("nms", plain_nms, "CPU")
        import torchvision.extension
        import torchvision.ops

        torchvision.extension._has_ops = lambda: True  # nms asks for it
        roi_align = sys.modules["torchvision.ops.roi_align"]  # which has plain torch of its own,
        roi_align._roi_align = roi_align._roi_align.__wrapped__  # here without the minute that compiling it takes
