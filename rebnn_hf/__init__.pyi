"""What type checkers see in place of the lazy imports of `__init__.py`."""

from .activations import ActivationRule as ActivationRule
from .binarizers import calibrate as calibrate
from .card import model_card as model_card
from .comparison import compare as compare
from .config import ReBNNConfig as ReBNNConfig
from .convolutions import BinaryConv2d as BinaryConv2d, PackedConv2d as PackedConv2d
from .flops import operations as operations
from .functional import BalanceRule as BalanceRule, WeightRule as WeightRule
from .fusion import fuse as fuse, is_fused as is_fused
from .hub import allow_loading_without_import as allow_loading_without_import
from .int8 import use_int8_inputs as use_int8_inputs
from .integrations.onnx import export_onnx as export_onnx
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
from .plotting import (
    plot_epoch_flips as plot_epoch_flips,
    plot_latent_weights as plot_latent_weights,
    plot_oscillation as plot_oscillation,
    plot_tradeoff as plot_tradeoff,
)
from .report import packed_size as packed_size, summary as summary
from .resilience import Resilience as Resilience, attach as attach
from .saving import load_model as load_model, save_model as save_model
from .trainer import ReBNNTrainer as ReBNNTrainer
from .training_arguments import ReBNNTrainingArguments as ReBNNTrainingArguments

__version__: str
