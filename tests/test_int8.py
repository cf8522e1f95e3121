"""Dynamic int8 inputs of packed weight-only models."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, ResNetConfig, ResNetForImageClassification

from rebnn_hf import ReBNNConfig, binarize, calibrate, pack, unpack, use_int8_inputs
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import PackedLinear

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 50}
IDS = torch.arange(40).reshape(4, 10) % 50


def packed(**config):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)).eval()
    binarize(model, ReBNNConfig(**config))
    calibrate(model, {"input_ids": IDS})
    return pack(model)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_inputs_are_rounded_to_127_steps_of_their_largest():
    model = packed()
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    x = torch.randn(3, 64)
    use_int8_inputs(model)
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / scale).round() * scale) @ layer.binary_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(layer(x), x @ layer.binary_weight().T + layer.bias)


def test_answers_change_a_little_and_are_those_of_the_reference():
    model = packed()
    exact = logits(model)
    use_int8_inputs(model)
    rounded = logits(model)
    assert 1e-6 < (rounded - exact).abs().max() < 0.02
    with use_backend("reference"):
        torch.testing.assert_close(logits(model), rounded, rtol=1e-4, atol=1e-5)
    assert use_int8_inputs(use_int8_inputs(model), enabled=False) is model
    assert torch.equal(logits(model), exact)


def test_saved_with_the_model(tmp_path):
    model = use_int8_inputs(packed())
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.quantization_config.activation == "token"
    assert torch.equal(logits(again), logits(model))


def test_models_it_is_not_for_are_refused():
    latent = binarize(AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)))
    with pytest.raises(ValueError, match="expects a packed model"):
        use_int8_inputs(latent)
    with pytest.raises(ValueError, match="activation='elastic'"):
        use_int8_inputs(packed(activation="elastic"))


def test_unpack_says_how_to_get_float_inputs_back():
    model = packed()
    expected = logits(model)
    use_int8_inputs(model)
    with pytest.raises(ValueError, match=r"rebnn_hf\.use_int8_inputs\(model, enabled=False\)"):
        unpack(model)
    assert model.config.quantization_config.activation == "token"
    torch.testing.assert_close(logits(unpack(use_int8_inputs(model, enabled=False))), expected)


def test_convolutions_are_refused_and_stay_as_they_are(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    model = pack(binarize(ResNetForImageClassification(ResNetConfig(**sizes)).eval()))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).logits
        with pytest.raises(ValueError, match=r"1-bit convolutions \(first: resnet\.encoder.*activation='elastic'"):
            use_int8_inputs(model)
        assert model.config.quantization_config.activation == "none" and torch.equal(model(images).logits, expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(ResNetForImageClassification.from_pretrained(tmp_path)(images).logits, expected)


def test_a_model_without_linear_layers_is_refused():
    model = packed(word_embeddings=True, modules_to_not_convert=["encoder"])
    with pytest.raises(ValueError, match="has no 1-bit linear layer"):
        use_int8_inputs(model)
    assert model.config.quantization_config.activation == "none"
