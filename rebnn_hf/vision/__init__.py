"""1-bit image backbones in timm's own registry: importing this package registers them, and `import rebnn_hf` has it
imported right behind timm, whoever imports that (transformers, for one, when it loads a model of timm).

import timm
import rebnn_hf

timm.create_model("rebnn_resnet18", num_classes=10)
"""

try:
    import timm as _needed_by_all  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    raise ImportError("rebnn_hf.vision needs timm; install it with: pip install 'rebnn_hf[vision]'") from error

from .checkpoints import load_stage_one
from .reactnet import reactnet_a, rebnn_reactnet_a
from .resnet import reactnet_resnet18, reactnet_resnet34, rebnn_resnet18, rebnn_resnet34

__all__ = [
    "load_stage_one",
    "reactnet_a",
    "reactnet_resnet18",
    "reactnet_resnet34",
    "rebnn_reactnet_a",
    "rebnn_resnet18",
    "rebnn_resnet34",
]
