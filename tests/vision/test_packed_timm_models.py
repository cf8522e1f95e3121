"""timm models in the wrapper of transformers: built of 1-bit layers, or float ones that `binarize` changes."""

import copy

import equations
import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed (pip install 'rebnn_hf[vision]')")
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import rebnn_hf.vision  # noqa: F401
from rebnn_hf import (
    ReBNNConfig,
    ReBNNTrainer,
    ReBNNTrainingArguments,
    binarize,
    calibrate,
    export_onnx,
    pack,
    rebinarize,
    summary,
    use_int8_inputs,
)
from rebnn_hf.convolutions import BinaryConv2d, PackedConv2d
from rebnn_hf.kernels import cpu, use_backend
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


@pytest.mark.parametrize(
    "name, classifier", [("test_resnet", "fc"), ("test_vit", "head"), ("test_convnext", "head.fc")]
)
def test_the_head_of_a_timm_model_is_its_classifier(name, classifier, tmp_path):
    model, classifier = wrapped(name), f"timm_model.{classifier}"
    size = model.config.pretrained_cfg["input_size"][-1] if hasattr(model.config, "pretrained_cfg") else 160
    float_head = {row.name: row.note for row in summary(binarize(copy.deepcopy(model))).rows}
    assert float_head[classifier] == "float: head (head=False)"
    binarize(model, ReBNNConfig(head=True))
    assert model.config.quantization_config.converted_head == [classifier]
    expected = logits(model, size)
    pack(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded.get_submodule(classifier), PackedLinear)
    with use_backend("reference"):
        torch.testing.assert_close(logits(loaded, size), expected)
    headless, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith(classifier) for key in info["unexpected_keys"])
    assert len(headless.config.quantization_config.converted) > 0


def test_notes_say_why_a_layer_of_a_built_in_model_is_float():
    notes = {row.name: row.note for row in summary(binarize(wrapped("rebnn_resnet18"))).rows}
    assert notes["timm_model.stem.conv"] == "float: stem"
    assert notes["timm_model.stages.1.0.shortcut.1"] == "float: shortcut or downsampling"
    assert notes["timm_model.head.fc"] == "float: head (head=False)"


def test_dynamic_int8_inputs_are_not_for_convolutions():
    model = pack(binarize(wrapped("test_resnet")))
    before = logits(model)
    with pytest.raises(ValueError, match=r"1-bit convolutions \(first: timm_model"):
        use_int8_inputs(model)
    assert model.config.quantization_config.activation == "none" and torch.equal(logits(model), before)


@pytest.mark.parametrize("student, teacher", [("rebnn_resnet18", "resnet18"), ("test_vit", "test_vit")])
def test_the_trainers_defaults_distil_feature_maps(student, teacher, tmp_path):
    student, teacher = binarize(wrapped(student)), wrapped(teacher)
    size = 160 if teacher.config.architecture == "test_vit" else 32
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = [
            copy.deepcopy(model)(pixels, output_hidden_states=True).hidden_states
            for model in (student.train(), teacher)
        ]
    assert states[0][0].ndim == 4 and len(states[0]) == len(states[1])
    expected = sum((s - t).square().sum() / t.square().sum() for s, t in zip(*states, strict=True)).item()
    arguments = ReBNNTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        plot_oscillation=False,
    )
    data = [{"pixel_values": image, "labels": 0} for image in pixels]
    trainer = ReBNNTrainer(model=student, teacher=teacher, args=arguments, train_dataset=data)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss_hidden"] == pytest.approx(expected, rel=1e-3)


# Outside of eager torch


@pytest.fixture(scope="module")
def packed():
    """With statistics and slopes that show every term of a unit."""
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="rebnn_resnet18", num_labels=4, model_args={"stem": "cifar"})
    return pack(binarize(equations.randomize(TimmWrapperForImageClassification(config))))


def batch(count, size):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def test_onnx_gives_the_same_logits(packed, tmp_path):
    onnx = pytest.importorskip("onnx", reason="ONNX files need onnx: pip install 'rebnn_hf[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime")
    pytest.importorskip("onnxscript", reason="torch writes ONNX files with onnxscript")
    expected = packed(batch(3, 32)).logits
    export_onnx(packed, tmp_path / "model.onnx", {"pixel_values": batch(2, 32)})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"pixel_values": batch(3, 32).numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(packed(batch(3, 32)).logits, expected), "the model stays as it is"
    bits = [list(module.weight.shape) for module in packed.modules() if isinstance(module, PackedConv2d)]
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    stored = [list(tensor.dims) for tensor in tensors if tensor.data_type == onnx.TensorProto.UINT8]
    assert sorted(stored) == sorted(bits) and len(bits) == 16


@torch.no_grad()
@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
def test_compiled_without_a_break_it_gives_the_same_logits(packed):
    expected = packed(batch(2, 32)).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(copy.copy(packed), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(batch(2, 32)).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1 and graphs[0].count("ops.rebnn.conv2d") == 16


@torch.no_grad()
@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
def test_exported_saved_and_loaded_it_gives_the_same_logits(packed, tmp_path):
    expected = packed(batch(3, 32)).logits
    sizes = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(packed, (), {"pixel_values": batch(2, 32)}, dynamic_shapes=sizes)
    assert program.graph_module.code.count("ops.rebnn.conv2d") == 16
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(pixel_values=batch(3, 32)).logits, expected, rtol=1e-4, atol=1e-4)


def test_scales_of_a_fresh_model_fit_its_weights():
    """transformers draws the weights of convolutions anew, but not of those that have scales."""
    config = TimmWrapperConfig(architecture="rebnn_resnet18", num_labels=4, model_args={"stem": "cifar"})
    model = TimmWrapperForImageClassification(config)
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    assert len(layers) == 16
    for layer in layers:
        torch.testing.assert_close(layer.weight_scale, layer.weight.abs().mean((1, 2, 3)))
