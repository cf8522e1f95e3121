"""The code of the documentation runs as printed, page by page, and every public name is documented."""

import ast
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    set_seed,
)

import rebnn_hf

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = ROOT / ".mkdocs.yml"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "which", "dull", "?"]


def code_of(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))


def run(page, names, monkeypatch, folder):
    set_seed(0)
    monkeypatch.chdir(folder)
    exec(compile(code_of(page), page, "exec"), names)
    return names


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


def test_the_start_page(tmp_path, monkeypatch, float_model, capsys):
    data = sentences(labels=lambda ids: ids[2] % 2)
    names = {"fine_tuned": float_model(BertForSequenceClassification), "train_dataset": data}
    names = run("index.md", names, monkeypatch, tmp_path)
    assert sum(isinstance(module, rebnn_hf.PackedLinear) for module in names["model"].modules()) == 12
    assert rebnn_hf.is_fused(names["model"]) or not rebnn_hf.kernels.cpu.available()
    assert "bert.encoder.layer.0.attention.self.query" in capsys.readouterr().out


def test_the_concepts(tmp_path, monkeypatch):
    run("concepts.md", {}, monkeypatch, tmp_path)  # asserts on its own


def test_the_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs the extra rebnn_hf[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    names = run("export.md", {}, monkeypatch, tmp_path)
    ids = names["ids"].numpy()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    expected = names["model"].eval()(names["ids"]).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_tasks(tmp_path, monkeypatch, float_model, capsys):
    names = {
        "classification_model": float_model(BertForSequenceClassification),
        "classification_data": sentences(labels=lambda ids: ids[2] % 2),
        "tagging_model": float_model(BertForTokenClassification),
        "tagging_data": sentences(labels=lambda ids: [index % 2 for index in range(len(ids))]),
        "question_model": float_model(BertForQuestionAnswering),
        "question_data": sentences(start_positions=lambda ids: 1, end_positions=lambda ids: 2),
        "masked_model": float_model(BertForMaskedLM),
        "masked_data": sentences(),
        "encoder_model": float_model(BertModel),
        "encoder_data": sentences(),
    }
    run("tasks.md", names, monkeypatch, tmp_path)
    for folder in ("classifier", "tagger", "answerer", "masked", "encoder"):
        config = json.loads((tmp_path / "one-bit" / folder / "config.json").read_text())
        assert config["quantization_config"]["state"] == "packed"
    assert "'token_str'" in capsys.readouterr().out


def test_every_page_is_in_the_site():
    text = SITE.read_text(encoding="utf-8")
    pages = set(re.findall(r": (\w+\.md)", text[text.index("nav:") :]))
    assert pages == {path.name for path in DOCS.glob("*.md")}
    assert yaml.safe_load(text)["docs_dir"] == "docs"


def test_every_public_name_is_documented():
    documented = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    home = {f"rebnn_hf.{module}.{name}" for name, module in rebnn_hf._HOME.items()}
    assert sorted(documented) == sorted(home)
    for path in documented:
        module, _, name = path.rpartition(".")
        documentation = getattr(importlib.import_module(module), name).__doc__
        assert documentation and documentation.strip(), path


def test_type_checkers_see_every_public_name():
    stub = (ROOT / "rebnn_hf" / "__init__.pyi").read_text(encoding="utf-8")
    imports = [statement for statement in ast.parse(stub).body if isinstance(statement, ast.ImportFrom)]
    found = {alias.asname: statement.module for statement in imports for alias in statement.names}
    assert found == rebnn_hf._HOME
