"""Good checkpoints to damage: the golden ones, and the smallest there can be."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from rebnn_hf import ReBNNConfig, binarize, calibrate, pack

GOLDEN = Path(__file__).parents[1] / "data"
NAMES = ("one_layer", "golden_v1", "golden_v2")


class OneLayerConfig(hf.PretrainedConfig):
    model_type = "one-layer"
    hidden_size = 10


class OneLayer(hf.PreTrainedModel):
    """An encoder of one linear layer: a loaded file costs the least time."""

    config_class = OneLayerConfig
    base_model_prefix = "one"

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([nn.Linear(10, 3)])
        self.norm = nn.LayerNorm(3)
        self.post_init()

    def forward(self, x):
        return self.norm(self.blocks[0](x))


class Checkpoint:
    """A good checkpoint of that name in memory, and the folder in which others take its place.

    Attributes:
        config: contents of config.json.
        tensors: contents of model.safetensors.
    """

    def __init__(self, name: str, parent: Path):
        self.name, self.folder = name, parent / name
        if name == "one_layer":
            _save_one_layer(self.folder)
        else:
            shutil.copytree(GOLDEN / name, self.folder)
        self.config = (self.folder / "config.json").read_bytes()
        self.tensors = (self.folder / "model.safetensors").read_bytes()

    def write(self, config: bytes, tensors: bytes) -> None:
        """Put other files into the folder."""
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "model.safetensors").write_bytes(tensors)

    def load(self) -> hf.PreTrainedModel:
        """What a user's `from_pretrained` gives."""
        kind = OneLayer if self.name == "one_layer" else hf.BertForSequenceClassification
        return kind.from_pretrained(self.folder)

    def outputs(self, model: hf.PreTrainedModel) -> torch.Tensor:
        """Of one small batch."""
        with torch.no_grad():
            if self.name == "one_layer":
                return model(torch.linspace(-2, 2, 20).reshape(2, 10))
            return model(input_ids=torch.tensor([[2, 5, 7], [1, 17, 0]])).logits


def _save_one_layer(folder: Path) -> None:
    torch.manual_seed(0)
    model = binarize(OneLayer(OneLayerConfig()).eval(), ReBNNConfig(activation="elastic"))
    calibrate(model, {"x": torch.randn(4, 10)})
    pack(model).save_pretrained(folder)
