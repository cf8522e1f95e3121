"""1-bit transformers inside sentence-transformers: packed, saved, loaded, encoding, and trained by its own Trainer."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset
from embedders import SENTENCES, SHAPE, WIDE, embedder, tokenizer
from operators import Recorded
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.kernels import cpu, use_backend

W1A32, W1A1 = "rebnn-w1a32", "rebnn-bit-w1a1"
needs_engine = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.fixture(scope="module")
def float_embedder(tmp_path_factory) -> SentenceTransformer:
    return embedder(tmp_path_factory.mktemp("float"))


def binarized(model: SentenceTransformer, preset: str) -> SentenceTransformer:
    model = copy.deepcopy(model)
    rebnn_hf.binarize(model[0].auto_model, ReBNNConfig.preset(preset))
    rebnn_hf.calibrate(model, {"input": model.preprocess(SENTENCES)})
    return model.eval()


@pytest.fixture(scope="module", params=[W1A32, W1A1])
def latent(request, float_embedder) -> SentenceTransformer:
    return binarized(float_embedder, request.param)


@pytest.fixture(scope="module")
def folder(latent, tmp_path_factory) -> str:
    """Where the packed model was saved."""
    model = copy.deepcopy(latent)
    rebnn_hf.pack(model[0].auto_model)
    folder = str(tmp_path_factory.mktemp("packed") / "model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fused(float_embedder) -> SentenceTransformer:
    model = binarized(float_embedder, W1A1)
    rebnn_hf.pack(model[0].auto_model)
    return model


# ------------------------------------------------------------------------------------------------- packing and loading


def test_packed_saved_and_loaded_embeddings_are_those_of_the_latent_model(latent, folder, float_embedder):
    loaded = SentenceTransformer(folder, device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    with use_backend("reference"):
        expected, found = latent.encode(SENTENCES), loaded.encode(SENTENCES)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    similarities = (expected * float_embedder.encode(SENTENCES)).sum(1)
    assert similarities.max() < 0.999, "these are not the embeddings of the float model"


def test_files_hold_the_bits_and_the_config(latent, folder, float_embedder, tmp_path):
    loaded = SentenceTransformer(folder, device="cpu")
    config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rebnn" and config["state"] == "packed" and len(config["converted"]) == 12
    method = latent[0].auto_model.config.quantization_config.method()
    assert loaded[0].auto_model.config.quantization_config.method() == method
    size = (tmp_path / folder / "model.safetensors").stat().st_size
    tensors = rebnn_hf.summary(loaded[0].auto_model).totals["bytes_packed"]
    assert tensors < size < tensors + 16_384  # the header of the file
    float_embedder.save_pretrained(str(tmp_path / "float"))
    assert size < (tmp_path / "float" / "model.safetensors").stat().st_size / 2.5


def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
    loaded = SentenceTransformer(folder, device="cpu")
    loaded.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert np.array_equal(again.encode(SENTENCES), loaded.encode(SENTENCES))


def test_without_the_package_nothing_is_loaded(fused, tmp_path):
    fused.save_pretrained(str(tmp_path))
    code = f"from sentence_transformers import SentenceTransformer; SentenceTransformer({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "a 1-bit checkpoint of the package rebnn_hf" in result.stderr, result.stderr


ARCHITECTURES = {
    "mpnet": lambda vocabulary: hf.MPNetModel(hf.MPNetConfig(vocab_size=vocabulary, **SHAPE, **WIDE)),
    "xlm-roberta": lambda vocabulary: hf.XLMRobertaModel(
        hf.XLMRobertaConfig(vocab_size=vocabulary, pad_token_id=0, **SHAPE, **WIDE)
    ),
    "distilbert": lambda vocabulary: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=vocabulary, dim=64, n_layers=2, n_heads=4, hidden_dim=128, **WIDE)
    ),
    "modernbert": lambda vocabulary: hf.ModernBertModel(
        hf.ModernBertConfig(vocab_size=vocabulary, pad_token_id=0, **SHAPE, **WIDE)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tmp_path):
    original = embedder(tmp_path / "transformer", ARCHITECTURES[name](len(tokenizer())), token_types=False)
    model = binarized(original, W1A32)
    expected = model.encode(SENTENCES)
    rebnn_hf.pack(model[0].auto_model)
    model.save_pretrained(str(tmp_path / "packed"))
    found = SentenceTransformer(str(tmp_path / "packed"), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - original.encode(SENTENCES)).max() > 1e-2


def test_unpacked_is_an_ordinary_embedder(float_embedder, tmp_path):
    model = binarized(float_embedder, W1A32)
    expected = model.encode(SENTENCES)
    rebnn_hf.unpack(rebnn_hf.pack(model[0].auto_model))
    model.save_pretrained(str(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(SENTENCES), expected, atol=1e-6)


def test_int8_inputs_are_saved(float_embedder, tmp_path):
    model = binarized(float_embedder, W1A32)
    rebnn_hf.pack(model[0].auto_model)
    before = model.encode(SENTENCES)
    rebnn_hf.use_int8_inputs(model[0].auto_model)
    model.save_pretrained(str(tmp_path))
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(SENTENCES)
    assert np.array_equal(found, model.encode(SENTENCES))
    assert 0 < np.abs(found - before).max() < 0.05


# ------------------------------------------------------------------------------------------------------------ encoding


def test_batches_do_not_matter(folder):
    """Padding is hidden from the tokens, also in the fused encoder."""
    model = SentenceTransformer(folder, device="cpu")
    expected = np.stack([model.encode(sentence) for sentence in SENTENCES])
    for batch_size in (1, 7, 64):
        np.testing.assert_allclose(model.encode(SENTENCES, batch_size=batch_size), expected, atol=1e-5)


def test_prompts_and_lengths(folder):
    model = SentenceTransformer(folder, device="cpu")
    asked = model.encode(["guitar in the park."], prompt_name="query")
    np.testing.assert_allclose(asked, model.encode(["a dog is looking for a guitar in the park."]), atol=1e-6)
    assert np.abs(asked - model.encode_document(["guitar in the park."])).max() > 1e-3
    plain = SentenceTransformer(modules=list(model)[:2], device="cpu")
    long, unit = plain.encode(SENTENCES), plain.encode(SENTENCES, normalize_embeddings=True)
    np.testing.assert_allclose(unit, long / np.linalg.norm(long, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)


@needs_engine
def test_the_encoder_is_one_call_of_the_engine(fused, tmp_path):
    fused.save_pretrained(str(tmp_path))
    for model in (fused, SentenceTransformer(str(tmp_path), device="cpu")):
        assert rebnn_hf.is_fused(model[0].auto_model)
        with Recorded() as calls:
            model.encode(SENTENCES, batch_size=24)
        assert calls.names == ["rebnn::encoder"] * 3, "64 sentences are 3 batches"


@needs_engine
def test_fused_embeddings_are_those_of_the_layers(fused):
    layered = copy.deepcopy(fused)
    rebnn_hf.fuse(layered[0].auto_model, False)
    with Recorded() as calls:
        expected = layered.encode(SENTENCES)
    assert "rebnn::encoder" not in calls.names
    np.testing.assert_allclose(fused.encode(SENTENCES), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ training


def distilled(model: SentenceTransformer, teacher: SentenceTransformer, folder, balanced: bool):
    """20 steps of sentence-transformers' own Trainer and loss."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=2e-3, weight_decay=0)
    resilience = rebnn_hf.attach(optimizer, model) if balanced else None
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        save_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"sentence": SENTENCES, "label": teacher.encode(SENTENCES)}),
        loss=MSELoss(model),
        optimizers=(optimizer, None),
    ).train()
    return model.eval(), resilience


def distance(model: SentenceTransformer, teacher: SentenceTransformer) -> float:
    return float(np.square(model.encode(SENTENCES) - teacher.encode(SENTENCES)).sum(1).mean())


@pytest.fixture(scope="module")
def trained(latent, float_embedder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return (*distilled(latent, float_embedder, folder, balanced=True), folder)


def test_its_own_trainer_distils(latent, float_embedder, trained):
    model, _, folder = trained
    assert distance(model, float_embedder) < 0.7 * distance(latent, float_embedder)
    checkpoint = SentenceTransformer(str(folder / "checkpoint-20"), device="cpu")
    assert np.array_equal(checkpoint.encode(SENTENCES), model.encode(SENTENCES))
    rebnn_hf.pack(checkpoint[0].auto_model)
    with use_backend("reference"):
        np.testing.assert_allclose(checkpoint.encode(SENTENCES), model.encode(SENTENCES), atol=1e-6)


def test_the_balance_rule_works_in_its_trainer(latent, float_embedder, trained, tmp_path):
    model, resilience, _ = trained
    statistics = resilience.statistics()
    assert len(statistics) == 12 and all(name.startswith("0.model.encoder.layer.") for name in statistics)
    assert all(layer["flip_ratio"] > 0 for layer in statistics.values())
    free, _ = distilled(latent, float_embedder, tmp_path, balanced=False)
    weights = [m[0].auto_model.encoder.layer[1].output.dense.weight for m in (model, free)]
    assert not torch.equal(*weights), "the reconstruction gradient was added in one of the two"


# ------------------------------------------------------------------------------------------------------------ mistakes

FUNCTIONS = (
    rebnn_hf.binarize,
    rebnn_hf.pack,
    rebnn_hf.unpack,
    rebnn_hf.selected_modules,
    rebnn_hf.operations,
    rebnn_hf.fuse,
    rebnn_hf.is_fused,
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_refusals_name_the_transformer_inside(function, float_embedder):
    message = rf"^{function.__name__}\(\) expects .* got SentenceTransformer; pass .*\(model\[0\]\.auto_model of a Sent"
    with pytest.raises(TypeError, match=message):
        function(float_embedder)
    assert type(float_embedder[0].auto_model.encoder.layer[0].output.dense) is torch.nn.Linear


def test_the_summary_is_of_the_whole_model(fused):
    whole, inside = rebnn_hf.summary(fused), rebnn_hf.summary(fused[0].auto_model)
    assert whole.totals["parameters"] - inside.totals["parameters"] == 64 * 24 + 24, "the dense layer"
    assert whole.totals["binary_parameters"] == inside.totals["binary_parameters"] > 0
