"""What packed models are measured against, and where their layers are computed."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import rebnn_hf
from rebnn_hf import ReBNNConfig, benchmark, fusion, kernels
from rebnn_hf.inputs import random_inputs
from rebnn_hf.layers import PackedLinear
from rebnn_hf.loading import check_twins

needs_engine = pytest.mark.skipif(not kernels.cpu.available(), reason=kernels.cpu.why_not())
CONFIG = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
BLOCK = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BLOCK += ("intermediate.dense", "output.dense")
INSIDE = {f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in BLOCK}


def float_model():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**CONFIG)).eval()


def packed_model(preset="rebnn-bit-w1a1", **overrides):
    model = rebnn_hf.binarize(float_model(), ReBNNConfig.preset(preset, **overrides)).eval()
    rebnn_hf.calibrate(model, random_inputs(model, 2, 8))
    return rebnn_hf.pack(model)


def named(where, place):
    return {name for name, found in where.items() if found == place}


@needs_engine
def test_places_of_a_fused_model_and_of_the_same_layer_by_layer():
    model = packed_model(word_embeddings=True)
    inputs = random_inputs(model, 2, 8)
    where = benchmark.places(model, inputs)
    assert named(where, "fused") == INSIDE
    assert named(where, "engine") == {"bert.embeddings.word_embeddings"}
    assert named(where, "float") == {
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        "bert.pooler.dense",
        "classifier",
    }
    apart = benchmark.layered(model)
    where = benchmark.places(apart, inputs)
    assert named(where, "engine") == INSIDE | {"bert.embeddings.word_embeddings"} and not named(where, "fused")
    assert fusion.is_fused(model) and not fusion.is_fused(apart)


@needs_engine
def test_places_are_those_of_the_run_not_of_the_settings():
    model = packed_model()
    inputs = random_inputs(model, 2, 8)
    with kernels.use_backend("reference"):
        assert named(benchmark.places(model, inputs), "reference") == INSIDE
    model.bert.encoder.layer[1].output.dense.forward = lambda x: PackedLinear.reference(
        model.bert.encoder.layer[1].output.dense, x
    )
    apart = benchmark.places(benchmark.layered(model), inputs)
    assert named(apart, "reference") == {"bert.encoder.layer.1.output.dense"}
    assert named(apart, "engine") == INSIDE - {"bert.encoder.layer.1.output.dense"}


def test_description_counts_and_groups():
    where = {"layer.0.query": "fused", "layer.11.query": "fused", "head": "float", "layer.0.key2": "fused"}
    assert benchmark.describe(where).splitlines() == [
        "3 layer(s) in one call of the engine: layer.*.query, layer.*.key2",
        "1 layer(s) float: head",
    ]


def test_float_twin_has_the_shape_and_nothing_of_the_method():
    model = packed_model()
    twin = benchmark.float_twin(model)
    assert type(twin) is BertForSequenceClassification and not twin.training
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in float_model().named_parameters()}
    assert all(type(m) is nn.Linear for m in twin.modules() if isinstance(m, nn.Linear))
    assert twin.config._attn_implementation == "sdpa" and not hasattr(twin.config, "quantization_config")
    assert model.config.quantization_config.state == "packed"
    check_twins(model, twin)


def test_contenders_compute_what_the_float_model_computes(tmp_path):
    """Each in its precision: those that are measured are the same function."""
    model = float_model()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # logits that differ by more than rounding
    inputs = random_inputs(model, 2, 8)
    with torch.inference_mode():
        expected = model(**inputs).logits
        contenders = benchmark.FloatModels(model, tmp_path).contenders(inputs, 1)
        outputs = {c.name: c.call() for c in contenders}
    missing = benchmark.missing_for_onnx()
    assert list(outputs) == [n for n in benchmark.BASELINES if not (missing and n.startswith("ORT"))]
    spread = expected.std()
    for name, output in outputs.items():
        logits = torch.as_tensor(output[0]).float()
        tolerance = 1e-5 if name.endswith("fp32") else 0.3
        assert (logits - expected).abs().max() < tolerance * spread, name
        assert name.endswith("fp32") or not torch.equal(logits, expected), name


def image_model(name):
    torch.manual_seed(0)
    if name == "vit":
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=4)
        model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, initializer_range=0.2, **sizes))
        nn.init.normal_(model.classifier.weight)  # transformers starts it at 0
        return model.eval()
    sizes = dict(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(ResNetConfig(pretrained_cfg={"input_size": [3, 24, 24]}, **sizes)).eval()


@pytest.mark.parametrize("name, sides, int8", [("vit", [16], "torch int8"), ("resnet", [24, 40], None)])
def test_contenders_see_the_same_images(name, sides, int8, tmp_path):
    """One file serves all sizes. torch has int8 for linear layers only, so a convolutional network is not in it."""
    model = image_model(name)
    floats = benchmark.FloatModels(model, tmp_path)
    for side in sides:
        inputs = random_inputs(model, 3, side)
        with torch.inference_mode():
            expected = model(**inputs).logits
            outputs = {c.name: c.call() for c in floats.contenders(inputs, 1)}
        onnx = [] if benchmark.missing_for_onnx() else ["ORT fp32", "ORT int8"]
        assert list(outputs) == ["torch fp32", "torch bf16", *([int8] if int8 else []), *onnx]
        for contender, output in outputs.items():
            logits = torch.as_tensor(output[0]).float()
            tolerance = 1e-4 if contender.endswith("fp32") else 0.3
            assert (logits - expected).abs().max() < tolerance * expected.std(), contender
            assert contender.endswith("fp32") or not torch.equal(logits, expected), contender


def test_float_twin_of_a_model_that_is_built_of_1_bit_layers():
    pytest.importorskip("timm", reason="image backbones need timm: pip install 'rebnn_hf[vision]'")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    import rebnn_hf.vision

    config = TimmWrapperConfig(architecture="rebnn_resnet18", num_labels=4, model_args={"stem": "cifar"})
    model = rebnn_hf.pack(rebnn_hf.binarize(TimmWrapperForImageClassification(config)))
    twin = benchmark.float_twin(model)
    convolutions = [m for m in twin.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) >= 17
    assert all(type(m) is nn.Conv2d for m in convolutions)
    with torch.inference_mode():
        assert twin(**random_inputs(twin, 1, 32)).logits.isfinite().all()


def test_race_measures_all_on_the_same_inputs(tmp_path):
    model = packed_model()
    floats = benchmark.FloatModels(copy.deepcopy(benchmark.float_twin(model)), tmp_path)
    rows = benchmark.race({"packed": model}, floats, random_inputs(model, 2, 8), 1, 3)
    present = [n for n in benchmark.BASELINES if n in floats.models or n in floats.files]
    assert [row["contender"] for row in rows] == ["packed", *present]
    for row in rows:
        assert (row["batch x tokens"], row["threads"]) == ("2 x 8", 1)
        for other in rows[1:]:
            assert row[f"x {other['contender']}"] == pytest.approx(other["median ms"] / row["median ms"])
    with pytest.raises(ValueError, match="cannot be measured"):
        benchmark.race({}, floats, random_inputs(model, 2, 8), 1000, 3)
