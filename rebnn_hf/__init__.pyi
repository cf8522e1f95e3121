"""What type checkers see in place of the lazy imports of `__init__.py`."""

from .activations import ActivationRule as ActivationRule
from .binarizers import calibrate as calibrate
from .config import ReBNNConfig as ReBNNConfig
from .convolutions import BinaryConv2d as BinaryConv2d, PackedConv2d as PackedConv2d
from .flops import operations as operations
from .functional import BalanceRule as BalanceRule, WeightRule as WeightRule
from .fusion import fuse as fuse, is_fused as is_fused
from .int8 import use_int8_inputs as use_int8_inputs
from .layers import (
    BinaryEmbedding as BinaryEmbedding,
    BinaryLinear as BinaryLinear,
    PackedEmbedding as PackedEmbedding,
    PackedLinear as PackedLinear,
)
from .patching import (
    binarize as binarize,
    pack as pack,
    rebinarize as rebinarize,
    selected_modules as selected_modules,
    stage_conflict as stage_conflict,
    unpack as unpack,
)
from .plotting import plot_latent_weights as plot_latent_weights, plot_oscillation as plot_oscillation
from .report import summary as summary
from .resilience import Resilience as Resilience, attach as attach
from .trainer import ReBNNTrainer as ReBNNTrainer, ReBNNTrainingArguments as ReBNNTrainingArguments

__version__: str
