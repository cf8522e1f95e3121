"""A torchvision whose C++ ops the installed torch cannot load: with its schemas declared by hand it can be imported."""

import importlib.util

import torch

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        LIBRARY = torch.library.Library("torchvision", "DEF")  # declared for as long as this object lives
        for name in ("nms", "qnms"):
            LIBRARY.define(name + NMS)
