"""Networks of torchvision and timm as they are, without the wrapper of transformers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")
pytest.importorskip("torchvision", reason="needs torchvision")
import timm
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import rebnn_hf
import rebnn_hf.vision
from rebnn_hf import ReBNNConfig, binarize, calibrate, load_model, pack, save_model, selected_modules
from rebnn_hf.architecture import kept_convolutions
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import PACKED_TYPES

RESNET18 = [f"layer{stage}.{block}.conv{n}" for stage in (1, 2, 3, 4) for block in (0, 1) for n in (1, 2)]

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


def test_one_network_from_three_libraries():
    torchvisions = on_meta(torchvision.models.resnet18)
    timms = on_meta(timm.create_model, "resnet18")
    config = TimmWrapperConfig(architecture="resnet18", num_labels=10)
    wrapped = on_meta(TimmWrapperForImageClassification, config)
    assert selected_modules(torchvisions) == selected_modules(timms) == RESNET18
    assert selected_modules(wrapped) == [f"timm_model.{name}" for name in RESNET18]
    expected = {"conv1": "stem", **{f"layer{stage}.0.downsample.0": "shortcut" for stage in (2, 3, 4)}}
    assert kept_convolutions(torchvisions) == kept_convolutions(timms) == expected
    head = ReBNNConfig(head=True)
    assert set(selected_modules(timms, head)) == set(selected_modules(torchvisions, head)) == {*RESNET18, "fc"}
    assert set(selected_modules(wrapped, head)) == {f"timm_model.{name}" for name in [*RESNET18, "fc"]}


NETWORKS = {  # how it is built, layers of bits, and the names of what stays float
    "vgg11": (torchvision.models.vgg11, 7, {"features.0": "stem"}),
    "squeezenet": (torchvision.models.squeezenet1_0, 24, {"features.0": "stem", "classifier.1": "head"}),
    "convnext": (
        torchvision.models.convnext_tiny,
        36,
        {"features.0.0": "stem", **{f"features.{n}.1": "shortcut" for n in (2, 4, 6)}},
    ),
    "mobilenet": (torchvision.models.mobilenet_v2, 34, {"features.0.0": "stem"}),
    "timm's deep stem": (
        lambda: timm.create_model("resnet18d"),
        16,
        {**{f"conv1.{n}": "stem" for n in (0, 3, 6)}, **{f"layer{n}.0.downsample.1": "shortcut" for n in (2, 3, 4)}},
    ),
    "timm's convnext": (
        lambda: timm.create_model("convnext_atto"),
        24,
        {"stem.0": "stem", **{f"stages.{n}.downsample.1": "shortcut" for n in (1, 2, 3)}},
    ),
    "timm's deit": (lambda: timm.create_model("deit_tiny_patch16_224"), 48, {"patch_embed.proj": "stem"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_which_layers(name):
    build, layers, kept = NETWORKS[name]
    model = on_meta(build)
    assert len(selected_modules(model)) == layers
    with_groups = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert kept_convolutions(model) == kept | dict.fromkeys(with_groups, "groups")


def test_networks_that_multiply_the_weights_themselves_are_refused():
    with pytest.raises(ValueError, match=r"attn\.qkv is not called: ShiftedWindowAttention\.forward\(\)"):
        selected_modules(on_meta(torchvision.models.swin_t))


BUILDS = {
    "torchvision": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4),
    "timm": lambda: timm.create_model("test_resnet", num_classes=4),
    "timm's convnext": lambda: timm.create_model("test_convnext", num_classes=4),
    "timm's vit": lambda: timm.create_model("test_vit", num_classes=4, img_size=32),
}


@pytest.mark.parametrize("name", BUILDS)
def test_training_packing_and_loading(name, tmp_path):
    torch.manual_seed(0)
    model = binarize(BUILDS[name](), ReBNNConfig(activation="elastic"))
    calibrate(model, X)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    handle = rebnn_hf.attach(optimizer, model.train())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor([0, 3])).backward()
        optimizer.step()
    assert sum(layer["flip_ratio"] for layer in handle.statistics().values()) > 0
    with torch.no_grad():
        expected = model.eval()(X)
        with use_backend("reference"):
            assert torch.equal(pack(model)(X), expected)
        fast = model(X)
        torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / "model.safetensors")
        loaded = load_model(BUILDS[name]().eval(), tmp_path / "model.safetensors")
        # In memory of its own: tensors of a mapped file lie anywhere, and where they lie float convolutions round.
        assert torch.equal(copy.deepcopy(loaded)(X), fast)
    assert sum(isinstance(module, PACKED_TYPES) for module in loaded.modules()) == len(handle.layers) > 0
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_network_that_was_built_of_one_bit_layers(tmp_path):
    def build():
        return timm.create_model("rebnn_resnet18", num_classes=4, stem="cifar").eval()

    model = build()
    with torch.no_grad():
        expected = model(X)
        with pytest.raises(ValueError, match=r"1-bit layers but no config: .*call binarize\(\) on a network that was"):
            pack(model)
        assert binarize(model).quantization_config.activation == "rsign"
        pack(model)
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / "model.safetensors")
        loaded = load_model(build(), tmp_path / "model.safetensors")
        assert torch.equal(loaded(X), model(X))
    assert rebnn_hf.summary(loaded).totals["ratio"] > 15
