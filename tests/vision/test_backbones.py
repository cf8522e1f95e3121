"""The registered models: what is in them, and what timm asks of them."""

import equations
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")

import timm

import rebnn_hf.vision
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryConv2d
from rebnn_hf.resilience import attach
from rebnn_hf.vision.blocks import REACTNET, SignConv2d

RESNETS = ["rebnn_resnet18", "rebnn_resnet34", "reactnet_resnet18", "reactnet_resnet34"]
MOBILENETS = ["rebnn_reactnet_a", "reactnet_a"]
SMALL = ["rebnn_resnet18", "reactnet_a"]
CHANNELS = {"resnet": [64, 64, 128, 256, 512], "reactnet_a": [64, 128, 256, 512, 1024]}


def channels(name):
    return CHANNELS["reactnet_a" if name.endswith("reactnet_a") else "resnet"]


def convolutions(model, kind=BinaryConv2d):
    return [module for module in model.modules() if isinstance(module, kind)]


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 3, **kwargs}).eval()


def images(side=64, chs=3):
    return torch.randn(2, chs, side, side, generator=torch.Generator().manual_seed(2))


def test_registry():
    assert timm.list_models("rebnn*") == ["rebnn_reactnet_a", "rebnn_resnet18", "rebnn_resnet34"]
    assert timm.list_models("reactnet*") == ["reactnet_a", "reactnet_resnet18", "reactnet_resnet34"]
    assert sorted(RESNETS + MOBILENETS) == sorted(set(rebnn_hf.vision.__all__) - {"load_stage_one"})
    for name in RESNETS + MOBILENETS:
        assert timm.is_model(name) and timm.get_pretrained_cfg(name).input_size == (3, 224, 224)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_sizes(name):
    """Every 3x3 convolution is 1-bit and has its own shortcut; everything else is counted by hand."""
    model = build(name, num_classes=1000)
    depths = (4, 4, 4, 4) if name.endswith("18") else (6, 8, 12, 6)
    sides = [
        (in_chs if i == 0 else chs, chs)
        for in_chs, chs, depth in zip((64, 64, 128, 256), (64, 128, 256, 512), depths, strict=True)
        for i in range(depth)
    ]
    convs = convolutions(model)
    assert [(c.in_channels, c.out_channels) for c in convs] == sides
    assert len(convs) == (16 if name.endswith("18") else 32)
    assert {(c.kernel_size, c.padding, c.bias) for c in convs} == {((3, 3), (1, 1), None)}
    assert sum(c.stride == (2, 2) for c in convs) == 3
    assert {c.rule for c in convs} == {WeightRule() if name.startswith("rebnn") else REACTNET}
    bits = sum(c.weight.numel() for c in convs)
    assert bits == sum(9 * i * o for i, o in sides) == (10_985_472 if name.endswith("18") else 21_086_208)
    stem = 3 * 64 * 49 + 2 * 64
    shortcuts = sum(i * o + 2 * o for i, o in ((64, 128), (128, 256), (256, 512)))
    scales = sum(o for _, o in sides) if name.startswith("rebnn") else 0
    units = sum(i + 2 * o + 3 * o for i, o in sides)  # RSign, BatchNorm, RPReLU
    total = bits + stem + shortcuts + units + scales + 512 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == total
    if name == "rebnn_resnet18":
        # torchvision's ResNet-18 has 11,689,512; RSign, RPReLU and scales are added, nothing is left out.
        assert total == 11_689_512 + sum(i + 4 * o for i, o in sides)


@pytest.mark.parametrize("name", MOBILENETS)
def test_mobilenet_sizes(name):
    model = build(name, num_classes=1000)
    blocks = [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    blocks += [(512, 512)] * 5 + [(512, 1024), (1024, 1024)]
    sides = [pair for i, o in blocks for pair in ((i, i, 3), (i, o, 1))]
    convs = convolutions(model)
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == sides
    assert [c.in_channels for c in convs if c.stride == (2, 2)] == [64, 128, 256, 512]
    bits = sum(i * o * k * k for i, o, k in sides)
    assert bits == sum(c.weight.numel() for c in convs) == 28_253_184
    scales = sum(o for _, o, _ in sides) if name.startswith("rebnn") else 0
    units = sum(i + 5 * o for i, o, _ in sides)
    total = bits + 3 * 32 * 9 + 2 * 32 + units + scales + 1024 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("name, kind", [("rebnn_resnet18", "learned"), ("reactnet_resnet18", "mean_abs")])
def test_whole_resnet_is_its_equations(name, kind):
    model = equations.randomize(build(name, stem="cifar").double())
    x = images(8).double()
    torch.testing.assert_close(model(x), equations.resnet(model, x, kind))


def test_imagenet_stem_has_no_relu():
    """7x7 convolution of stride 2, BatchNorm, max pool: behind a ReLU all signs would be +1."""
    model = equations.randomize(build("rebnn_resnet18").double())
    x = images(32).double()
    y = equations.norm(F.conv2d(x, model.stem.conv.weight, None, 2, 3), model.stem.bn)
    y = F.max_pool2d(y, 3, 2, 1)
    assert (y < 0).any()
    torch.testing.assert_close(model.forward_features(x), model.stages(y))
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", RESNETS[::3] + MOBILENETS)
def test_features_only(name):
    full = build(name)
    extractor = build(name, features_only=True)
    state = extractor.state_dict()
    extractor.load_state_dict({key: full.state_dict()[full_name(key)] for key in state})
    assert extractor.feature_info.channels() == channels(name)
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    x = images()
    features = extractor(x)
    assert [tuple(f.shape) for f in features] == [
        (2, c, 64 // r, 64 // r) for c, r in zip(channels(name), (2, 4, 8, 16, 32), strict=True)
    ]
    last, levels = full.forward_intermediates(x)
    assert torch.equal(last, full.forward_features(x)) and torch.equal(features[-1], last)
    if name in RESNETS:
        by_hand = [full.stem(x), full.stages[0](full.pool(full.stem(x)))]
    else:
        by_hand = [full.stages[0](full.stem(x)), full.stages[:2](full.stem(x))]
    for feature, level, expected in zip(features, levels, by_hand + levels[2:], strict=True):
        assert torch.equal(feature, level) and torch.equal(feature, expected)


def full_name(key):
    return key.replace("stages_", "stages.")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_out_indices(name, feature_cls):
    extractor = build(name, features_only=True, out_indices=(1, -1), feature_cls=feature_cls)
    assert extractor.feature_info.channels() == [channels(name)[1], channels(name)[4]]
    assert [f.shape[1:] for f in extractor(images())] == [(channels(name)[1], 16, 16), (channels(name)[4], 2, 2)]


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_stop_early(name):
    model, x = build(name), images()
    _, levels = model.forward_intermediates(x)
    reached, (feature,) = model.forward_intermediates(x, indices=[2], stop_early=True)
    assert torch.equal(feature, levels[2]) and torch.equal(reached, feature)
    (only,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(only, levels[-1])
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", SMALL)
def test_head(name):
    model, x = build(name), images()
    features = model.forward_features(x)
    pooled = features.mean((-2, -1))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    fc = model.get_classifier()
    torch.testing.assert_close(model(x), pooled @ fc.weight.T + fc.bias)
    model.reset_classifier(7, "max")
    fc = model.get_classifier()
    assert model.num_classes == fc.out_features == 7
    torch.testing.assert_close(model(x), features.amax((-2, -1)) @ fc.weight.T + fc.bias)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), pooled)
    assert model.num_features == model.head_hidden_size == pooled.shape[1]
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


@pytest.mark.parametrize("name", SMALL)
def test_arguments(name):
    model = build(name, in_chans=1, num_classes=0, drop_rate=0.5, global_pool="catavgmax")
    assert model.stem.conv.in_channels == 1 and model.head.drop.p == model.drop_rate == 0.5
    features = model.forward_features(images(chs=1))
    pooled = torch.cat([features.mean((-2, -1)), features.amax((-2, -1))], 1)
    torch.testing.assert_close(model(images(chs=1)), pooled)
    assert model.head_hidden_size == pooled.shape[1] == 2 * model.num_features
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        build(name, scale="learned")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        build(name, pretrained=True)


def test_cifar_stem():
    model = build("rebnn_resnet18", stem="cifar")
    assert [i["reduction"] for i in model.feature_info] == [1, 1, 2, 4, 8]
    _, levels = model.forward_intermediates(images(32))
    assert [f.shape[-1] for f in levels] == [32, 32, 16, 8, 4]
    with pytest.raises(ValueError, match="stem='tiny' is unknown; expected 'imagenet' or 'cifar'"):
        build("rebnn_resnet18", stem="tiny")


@pytest.mark.parametrize("name", SMALL)
def test_stage_one_has_the_same_names(name):
    one, two = build(name, binary_weights=False), build(name)
    made = {key for key in two.state_dict() if key.endswith((".weight_scale", ".balance"))}
    assert two.state_dict().keys() - made == one.state_dict().keys()
    assert not convolutions(one) and len(convolutions(one, SignConv2d)) == len(convolutions(two))


@pytest.mark.parametrize("name", SMALL)
def test_scales_start_from_the_weights(name):
    for conv in convolutions(build(name)):
        expected = conv.weight.abs().mean((1, 2, 3))
        torch.testing.assert_close(conv.scale(), expected)
        assert (conv.weight_scale is None) == (name == "reactnet_a")
        assert not conv.balance.any()
        assert 0.4 < (conv.weight > 0).float().mean() < 0.6


def test_balance_rule_holds_every_binary_convolution():
    model = build("rebnn_resnet18", stem="cifar").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach(optimizer, model)
    assert len(handle.layers) == 16
    before = [conv.signs() for conv in convolutions(model)]
    F.cross_entropy(model(images(16)), torch.tensor([0, 2])).backward()
    largest = [(conv.weight.grad.flatten(1).abs().amax(1) / conv.scale()) for conv in convolutions(model)]
    optimizer.step()
    for conv, signs, m in zip(convolutions(model), before, largest, strict=True):
        share = (conv.signs() != signs).float().mean(1)
        torch.testing.assert_close(conv.balance, share * m)
    assert max(conv.balance.max() for conv in convolutions(model)) > 0
