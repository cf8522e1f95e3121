"""Networks that are no transformers models: which layers become 1-bit, training, packing, files of their own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import rebnn_hf
from rebnn_hf import (
    ReBNNConfig,
    ReBNNTrainer,
    ReBNNTrainingArguments,
    binarize,
    calibrate,
    load_model,
    pack,
    save_model,
)
from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES, BinaryLinear
from rebnn_hf.saving import CONFIG_KEY


class Block(nn.Module):
    """A residual block; nothing in its names says which convolution is the shortcut."""

    def __init__(self, chs, out_chs, stride):
        super().__init__()
        self.first = nn.Conv2d(chs, out_chs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)
        self.depthwise = nn.Conv2d(out_chs, out_chs, 3, padding=1, groups=out_chs)
        self.second = nn.Conv2d(out_chs, out_chs, 3, padding=1)
        self.around = nn.Conv2d(chs, out_chs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.second(self.depthwise(y)) + self.around(x))


class Network(nn.Module):
    """Stem, blocks, linear layers behind them."""

    def __init__(self, width=9):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv10 = nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 20, 2))
        self.hidden = nn.Linear(20, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = self.blocks(torch.relu(self.conv10(torch.relu(self.conv1(x)))))
        return self.out(torch.relu(self.hidden(x.mean((2, 3)))))


INNER = ["conv10", "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second"]
"""By hand: neither the first convolution, nor depthwise ones, nor 1x1 with stride 2, nor linear layers at the end."""

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build(width=9):
    torch.manual_seed(0)
    return Network(width).eval()


def latent(**settings):
    model = binarize(build(), ReBNNConfig(**settings))
    calibrate(model, X)
    return model


def logits(model):
    with torch.no_grad():
        return model(X)


def snapshot(model):
    return {name: type(module) for name, module in model.named_modules()}, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    types, tensors = snapshot(model)
    assert types == before[0] and tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)


# ------------------------------------------------------------------------------------------------------ which layers


def test_which_layers():
    model = build()
    assert rebnn_hf.selected_modules(model) == INNER
    assert binarize(model) is model
    assert [name for name, module in model.named_modules() if isinstance(module, LATENT_TYPES)] == INNER
    config = model.quantization_config
    assert config.converted == INNER and config.converted_head == [] and config.state == "latent"
    assert set(config.not_converted) == {
        *("conv1", "blocks.0.depthwise", "blocks.1.depthwise", "blocks.1.around", "hidden", "out")
    }


def test_the_head_is_a_switch_and_names_can_be_left_out():
    config = ReBNNConfig(head=True, modules_to_not_convert=["out", "blocks.1"])
    assert rebnn_hf.selected_modules(build(), config) == ["hidden", "conv10", "blocks.0.first", "blocks.0.second"]


def test_of_one_sequence_only_the_first_convolution_is_the_stem():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert rebnn_hf.selected_modules(model) == ["2", "4"]
    deep = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    assert rebnn_hf.selected_modules(deep) == ["1"]


def test_convolutions_for_classes_stay_float():
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(4, 4, 1)))
    model.add_module("classifier", nn.Sequential(nn.Dropout(), nn.Conv2d(4, 10, 1)))
    assert rebnn_hf.selected_modules(model) == ["features.2.first", "features.2.second"]
    model.add_module("heads", nn.ModuleList(nn.Linear(4, 2) for _ in range(3)))
    assert rebnn_hf.selected_modules(model) == ["features.2.first", "features.2.second"]


def test_the_summary_says_why_convolutions_are_float():
    rows = {row.name: row for row in rebnn_hf.summary(pack(latent())).rows}
    assert rows["blocks.1.first"].note == "packed" and rows["blocks.1.first"].bytes_packed == 20 * 11 + 20 * 4
    notes = {name: rows[name].note for name in ("conv1", "blocks.1.around", "blocks.0.depthwise", "hidden")}
    assert notes == {
        "conv1": "float: stem",
        "blocks.1.around": "float: shortcut or downsampling",
        "blocks.0.depthwise": "float: convolution with groups",
        "hidden": "float: head (head=False)",
    }
    kept = binarize(build(), ReBNNConfig(modules_to_not_convert=["conv10"]))
    notes = {row.name: row.note for row in rebnn_hf.summary(kept).rows}
    assert notes["conv10"] == "float: listed in modules_to_not_convert"


def test_operations_of_a_plain_network():
    """By hand, 16 x 16: one-bit products count a 64th."""
    result = rebnn_hf.operations(latent(activation="elastic"), image_size=16)
    shape = {(row.part, row.bits): row.macs for row in result.rows}
    assert shape == {
        ("convolutions of the blocks", (1, 1)): 3 * 81 * 9 * 256 + (81 * 20 + 180 * 20) * 64,
        ("stem and other convolutions", (32, 32)): 27 * 9 * 256 + 9 * 9 * 256 + (9 * 20 + 9 * 20) * 64,
        ("linear layers", (32, 32)): 20 * 12 + 12 * 4,
    }


# ----------------------------------------------------------------------------- training, packing, and the way back


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), torch.tensor([0, 3])).backward()
    optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"activation": "elastic"}, {"activation": "elastic", "activation_bits": 4}])
def test_from_float_to_the_loaded_packed_network(settings, tmp_path):
    model = latent(**settings).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    handle = rebnn_hf.attach(optimizer, model)
    assert handle.layers == INNER
    for _ in range(3):
        step(model, optimizer)
    assert all(layer["flip_ratio"] > 0 for layer in handle.statistics().values())
    expected = logits(model.eval())
    assert pack(model) is model and model.quantization_config.state == "packed"
    with use_backend("reference"):
        assert torch.equal(logits(model), expected)
    fast = logits(model)
    torch.testing.assert_close(fast, expected)

    save_model(model, tmp_path / "run" / "model.safetensors")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.safetensors"]
    loaded = load_model(build(), tmp_path / "run" / "model.safetensors")
    assert torch.equal(logits(loaded), fast)
    with use_backend("reference"):
        assert torch.equal(logits(loaded), expected)
    assert [name for name, module in loaded.named_modules() if isinstance(module, PackedConv2d)] == INNER
    assert loaded.quantization_config.to_dict() == model.quantization_config.to_dict()
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == rebnn_hf.packed_size(model)["total"]  # noqa: SIM118
    assert size < 0.6 * sum(tensor.nbytes for tensor in build().state_dict().values())


def test_a_latent_file_goes_on_training(tmp_path):
    """The step after loading is the one that would have been taken: weights, scales and balance are there."""
    model = latent(activation="elastic").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    handle = rebnn_hf.attach(optimizer, model)
    for _ in range(3):
        step(model, optimizer)
    assert max(module.balance.max() for module in handle.modules.values()) > 0
    save_model(model, tmp_path / "latent.safetensors")
    loaded = load_model(build().train(), tmp_path / "latent.safetensors")
    assert isinstance(loaded.conv10, BinaryConv2d) and loaded.training
    other = torch.optim.SGD(loaded.parameters(), lr=5.0)
    assert rebnn_hf.attach(other, loaded).rule == handle.rule
    step(model, optimizer)
    step(loaded, other)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_the_rule_of_the_config_is_attached():
    model = binarize(build(), ReBNNConfig(balance_rule="const", balance_value=1e-3))
    wrapped = nn.Sequential(model)
    assert rebnn_hf.attach(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped).rule.value == 1e-3


def test_a_skeleton_without_values_is_filled(tmp_path):
    model = pack(latent(activation="elastic"))
    save_model(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = Network().eval()
    loaded = load_model(skeleton, tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model))


def test_smaller_floats_come_back_as_such(tmp_path):
    model = pack(latent(), dtype=torch.bfloat16)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(build(), tmp_path / "model.safetensors")
    assert loaded.conv1.weight.dtype == loaded.conv10.weight_scale.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))


def test_a_network_in_channels_last(tmp_path):
    model = pack(binarize(build().to(memory_format=torch.channels_last)))
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(build(), tmp_path / "model.safetensors")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_state_dicts_fit_a_network_that_went_the_same_way():
    """Without our file: torch's own `load_state_dict`, strict."""
    for make in (latent, lambda: pack(latent())):
        model, other = make(), make()
        with torch.no_grad():
            for module in other.modules():
                if isinstance(module, LATENT_TYPES + PACKED_TYPES):
                    module.weight_scale.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), logits(model))


def test_unpack_gives_a_plain_network():
    model = pack(latent(head=True))
    expected = logits(model)
    assert rebnn_hf.unpack(model) is model
    torch.testing.assert_close(logits(model), expected)
    assert not any(type(module).__module__.startswith("rebnn_hf") for module in model.modules())
    assert not hasattr(model, "quantization_config") and rebnn_hf.unpack(model) is model
    assert snapshot(model)[0] == snapshot(build())[0]


def test_the_next_stage_of_a_network():
    model = latent(activation="elastic", activation_bits=2)
    rebnn_hf.rebinarize(model, ReBNNConfig(activation="elastic"))
    assert model.conv10.input_binarizer.bits == 1 and model.quantization_config.activation_bits == 1
    calibrate(model, X)
    assert logits(model).isfinite().all()


def test_settings_cannot_be_changed_afterwards():
    model = latent()
    assert binarize(model, ReBNNConfig()) is model
    with pytest.raises(ValueError, match=r"already binarized with other settings \(activation"):
        binarize(model, ReBNNConfig(activation="elastic"))
    with pytest.raises(ValueError, match="the model is packed"):
        binarize(pack(model))


# ------------------------------------------------------------------------------------------------------ the Trainer


class Classifier(nn.Module):
    """A network in the form that transformers' Trainer knows."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels, labels=None):
        logits = self.network(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


IMAGES = [
    {"pixels": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), "labels": i % 4} for i in range(16)
]


def trainer_for(folder, **arguments):
    options = {"learning_rate": 0.02, "num_train_epochs": 3, "per_device_train_batch_size": 4, "hidden_weight": 0.0}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "plot_oscillation": False, **arguments}
    model = binarize(Classifier(build()), ReBNNConfig(activation="elastic"))
    args = ReBNNTrainingArguments(str(folder), save_strategy="steps", save_steps=3, logging_steps=1, **options)
    return ReBNNTrainer(model=model, teacher=Classifier(build()), args=args, train_dataset=IMAGES)


def test_a_network_in_the_trainer_continues_to_the_same_weights(tmp_path):
    trainer = trainer_for(tmp_path / "a")
    trainer.train()
    assert trainer.resilience.layers == [f"network.{name}" for name in INNER]
    assert trainer.state.log_history[1]["loss_logits"] > 0
    again = trainer_for(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    expected = trainer.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    packed = pack(again.model.eval())
    save_model(packed, tmp_path / "model.safetensors")
    loaded = load_model(Classifier(build()).eval(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(X)["logits"], packed(X)["logits"])


def test_hidden_states_and_names_of_teachers_are_for_transformers_models(tmp_path):
    with pytest.raises(ValueError, match=r"Classifier\.forward\(\) does not take output_hidden_states; use hid"):
        trainer_for(tmp_path, hidden_weight=1.0)
    args = ReBNNTrainingArguments(str(tmp_path), hidden_weight=0.0, report_to="none")
    with pytest.raises(ValueError, match="only transformers models are loaded by"):
        ReBNNTrainer(model=binarize(Classifier(build())), teacher="some/name", args=args)


# -------------------------------------------------------------------------------------------------------- mistakes


def bert():
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
    )


class Around(nn.Module):
    """What other libraries put around a transformers model."""

    def __init__(self):
        super().__init__()
        self.model = bert()


WRAPPERS = {
    "DataParallel": lambda: nn.DataParallel(build()),
    "OptimizedModule": lambda: torch.compile(build()),
    "Around": Around,
    "BertEncoder": lambda: bert().bert.encoder,
    "str": lambda: "model",
}


@pytest.mark.parametrize("verb", [binarize, pack, rebnn_hf.unpack])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_and_parts_are_refused(verb, kind):
    with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) expects .*got {kind}; pass the model inside"):
        verb(WRAPPERS[kind]())


def test_a_layer_that_is_not_called_is_refused():
    """torch's encoder layer multiplies the weights of its linear layers by itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    before = snapshot(model)
    settings = {"modules_to_not_convert": ["self_attn"]}
    with pytest.raises(ValueError, match=r"layers\.0\.linear1 is not called: TransformerEncoderLayer\.forward\(\)"):
        binarize(model, ReBNNConfig(**settings))
    assert_untouched(model, before)


def test_nothing_to_binarize():
    with pytest.raises(ValueError, match=r"nothing to binarize in Sequential: of its 1 linear layers and convolutions"):
        binarize(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attention": "bool", "activation": "sign"}, "'Network' is not among bert"),
        ({"word_embeddings": True}, "word_embeddings=True needs a transformers model"),
        ({"activation": "sign"}, "never negative"),
        ({"activation": "token"}, "scale for each position"),
    ],
)
def test_settings_for_other_models_are_refused(settings, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        binarize(model, ReBNNConfig(**settings))
    assert_untouched(model, before)


def test_one_weight_under_two_names():
    model = build()
    model.blocks[1].second = model.blocks[1].first
    with pytest.raises(ValueError, match=r"blocks\.1\.first\.weight is shared with blocks\.1\.second\.weight"):
        binarize(model)
    model = binarize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ModuleDict()))
    model[2]["again"] = model[0]
    with pytest.raises(ValueError, match=r"2\.again\.weight and 0\.weight are one tensor"):
        save_model(model, "never.safetensors")


@pytest.mark.parametrize("verb", [pack, rebnn_hf.unpack])
def test_the_module_that_was_binarized_is_wanted(verb):
    whole = Classifier(latent())
    with pytest.raises(ValueError, match="this Classifier has 1-bit layers but no config: pass the module"):
        verb(whole)
    assert pack(whole.network).quantization_config.state == "packed"


def test_what_has_no_config_is_not_saved(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="got a float one"):
        save_model(build(), file)
    with pytest.raises(TypeError, match=r"a transformers model has model\.save_pretrained\(folder\)"):
        save_model(bert(), file)
    with pytest.raises(TypeError, match="from_pretrained"):
        load_model(bert(), file)
    assert not list(tmp_path.iterdir())


def damaged(tensors, metadata, change):
    """A file's content after a change of hers."""
    config = json.loads(metadata[CONFIG_KEY])
    change(tensors, config)
    return tensors, {"format": "pt", CONFIG_KEY: json.dumps(config)}


def spare_bits(tensors, config):
    tensors["conv10.weight"][0, -1] |= 128


def without(name):
    return lambda tensors, config: tensors.pop(name)


def replaced(name, value):
    return lambda tensors, config: tensors.update({name: value(tensors[name])})


CHANGES = {
    "missing": (without("conv10.weight_scale"), r"1 tensors are missing \(conv10\.weight_scale\)"),
    "unexpected": (lambda t, c: t.update(other=torch.zeros(1)), r"1 are unexpected \(other\)"),
    "shape": (replaced("conv1.bias", lambda t: t[:-1].clone()), r"conv1\.bias is \(8,\) in the file and \(9,\)"),
    "bits as floats": (replaced("conv10.weight", torch.Tensor.float), r"conv10\.weight is torch\.float32 in the file"),
    "floats as integers": (replaced("out.bias", torch.Tensor.int), r"out\.bias is torch\.int32 in the file"),
    "spare bits": (spare_bits, r"conv10\.weight has spare bits set"),
    "negative scale": (replaced("conv10.weight_scale", torch.neg), r"conv10\.weight_scale must be >= 0"),
    "NaN": (replaced("conv10.weight_scale", lambda t: t * torch.nan), r"conv10\.weight_scale holds NaN or infinity"),
    "no scale of an activation": (
        replaced("conv10.input_binarizer.scale", torch.zeros_like),
        r"conv10\.input_binarizer\.scale is 0",
    ),
    "another module": (lambda t, c: c.update(converted=["conv11"]), "calls 'conv11' a 1-bit module"),
    "none": (lambda t, c: c.update(converted=[]), "names no converted module"),
    "of the wrong type": (lambda t, c: c.update(converted=["blocks.0.norm"]), "is a BatchNorm2d"),
    "attention": (lambda t, c: c.update(attention="elastic"), "'Network' is not among"),
    "unknown field": (lambda t, c: c.update(surprise=1), "unknown fields in the rebnn config: surprise"),
    "newer": (lambda t, c: c.update(format_version=99), "format_version=99 cannot be read"),
}


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_model(pack(latent(activation="elastic")), file)
    return file


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_files_are_refused_and_leave_the_network_as_it_was(change, packed_file, tmp_path):
    with safe_open(packed_file, "pt") as file:
        metadata = file.metadata()
    apply, message = CHANGES[change]
    tensors, metadata = damaged(load_file(packed_file), metadata, apply)
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_model(model, tmp_path / "damaged.safetensors")
    assert_untouched(model, before)
    assert not hasattr(model, "quantization_config")


def test_other_networks_and_other_files_are_refused(packed_file, tmp_path):
    with pytest.raises(ValueError, match=r"is \(9,.*\) in the file and \(10,.*\) in this Network"):
        load_model(build(10), packed_file)
    with pytest.raises(ValueError, match="expects the float module, built anew"):
        load_model(latent(), packed_file)
    with pytest.raises(FileNotFoundError):
        load_model(build(), tmp_path / "nothing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(packed_file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no whole safetensors file"):
        load_model(build(), tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no rebnn_config in its header: rebnn_hf\.save_model\(\) did not"):
        load_model(build(), tmp_path / "other.safetensors")
    for text, message in (("{", "is not JSON"), ("[1]", "is a list, not an object")):
        save_file({"a": torch.zeros(1)}, tmp_path / "bad.safetensors", {CONFIG_KEY: text})
        with pytest.raises(ValueError, match=message):
            load_model(build(), tmp_path / "bad.safetensors")


def test_buffers_that_no_file_has_need_values(tmp_path):
    class WithTable(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(4), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.table

    model = pack(binarize(WithTable().eval()))
    save_model(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(WithTable().eval(), tmp_path / "model.safetensors")), logits(model))
    with torch.device("meta"):
        skeleton = WithTable()
    with pytest.raises(ValueError, match="table is on the meta device and in no file: it is computed when WithTable"):
        load_model(skeleton, tmp_path / "model.safetensors")


def test_linear_layers_in_blocks():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return x + torch.relu(self.inner(x))

    model = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.Flatten(2), nn.Sequential(Mixer(), Mixer()), nn.Linear(12, 2))
    assert rebnn_hf.selected_modules(model) == ["2.0.inner", "2.1.inner"]
    assert isinstance(binarize(model)[2][1].inner, BinaryLinear)
