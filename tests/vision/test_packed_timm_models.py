"""timm models in the wrapper of transformers: built of 1-bit layers, or float ones that `binarize` changes."""

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed (pip install 'rebnn_hf[vision]')")
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import rebnn_hf.vision  # noqa: F401
from rebnn_hf import ReBNNConfig, binarize, calibrate, pack, rebinarize, summary
from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import PackedLinear


def wrapped(architecture, **arguments):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=4, model_args=arguments or None)
    model = TimmWrapperForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("shift"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model, size=32):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 3, size, size, generator=generator)).logits


@pytest.mark.parametrize("name, rule", [("rebnn_resnet18", "learned"), ("reactnet_resnet18", "mean_abs")])
def test_a_model_built_of_one_bit_layers_is_packed_saved_and_loaded(name, rule, tmp_path):
    model = wrapped(name, stem="cifar")
    expected = logits(model)
    shift = model.timm_model.get_submodule(first_binary(model)).input_binarizer.shift.clone()
    binarize(model)
    config = model.config.quantization_config
    assert (config.weight_scale, config.activation, len(config.converted)) == (rule, "rsign", 16)
    assert torch.equal(logits(model), expected)
    with use_backend("reference"):
        assert torch.equal(logits(pack(model)), expected)
    torch.testing.assert_close(logits(model), expected)  # the engine
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert sum(isinstance(module, PackedConv2d) for module in loaded.modules()) == 16
    assert torch.equal(loaded.timm_model.get_submodule(first_binary(loaded)).input_binarizer.shift, shift)
    with use_backend("reference"):
        assert torch.equal(logits(loaded), expected)
    assert summary(loaded).totals["ratio"] > 15


def first_binary(model):
    return next(n for n, m in model.timm_model.named_modules() if isinstance(m, BinaryConv2d | PackedConv2d))


def test_latent_checkpoints_of_built_in_models_go_on_training(tmp_path):
    model = binarize(wrapped("rebnn_resnet18", stem="cifar"))
    with torch.no_grad():
        model.timm_model.get_submodule(first_binary(model)).balance.fill_(0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    layer = loaded.timm_model.get_submodule(first_binary(loaded))
    assert isinstance(layer, BinaryConv2d) and (layer.balance == 0.25).all()
    assert torch.equal(logits(loaded), logits(model))


def test_settings_of_a_built_in_model_cannot_be_changed_but_its_balance():
    model = wrapped("rebnn_resnet18", stem="cifar")
    with pytest.raises(ValueError, match=r"built of 1-bit layers with other settings \(weight_scale"):
        binarize(model, ReBNNConfig(weight_scale="mean_abs", activation="rsign", balance_rule="none"))
    binarize(model, ReBNNConfig(activation="rsign", balance_rule="const", balance_value=2e-4))
    assert model.config.quantization_config.balance_value == 2e-4
    rebinarize(model, ReBNNConfig(activation="rsign", balance_form="decoupled"))
    assert model.config.quantization_config.balance_form == "decoupled"


def test_layers_that_no_config_describes_are_refused():
    model = wrapped("rebnn_resnet18", stem="cifar")
    model.timm_model.get_submodule(first_binary(model)).input_binarizer = None
    with pytest.raises(ValueError, match="no single config describes"):
        binarize(model)


@pytest.mark.parametrize(
    "name, size, layers, activation",
    [("resnet18", 32, 16, "elastic"), ("vit_tiny_patch16_224", 224, 48, "none"), ("convnext_atto", 32, 24, "none")],
)
def test_float_timm_models(name, size, layers, activation, tmp_path):
    model = binarize(wrapped(name), ReBNNConfig(activation=activation))
    calibrate(model, {"pixel_values": torch.randn(2, 3, size, size)})
    expected = logits(model, size)
    pack(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert sum(isinstance(module, PackedConv2d | PackedLinear) for module in loaded.modules()) == layers
    with use_backend("reference"):
        torch.testing.assert_close(logits(loaded, size), expected)


def test_scales_of_a_fresh_model_fit_its_weights():
    """transformers draws the weights of convolutions anew, but not of those that have scales."""
    config = TimmWrapperConfig(architecture="rebnn_resnet18", num_labels=4, model_args={"stem": "cifar"})
    model = TimmWrapperForImageClassification(config)
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    assert len(layers) == 16
    for layer in layers:
        torch.testing.assert_close(layer.weight_scale, layer.weight.abs().mean((1, 2, 3)))
