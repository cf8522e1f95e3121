"""Convolutional networks of transformers in one bit: which convolutions, training, packing, loading."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import rebnn_hf
from rebnn_hf import (
    ReBNNConfig,
    ReBNNTrainer,
    ReBNNTrainingArguments,
    binarize,
    calibrate,
    operations,
    pack,
    summary,
    unpack,
)
from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d
from rebnn_hf.kernels import use_backend

RESNET_BLOCK = ["layer.0.convolution", "layer.1.convolution"]
MODELS = {
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(
            num_labels=4, embedding_size=12, hidden_sizes=[12, 20], depths=[1, 2], layer_type="basic", num_channels=3
        )
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(num_labels=4, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
    ),
}
CONVERTED = {
    "resnet": [
        f"encoder.stages.{stage}.layers.{layer}.{leaf}"
        for stage, layer in ((0, 0), (1, 0), (1, 1))
        for leaf in RESNET_BLOCK
    ],
    "convnext": [f"encoder.stages.{stage}.layers.0.pwconv{n}" for stage in (0, 1) for n in (1, 2)],
}
"""By hand: no stem, no shortcut or downsampling, nothing depthwise, no classifier."""


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images():
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def logits(model):
    with torch.no_grad():
        return model(**images()).logits


@pytest.mark.parametrize("name", MODELS)
def test_which_layers(name):
    model = binarize(build(name))
    assert model.config.quantization_config.converted == CONVERTED[name]
    kept = model.config.quantization_config.not_converted
    assert all(isinstance(model.get_submodule(n), nn.Conv2d | nn.Linear) for n in kept) and kept


@pytest.mark.parametrize("activation", ["none", "elastic"])
@pytest.mark.parametrize("name", MODELS)
def test_from_float_to_the_loaded_packed_model(name, activation, tmp_path):
    model = build(name)
    binarize(model, ReBNNConfig(activation=activation))
    calibrate(model, images())
    expected = logits(model)
    model.save_pretrained(tmp_path / "latent")
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "latent")
    assert torch.equal(logits(again), expected)
    with use_backend("reference"):
        assert torch.equal(logits(pack(model)), expected)
    model.save_pretrained(tmp_path / "packed")
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    with use_backend("reference"):
        assert torch.equal(logits(loaded), expected)
    for full in (f"{name}.{short}" for short in CONVERTED[name]):
        assert loaded.get_submodule(full).weight.dtype == torch.uint8
    if activation == "none":
        plain = unpack(loaded)
        torch.testing.assert_close(logits(plain), expected)
        assert not any("rebnn_hf" in type(module).__module__ for module in plain.modules())


def test_inputs_behind_a_relu_are_codes_without_sign():
    model = binarize(build("resnet"), ReBNNConfig(activation="elastic"))
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    assert len(layers) == 6 and not any(layer.input_binarizer.signed for layer in layers)


@pytest.mark.parametrize("activation", ["sign", "rsign"])
def test_signs_of_what_is_never_negative_are_refused(activation):
    model = build("resnet")
    with pytest.raises(ValueError, match=r"never negative.*activation='elastic'"):
        binarize(model, ReBNNConfig(activation=activation))
    assert not any(isinstance(module, BinaryConv2d) for module in model.modules())


def test_other_refusals():
    with pytest.raises(ValueError, match="scale for each position"):
        binarize(build("resnet"), ReBNNConfig(activation="token"))
    model = build("resnet")
    conv = model.resnet.encoder.stages[0].layers[0].layer[0].convolution
    conv.padding_mode = "reflect"
    with pytest.raises(ValueError, match=r"layer\.0\.convolution pads with padding_mode='reflect'"):
        binarize(model)
    binarize(
        model, ReBNNConfig(modules_to_not_convert=[r"resnet\.encoder\.stages\.0\.layers\.0\.layer\.0\.convolution"])
    )


def test_the_balance_rule_reaches_convolutions():
    model = binarize(build("resnet")).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    handle = rebnn_hf.attach(optimizer, model)
    assert handle.layers == [f"resnet.{name}" for name in CONVERTED["resnet"]]
    for _ in range(3):
        optimizer.zero_grad()
        model(**images(), labels=torch.tensor([0, 3])).loss.backward()
        optimizer.step()
    statistics = handle.statistics()
    assert all(layer["flip_ratio"] > 0 for layer in statistics.values())
    assert statistics["resnet.encoder.stages.1.layers.0.layer.0.convolution"]["weights"] == 12 * 20 * 9


def distilled(student, teacher, folder, **options):
    """The log of two steps with the Trainer's defaults, each on all of eight images."""
    generator = torch.Generator().manual_seed(2)
    data = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 4} for i in range(8)]
    options = dict(max_steps=2, per_device_train_batch_size=8, logging_steps=1, learning_rate=1e-2) | options
    arguments = ReBNNTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, plot_oscillation=False, save_strategy="no", **options
    )
    trainer = ReBNNTrainer(model=student, teacher=teacher, args=arguments, train_dataset=data)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    return steps, torch.stack([item["pixel_values"] for item in data])


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_compares_feature_maps_position_by_position(name, tmp_path):
    teacher, student = build(name), binarize(build(name))
    untrained = copy.deepcopy(student).train()
    log, pixels = distilled(student, teacher, tmp_path)
    with torch.no_grad():
        mine, theirs = (model(pixels, output_hidden_states=True).hidden_states for model in (untrained, teacher))
    assert len(mine) == 3 and all(level.ndim == 4 for level in mine)
    expected = sum((s - t).square().sum() / t.square().sum() for s, t in zip(mine, theirs, strict=True))
    assert log[0]["loss_hidden"] == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-4
    assert log[0]["loss"] == pytest.approx(log[0]["loss_hidden"] + log[0]["loss_logits"], rel=1e-4)


def test_feature_maps_of_other_shapes_are_refused_with_what_to_do(tmp_path):
    sizes = dict(num_labels=4, embedding_size=12, hidden_sizes=[12, 24], depths=[1, 2], layer_type="basic")
    teacher = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    student = binarize(build("resnet"))
    with pytest.raises(ValueError, match=r"student feature maps \[8, 20, 4, 4\] .* \[8, 24, 4, 4\].*hidden_weight=0"):
        distilled(student, teacher, tmp_path)
    log, _ = distilled(student, teacher, tmp_path, hidden_weight=0.0)
    assert log[0]["loss"] == pytest.approx(log[0]["loss_logits"], rel=1e-4)


def test_summary_counts_bits_of_convolutions():
    model = pack(binarize(build("resnet")))
    rows = {row.name: row for row in summary(model).rows}
    row = rows["resnet.encoder.stages.1.layers.0.layer.0.convolution"]
    assert (row.type, row.bits, row.parameters, row.added) == ("PackedConv2d", 1, 20 * 108, 20)
    assert row.bytes_now == 20 * 14 + 20 * 4  # 108 bits are 14 bytes
    assert isinstance(model.get_submodule(row.name), PackedConv2d)


def test_notes_say_why_a_convolution_is_float():
    listed = "resnet.encoder.stages.1.layers.1.layer.0.convolution"
    model = binarize(build("resnet"), ReBNNConfig(modules_to_not_convert=[listed]))
    notes = {row.name: row.note for row in summary(model).rows}
    assert notes["resnet.embedder.embedder.convolution"] == "float: stem"
    assert notes["resnet.encoder.stages.1.layers.0.shortcut.convolution"] == "float: shortcut or downsampling"
    assert notes[listed] == "float: listed in modules_to_not_convert"
    assert notes["classifier.1"] == "float: head (head=False)"
    notes = {row.name: row.note for row in summary(pack(binarize(build("convnext")))).rows}
    assert notes["convnext.embeddings.patch_embeddings"] == "float: stem"
    assert notes["convnext.encoder.stages.1.downsampling_layer.1"] == "float: shortcut or downsampling"
    assert notes["convnext.encoder.stages.1.layers.0.dwconv"] == "float: convolution with groups"
    assert notes["convnext.encoder.stages.1.layers.0"] == "float: neither a linear layer nor a convolution"


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_operations_of_resnet18_are_those_of_the_literature(state):
    """At 224 x 224. Stem: 112^2 * 64 * 147. Blocks, 3x3 at 56, 28, 14 and 7: 4 * 56^2 * 64 * 576, then three times the
    first convolution of a stage at half of the others' (28^2 * 128 * 1152 and so on). Shortcuts: 3 * 28^2 * 128 * 64.
    One-bit products count a 64th: 1.68e9 / 64 + 1.38e8 = 1.64e8, published as 1.63e8 (ReActNet, Bi-Real Net)."""
    config = hf.ResNetConfig(
        num_labels=1000, embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    with torch.device("meta"):
        model = hf.ResNetForImageClassification(config)
    model.to_empty(device="cpu").requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()
    binarize(model, ReBNNConfig(activation="elastic"))
    calibrate(model, images())
    model = pack(model) if state == "packed" else model
    result = operations(model)
    assert result.inputs == "one image of 224 x 224"
    shape = {(row.part, row.bits): row.macs for row in result.rows}
    inner = 4 * 56**2 * 64 * 576 + 3 * (28**2 * 128 * 576 + 3 * 28**2 * 128 * 1152)
    assert shape == {
        ("stem and other convolutions", (32, 32)): 112**2 * 64 * 147 + 3 * 28**2 * 128 * 64,
        ("convolutions of the blocks", (1, 1)): inner,
        ("linear layers", (32, 32)): 512_000,
    }
    assert inner == 1_676_279_808
    assert result.totals["equivalent_flops"] / 2 == pytest.approx(1.64e8, rel=2e-3)


def test_operations_of_an_image_leave_the_model_as_it_was():
    model = build("convnext").train()
    result = operations(model, image_size=32)
    assert model.training and not any(
        module._forward_hooks for module in model.modules() if isinstance(module, nn.Conv2d)
    )
    depthwise = 8 * 49 * 16**2 + 12 * 49 * 8**2
    other = 3 * 8 * 4 * 16**2 + 8 * 12 * 4 * 8**2
    shape = {row.part: row.macs for row in result.rows}
    assert shape["stem and other convolutions"] == depthwise + other
    assert shape["linear layers"] == 2 * 8 * 32 * 16**2 + 2 * 12 * 48 * 8**2 + 12 * 4
    with pytest.raises(ValueError, match="image_size=0"):
        operations(model, image_size=0)
