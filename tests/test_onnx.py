"""Packed models as ONNX files: what ONNX Runtime makes of them, what is in them, and what their operators mean."""

import shutil

import pytest
import torch
import transformers as hf

import rebnn_hf
from rebnn_hf import ReBNNConfig, fusion
from rebnn_hf.inputs import random_inputs
from rebnn_hf.layers import PACKED_TYPES
from rebnn_hf.packing import pack_signs, packed_width, unpack_signs
from rebnn_hf.report import packed_size

onnx = pytest.importorskip("onnx", reason="ONNX files need onnx: pip install 'rebnn_hf[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime, which is not installed")
pytest.importorskip("onnxscript", reason="torch writes ONNX files with onnxscript, which is not installed")

POSITIONS = 40
SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=52,  # rows with spare bits
    max_position_embeddings=POSITIONS,
    initializer_range=0.2,
)
TOLERANCE = 1e-5  # of logits around 1: some twenty roundings of float32


def bert(preset, **choices):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES)).eval()
    return packed(model, preset, padded(model, 3, 11), **choices)


def packed(model, preset, batch, **choices):
    rebnn_hf.binarize(model, ReBNNConfig.preset(preset, **choices))
    rebnn_hf.calibrate(model, batch)
    return rebnn_hf.pack(model)


def padded(model, batch, length):
    inputs = random_inputs(model, batch, length)
    inputs["attention_mask"][-1, (length + 1) // 2 :] = 0
    return inputs


def run(file, inputs):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def assert_same_logits(file, model, *batches, tolerance=TOLERANCE):
    for batch in batches:
        with torch.no_grad():
            expected = model(**batch).logits
        assert expected.std() > 0.1 or len(expected) == 1
        torch.testing.assert_close(run(file, batch), expected, rtol=tolerance, atol=tolerance)


PRESETS = {
    "rebnn-w1a32": {"word_embeddings": True, "pooler": True, "head": True},
    "rebnn-bit-w1a1": {"word_embeddings": True},
    "rebnn-bibert-w1a1": {},
}
CODE_BITS = {"rebnn-w1a32": 32, "rebnn-bit-w1a1": 1, "rebnn-bibert-w1a1": 1}


@pytest.fixture(scope="module", params=PRESETS)
def exported(request, tmp_path_factory):
    model = bert(request.param, **PRESETS[request.param])
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with torch.no_grad():
        batch = padded(model, 2, 7)
        before = model(**batch).logits
        rebnn_hf.export_onnx(model, file)
        assert torch.equal(model(**batch).logits, before), "the model stays as it is"
    return request.param, model, file


def test_onnx_runtime_gives_the_same_logits_for_any_batch_and_length(exported):
    _, model, file = exported
    assert_same_logits(file, model, padded(model, 3, 11), padded(model, 1, 1), padded(model, 5, POSITIONS))


def test_the_file_holds_bits_and_little_else(exported):
    _, model, file = exported
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PACKED_TYPES)}
    for name, layer in layers.items():
        bits = tensors[f"{name}.weight"]
        assert bits.dtype == "uint8" and torch.equal(torch.from_numpy(bits.copy()), layer.weight), name
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored <= packed_size(model)["total"] + 2 * 8 * POSITIONS + 1000  # position numbers, shapes
    assert file.stat().st_size <= stored + 40_000  # the graph of one layer
    assert b"stack_trace" not in file.read_bytes() and b"site-packages" not in file.read_bytes()


def test_the_operators_are_those_that_are_documented(exported):
    preset, model, file = exported
    model_file = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in model_file.opset_import if entry.domain] == [("rebnn", 1)]
    products = [node for node in model_file.graph.node if node.op_type == "BinaryMatMul"]
    found = [{a.name: a.i for a in node.attribute} | {"bits": node.input[1]} for node in products]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, rebnn_hf.PackedLinear)}
    assert found == [
        {"width": layer.in_features, "code_bits": CODE_BITS[preset], "bits": f"{name}.weight"}
        for name, layer in linears.items()
    ]


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 20, 64, 65])
def test_definitions_mean_what_the_format_says(exported, width):
    """By onnx's own interpreter of standard operators."""
    functions = onnx.load(exported[2]).functions
    signs = torch.randn(5, width)
    signs[0, 0], signs[1, 0] = 1, -1
    codes = torch.randint(-3, 4, (2, 3, width)).float()
    evaluators = {f.name: onnx.reference.ReferenceEvaluator(f, functions=list(functions)[:1]) for f in functions}
    bits = pack_signs(signs).numpy()
    (found,) = evaluators["UnpackSigns"].run(None, {"bits": bits}, attributes={"width": width})
    assert torch.equal(torch.from_numpy(found.copy()), unpack_signs(torch.from_numpy(bits), width))
    inputs = {"codes": codes.numpy(), "bits": bits}
    (product,) = evaluators["BinaryMatMul"].run(None, inputs, attributes={"width": width, "code_bits": 32})
    assert torch.equal(torch.from_numpy(product.copy()), codes @ torch.where(signs >= 0, 1.0, -1.0).t())
    assert bits.shape == (5, packed_width(width))


def test_a_loaded_checkpoint_with_the_inputs_of_its_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"])
    )
    tokenizer = hf.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    bert("rebnn-bit-w1a1").save_pretrained(tmp_path / "packed")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert fusion.is_fused(model) or not rebnn_hf.kernels.cpu.available()
    example = tokenizer(["good film", "bad"], padding=True, return_tensors="pt")
    rebnn_hf.export_onnx(model, tmp_path / "model.onnx", example)
    names = [entry.name for entry in onnx.load(tmp_path / "model.onnx").graph.input]
    assert names == list(example) == ["input_ids", "token_type_ids", "attention_mask"]
    other = tokenizer(
        ["bad bad film", "good", "film"], ["good good", "bad", "bad film"], padding=True, return_tensors="pt"
    )
    assert_same_logits(tmp_path / "model.onnx", model, dict(other))


def test_half_precision(tmp_path):
    model = rebnn_hf.pack(bert("rebnn-w1a32", word_embeddings=True), torch.float16)
    rebnn_hf.export_onnx(model, tmp_path / "model.onnx")
    assert_same_logits(tmp_path / "model.onnx", model, padded(model, 3, 11), tolerance=0.02)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    sizes = dict(embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", num_labels=3)
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).eval()
    images = {"pixel_values": torch.randn(3, 3, 24, 24)}
    packed(model, "rebnn-w1a32", images, activation="elastic", activation_bits=4)
    rebnn_hf.export_onnx(model, tmp_path / "model.onnx", images)
    assert_same_logits(tmp_path / "model.onnx", model, images, {"pixel_values": torch.randn(5, 3, 24, 24)})


def test_images_need_no_example(tmp_path):
    """Without one it is of the size that the config says."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=(8, 12))
    model = hf.ViTForImageClassification(hf.ViTConfig(patch_size=(4, 4), **sizes)).eval()
    torch.nn.init.normal_(model.classifier.weight)  # transformers starts it at 0
    images = {"pixel_values": torch.randn(3, 3, 8, 12)}
    packed(model, "rebnn-elastic-w1a1", images)
    rebnn_hf.export_onnx(model, tmp_path / "model.onnx")
    assert_same_logits(tmp_path / "model.onnx", model, images)


def test_unpacked_models_need_nothing_of_it(tmp_path):
    model = rebnn_hf.unpack(bert("rebnn-w1a32", word_embeddings=True))
    example = padded(model, 2, 7)
    free = {name: {0: "batch", 1: "length"} for name in example}
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        kwargs=example,
        f=file,
        input_names=list(example),
        output_names=["logits"],
        dynamic_shapes=free,
        dynamo=True,
    )
    assert_same_logits(file, model, padded(model, 3, 11))


# What cannot be exported


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"kept")
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES))
    with pytest.raises(TypeError, match="expects a transformers PreTrainedModel, got Linear"):
        rebnn_hf.export_onnx(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match=r"got a float one; export it with torch\.onnx\.export"):
        rebnn_hf.export_onnx(model, file)
    with pytest.raises(ValueError, match=r"got a latent one; call rebnn_hf\.pack\(model\) first"):
        rebnn_hf.export_onnx(rebnn_hf.binarize(model), file)
    rebnn_hf.pack(model)
    with pytest.raises(ValueError, match=r"too small .*'input_ids': \(1, 4\)"):
        rebnn_hf.export_onnx(model, file, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        rebnn_hf.export_onnx(model, tmp_path / "nowhere" / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"] and file.read_bytes() == b"kept"
    shutil.rmtree(tmp_path)
