"""Weights in and out: timm's ways, the released codes' names, stage one; and what does not fit is refused."""

from itertools import pairwise

import equations
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")

import timm

from rebnn_hf.layers import BinaryConv2d
from rebnn_hf.vision import load_stage_one
from rebnn_hf.vision.checkpoints import checkpoint_filter_fn

SMALL = ["rebnn_resnet18", "reactnet_a"]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 3, **kwargs}).eval()


def values(*shape):
    return torch.randn(*shape) if shape else torch.tensor(5)


def statistics(name, chs):
    state = {f"{name}.{key}": values(chs) for key in ("weight", "bias", "running_mean")}
    return {**state, f"{name}.running_var": values(chs).abs() + 0.5, f"{name}.num_batches_tracked": values()}


def bias_and_slope(names, chs):
    """Two shifts around a PReLU."""
    before, slope, after = names
    shifts = {f"{before}.bias": values(1, chs, 1, 1), f"{after}.bias": values(1, chs, 1, 1)}
    return {**shifts, f"{slope}.weight": values(chs)}


def released_resnet18(scales):
    """A state dict in the names and shapes of the released code, `scaling_factor` where ReBNN's has it."""
    torch.manual_seed(5)
    state = {"conv1.weight": values(64, 3, 7, 7), **statistics("bn1", 64)}
    for layer, (in_chs, chs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        for i in range(4):
            name, c = f"layer{layer}.{i}", in_chs if i == 0 else chs
            state[f"{name}.move0.bias"] = values(1, c, 1, 1)
            state[f"{name}.binary_conv.weight"] = values(chs, c, 3, 3)
            if scales:
                state[f"{name}.binary_conv.scaling_factor"] = values(chs, 1, 1, 1)
            state |= statistics(f"{name}.bn1", chs)
            state |= bias_and_slope((f"{name}.move1", f"{name}.prelu", f"{name}.move2"), chs)
        if layer > 1:
            state[f"layer{layer}.0.downsample.1.weight"] = values(chs, in_chs, 1, 1)
            state |= statistics(f"layer{layer}.0.downsample.2", chs)
    return {**state, "fc.weight": values(3, 512), "fc.bias": values(3)}


def released_reactnet(flat):
    """`flat`: stage two, whose weights are vectors `weights`; stage one has filters `weight`."""
    torch.manual_seed(6)

    def conv(name, out_chs, in_chs, side):
        shape = (out_chs * in_chs * side * side, 1) if flat else (out_chs, in_chs, side, side)
        return {f"{name}.weight{'s' if flat else ''}": values(*shape)}

    state = {"feature.0.conv1.weight": values(32, 3, 3, 3), **statistics("feature.0.bn1", 32)}
    chs = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    for i, (c, o) in enumerate(pairwise(chs), start=1):
        name = f"feature.{i}"
        state |= {f"{name}.move{m}1.bias": values(1, c, 1, 1) for m in (1, 2)}
        state |= conv(f"{name}.binary_3x3", c, c, 3) | statistics(f"{name}.bn1", c)
        if c == o:
            state |= conv(f"{name}.binary_pw", c, c, 1) | statistics(f"{name}.bn2", c)
        for half in (2, 1) if c != o else ():  # in the wrong order
            state |= conv(f"{name}.binary_pw_down{half}", c, c, 1) | statistics(f"{name}.bn2_{half}", c)
        state |= bias_and_slope((f"{name}.move12", f"{name}.prelu1", f"{name}.move13"), c)
        state |= bias_and_slope((f"{name}.move22", f"{name}.prelu2", f"{name}.move23"), o)
    return {**state, "fc.weight": values(3, 1024), "fc.bias": values(3)}


@pytest.mark.parametrize("name", [*SMALL, "rebnn_reactnet_a", "reactnet_resnet18"])
def test_timm_file(name, tmp_path):
    source = equations.randomize(build(name))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 3}
    loaded = build(name, 1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded(X), source(X))
    other = build(name, 1, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert other(X[:, :1]).shape == (2, 5)
    torch.testing.assert_close(other.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    features = build(name, 1, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(features(X)[-1], source.forward_features(X))
    direct = build(name, 1, checkpoint_path=overlay["file"])
    assert torch.equal(direct(X), source(X))


def test_timm_hub_folder(tmp_path):
    """A folder as `push_to_hf_hub` makes it, read by `local-dir:` and by `pretrained=True`."""
    source = equations.randomize(build("rebnn_resnet18", stem="cifar"))
    timm.models.save_for_hf(source, tmp_path, model_args={"stem": "cifar"})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(X), source(X))


@pytest.mark.parametrize("name, scales", [("rebnn_resnet18", True), ("reactnet_resnet18", False)])
def test_released_resnet(name, scales, tmp_path):
    released = released_resnet18(scales)
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in released.items()}}
    torch.save(wrapped, tmp_path / "model.pth")
    overlay = {"file": str(tmp_path / "model.pth"), "num_classes": 3}
    model = build(name, pretrained=True, pretrained_cfg_overlay=overlay)
    unit, prefix = model.stages[1][0], "layer2.0."
    assert torch.equal(unit.conv.weight, released[prefix + "binary_conv.weight"])
    assert torch.equal(unit.conv.input_binarizer.shift, released[prefix + "move0.bias"].flatten())
    assert torch.equal(unit.norm.running_mean, released[prefix + "bn1.running_mean"])
    assert torch.equal(unit.shortcut[1].weight, released[prefix + "downsample.1.weight"])
    assert torch.equal(unit.shortcut[2].bias, released[prefix + "downsample.2.bias"])
    for own, theirs in (("shift_in", "move1.bias"), ("slope", "prelu.weight"), ("shift_out", "move2.bias")):
        assert torch.equal(getattr(unit.act, own), released[prefix + theirs].flatten())
    assert torch.equal(model.stem.bn.weight, released["bn1.weight"])
    assert torch.equal(model.stages[3][3].norm.weight, released["layer4.3.bn1.weight"])
    assert torch.equal(model.head.fc.weight, released["fc.weight"])
    if scales:  # the released code multiplies by 0.02 |s|
        expected = 0.02 * released[prefix + "binary_conv.scaling_factor"].flatten().abs()
        torch.testing.assert_close(unit.conv.weight_scale, expected)
    # every tensor was used: the sums of all values agree, but for the factor of the scales and the balances of zero
    total = sum(v.double().sum() for k, v in released.items() if not k.endswith("scaling_factor"))
    own = sum(v.double().sum() for k, v in model.state_dict().items() if not k.endswith("weight_scale"))
    torch.testing.assert_close(own, total)


@pytest.mark.parametrize("flat", [True, False])
def test_released_reactnet(flat):
    """The two branches of a doubling block, computed apart from the released tensors, are our one convolution."""
    released = released_reactnet(flat)
    model = build("reactnet_a", binary_weights=flat)
    model.load_state_dict(checkpoint_filter_fn(released, model))
    block, p = model.stages[2][0].double(), "feature.4."
    r = {key: value.double() for key, value in released.items()}
    x = torch.randn(1, 128, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        out = equations.unit(block.spatial, x, "mean_abs" if flat else "float", equations.halve, 2)
        codes = equations.sign(out + r[p + "move21.bias"])
        halves = []
        for i in (1, 2):
            weight = r[f"{p}binary_pw_down{i}.weight{'s' if flat else ''}"].view(128, 128, 1, 1)
            if flat:
                weight = weight.abs().mean((1, 2, 3), keepdim=True) * equations.sign(weight)
            names = ("running_mean", "running_var", "weight", "bias")
            branch = equations.normalize(
                equations.convolve(codes, weight), *(r[f"{p}bn2_{i}.{name}"] for name in names)
            )
            halves.append(branch + out)
        shifts = (r[p + "move22.bias"].flatten(), r[p + "prelu2.weight"], r[p + "move23.bias"].flatten())
        torch.testing.assert_close(block(x), equations.rprelu(torch.cat(halves, 1), *shifts))
    weights = released[p + ("binary_3x3.weights" if flat else "binary_3x3.weight")].view(128, 128, 3, 3)
    assert torch.equal(block.spatial.conv.weight.float(), weights)
    for own, theirs in (("shift_in", "move12.bias"), ("slope", "prelu1.weight"), ("shift_out", "move13.bias")):
        assert torch.equal(getattr(block.spatial.act, own).float(), released[p + theirs].flatten())
    assert torch.equal(block.spatial.conv.input_binarizer.shift.float(), released[p + "move11.bias"].flatten())


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    "state, message",
    [
        (lambda: without(released_resnet18(True), "layer3.1.binary_conv.weight"), "stages.2.1.conv.weight"),
        (lambda: {**released_resnet18(True), "layer1.0.binary_conv.u": values(1)}, "stages.0.0.binary_conv.u"),
        (lambda: {**build("rebnn_resnet18").state_dict(), "stages.0.9.norm.bias": values(1)}, "stages.0.9.norm.bias"),
        (lambda: released_resnet18(False), r"weight_scale.*load_stage_one\(\)"),
        (lambda: build("rebnn_resnet18", binary_weights=False).state_dict(), r"balance.*load_stage_one\(\)"),
        (lambda: released_reactnet(True), "feature"),
        (lambda: {"state_dict": {}}, "does not fit"),
    ],
)
def test_leftovers_are_refused(state, message):
    """Also with another number of classes, where timm itself no longer loads strictly."""
    for num_classes in (3, 5):
        overlay = {"state_dict": state(), "num_classes": 3}
        with pytest.raises(ValueError, match=message):
            build("rebnn_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)


@pytest.mark.parametrize("name", [*SMALL, "rebnn_reactnet_a", "reactnet_resnet18"])
def test_stage_two_begins_with_stage_one(name):
    one, two = equations.randomize(build(name, binary_weights=False)), equations.randomize(build(name, 1), 1)
    load_stage_one(two, one.state_dict())
    after = two.state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(after[key], value)
    for conv in (module for module in two.modules() if isinstance(module, BinaryConv2d)):
        torch.testing.assert_close(conv.scale(), conv.weight.abs().mean((1, 2, 3)))
        assert not conv.balance.any()
    # what stage two computes is stage one with the binary weights put in place of its own
    with torch.no_grad():
        for conv, module in ((two.get_submodule(n), m) for n, m in one.named_modules()):
            if isinstance(conv, BinaryConv2d):
                module.weight.copy_(conv.binary_weight().view(module.weight.shape))
    y, expected = two.stem(X), one.stem(X)
    assert torch.equal(y, expected)
    unit = (lambda m: m.stages[0][0]) if "resnet" in name else (lambda m: m.stages[0][0].spatial)
    torch.testing.assert_close(unit(two)(y), unit(one)(y), atol=1e-4, rtol=1e-4)


def test_released_stage_one():
    two = build("rebnn_resnet18")
    released = released_resnet18(False)
    load_stage_one(two, {f"module.{key}": value for key, value in released.items()})
    conv = two.stages[2][1].conv
    assert torch.equal(conv.weight, released["layer3.1.binary_conv.weight"])
    torch.testing.assert_close(conv.weight_scale, conv.weight.abs().mean((1, 2, 3)))


def test_stage_one_must_fit():
    one, two = build("rebnn_resnet18", 1, binary_weights=False), build("rebnn_resnet18")
    before = {key: value.clone() for key, value in two.state_dict().items()}
    state = one.state_dict()
    cases = [
        (without(state, "stages.0.0.conv.weight"), r"1 keys are missing \(stages.0.0.conv.weight\), 0 are unexpected"),
        ({**state, "stages.0.0.conv.bias": values(1)}, r"0 keys are missing \(none\), 1 are unexpected"),
        (without(state, "head.fc.bias"), "head.fc.bias"),
        (build("rebnn_resnet18", 1).state_dict(), "32 are unexpected"),
        ({**state, "head.fc.bias": values(7)}, r"1 tensors .* other shapes \(first: head.fc.bias, \(7,\) in place"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            load_stage_one(two, wrong)
    assert all(torch.equal(value, before[key]) for key, value in two.state_dict().items())
    with pytest.raises(ValueError, match="binary_weights=True"):
        load_stage_one(one, state)
    assert isinstance(two.get_classifier(), nn.Linear)
