"""Models by name and state, and whether two belong together."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import rebnn_hf
from rebnn_hf.layers import PackedLinear
from rebnn_hf.loading import check_twins, load

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


def float_model(**changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**CONFIG | changes)).eval()


def test_load(tmp_path):
    rebnn_hf.pack(rebnn_hf.binarize(float_model())).save_pretrained(tmp_path / "packed")
    float_model().save_pretrained(tmp_path / "float")
    loaded = load(str(tmp_path / "packed"), "packed")
    assert type(loaded) is BertForSequenceClassification and not loaded.training
    assert isinstance(loaded.bert.encoder.layer[0].output.dense, PackedLinear)
    assert type(load(str(tmp_path / "float"), "latent", "float").classifier) is nn.Linear
    with pytest.raises(ValueError, match="is not a packed model"):
        load(str(tmp_path / "float"), "packed")
    with pytest.raises(ValueError, match="is not a float model: its config has quant_method='rebnn'"):
        load(str(tmp_path / "packed"), "float")
    with pytest.raises(ValueError, match="nowhere' is no model"):
        load(str(tmp_path / "nowhere"), "packed")


@pytest.mark.parametrize("key, value", [("vocab_size", 51), ("hidden_size", 64), ("num_hidden_layers", 1)])
def test_other_float_models_are_refused(key, value):
    packed, same = rebnn_hf.pack(rebnn_hf.binarize(float_model())), float_model()
    check_twins(packed, same)
    with pytest.raises(ValueError, match=rf"the float model has {key}={value} and the packed one {CONFIG[key]}"):
        check_twins(packed, float_model(**{key: value}))
