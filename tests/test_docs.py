"""The code of the documentation runs as printed, page by page, and every public name and argument is documented."""

import ast
import importlib
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from embedders import embedder
from pages import DOCS, PAGES, ROOT, python_blocks, run_page, text
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments

TESTS = Path(__file__).parent
PACKAGE = ROOT / "rebnn_hf"
SITE = ROOT / ".mkdocs.yml"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "which", "dull", "?"]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The folder that a page writes to."""
    set_seed(0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def float_model(tmp_path):
    """Makes the folder of a tiny float model, with its tokenizer."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(vocabulary))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)

    def make(kind):
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def sentences(**labels):
    """Sentences as token ids, each with the labels that the task has."""
    rows = [[2, 5, 6 + index % 4, 7, 3] for index in range(32)]
    return Dataset.from_list([{"input_ids": ids, **{name: of(ids) for name, of in labels.items()}} for ids in rows])


def packed_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["state"] == "packed"


# Pages


def test_the_start_page(in_folder, float_model, capsys):
    data = sentences(labels=lambda ids: ids[2] % 2)
    names = run_page("index.md", {"fine_tuned": float_model(BertForSequenceClassification), "train_dataset": data})
    assert sum(isinstance(module, rebnn_hf.PackedLinear) for module in names["model"].modules()) == 12
    assert rebnn_hf.is_fused(names["model"]) or not rebnn_hf.kernels.cpu.available()
    assert "bert.encoder.layer.0.attention.self.query" in capsys.readouterr().out


def test_the_concepts():
    run_page("concepts.md", {})  # asserts on its own


def test_the_export(in_folder):
    pytest.importorskip("onnxscript", reason="needs the extra rebnn_hf[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    names = run_page("export.md", {})
    ids = names["ids"].numpy()
    session = onnxruntime.InferenceSession(in_folder / "model.onnx")
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    expected = names["model"].eval()(names["ids"]).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_tasks(in_folder, float_model, capsys):
    embedder(in_folder / "transformer").save_pretrained(str(in_folder / "embedder"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes))
    vit.save_pretrained(in_folder / "vit")
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 16, 16, generator=generator).tolist() for _ in range(8)]
    names = {
        "classification_model": float_model(BertForSequenceClassification),
        "classification_data": sentences(labels=lambda ids: ids[2] % 2),
        "tagging_model": float_model(BertForTokenClassification),
        "tagging_data": sentences(labels=lambda ids: [index % 2 for index in range(len(ids))]),
        "question_model": float_model(BertForQuestionAnswering),
        "question_data": sentences(start_positions=lambda ids: 1, end_positions=lambda ids: 2),
        "choice_model": float_model(BertForMultipleChoice),
        "choice_data": Dataset.from_list([{"input_ids": [[2, 5, 3], [2, 6, 7, 3]], "labels": i % 2} for i in range(8)]),
        "masked_model": float_model(BertForMaskedLM),
        "masked_data": sentences(),
        "encoder_model": float_model(BertModel),
        "encoder_data": sentences(),
        "embedder_model": str(in_folder / "embedder"),
        "embedder_data": sentences(),
        "image_model": str(in_folder / "vit"),
        "image_data": Dataset.from_list([{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]),
    }
    run_page("tasks.md", names)
    made = in_folder / "one-bit"
    for folder in ("classifier", "tagger", "answerer", "chooser", "masked", "encoder", "embedder", "image-classifier"):
        assert packed_in(made / folder), folder
    assert "'token_str'" in capsys.readouterr().out
    assert names["chooser"].config.quantization_config.converted and names["seen"](
        torch.tensor(images)
    ).logits.shape == (8, 2)

    found = SentenceTransformer(str(made / "embedder"), device="cpu").encode(["a fine film"])
    np.testing.assert_allclose(found, names["embedder"].encode(["a fine film"]), atol=1e-5)
    assert np.abs(found - names["teacher"].encode(["a fine film"])).max() > 1e-3

    adapted = names["adapted"].eval()
    assert isinstance(adapted, PeftModel) and not (made / "adapter" / "model.safetensors").exists()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        with_adapter = adapted(ids).logits
        with adapted.disable_adapter():
            assert not torch.equal(adapted(ids).logits, with_adapter), "the adapter was trained and loaded"


def test_the_training(in_folder, float_model):
    data = sentences(labels=lambda ids: ids[2] % 2)
    names = run_page("training.md", {"fine_tuned": float_model(BertForSequenceClassification), "train_dataset": data})
    assert packed_in(in_folder / "stages" / "packed")
    assert names["student"].config.quantization_config.activation_bits == 1
    folder = in_folder / "stages" / "packed"
    assert (
        rebnn_hf.is_fused(BertForSequenceClassification.from_pretrained(folder)) or not rebnn_hf.kernels.cpu.available()
    )


def test_every_block_of_python_is_run():
    """A page is run by a test that names it, in `run_page` as a whole or block by block behind `python_blocks`."""
    run = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("run_page", "python_blocks"):
                run.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
    assert {page for page in PAGES if python_blocks(page)} == run


# Completeness


def test_every_page_is_in_the_site():
    settings = SITE.read_text(encoding="utf-8")
    pages = set(re.findall(r": (\w+\.md)", settings[settings.index("nav:") :]))
    assert pages == {path.name for path in DOCS.glob("*.md")}
    assert yaml.safe_load(settings)["docs_dir"] == "docs"


def public_names():
    """Of the package itself, and of its modules that say by a list in `__all__` what is for users."""
    names = {f"rebnn_hf.{module}.{name}" for name, module in rebnn_hf._HOME.items()}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and module != "rebnn_hf":
                names |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return names


def test_every_public_name_is_documented():
    documented = re.findall(r"^::: (\S+)$", text("api.md"), re.MULTILINE)
    assert sorted(documented) == sorted(public_names())
    for path in documented:
        module, _, name = path.rpartition(".")
        if not module.startswith("rebnn_hf.vision"):  # which need timm; ruff asks all public names for a docstring
            documentation = getattr(importlib.import_module(module), name).__doc__
            assert documentation and documentation.strip(), path


def test_what_pages_import_is_documented():
    imported = {"rebnn_hf.vision.load_stage_one"}  # by images.md at least
    for page in PAGES:
        for node in ast.walk(ast.parse("\n".join(python_blocks(page)))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("rebnn_hf"):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    home = {f"rebnn_hf.{name}" for name in rebnn_hf._HOME}
    assert imported <= home | public_names()


def test_every_training_argument_is_described():
    """With its default, and all of its choices."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name: field for field in fields(ReBNNTrainingArguments) if field.name not in inherited}
    tables, _, _ = text("training.md").partition("## Stages")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", tables, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(own) and "relation_weight" in own
    for name, default, description in rows:
        expected = own[name].default
        assert expected is not MISSING
        if expected is not None:
            assert default == f"`{expected!r}`", name
        for choice in own[name].metadata.get("choices", ()):
            assert f"`{choice}`" in description, f"{name}: {choice}"


def test_type_checkers_see_every_public_name():
    stub = (ROOT / "rebnn_hf" / "__init__.pyi").read_text(encoding="utf-8")
    imports = [statement for statement in ast.parse(stub).body if isinstance(statement, ast.ImportFrom)]
    found = {alias.asname: statement.module for statement in imports for alias in statement.names}
    assert found == rebnn_hf._HOME
