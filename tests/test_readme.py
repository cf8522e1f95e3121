"""README's example code runs as printed, and its commands are the ones CI runs."""

import re

import pytest
from datasets import Dataset
from pages import PAGES, ROOT, python_blocks, text
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from rebnn_hf import PackedLinear

README = text("README.md")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    set_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    sentences = [{"input_ids": [5, 6, 7 + index % 9], "labels": index % 2} for index in range(32)]
    monkeypatch.chdir(tmp_path)
    code, adapters, *_images = python_blocks("README.md")  # the others: tests/vision
    names = {"fine_tuned": str(tmp_path / "float"), "train_dataset": Dataset.from_list(sentences)}
    exec(compile(code, "README.md", "exec"), names)
    exec(compile(adapters, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 20
    assert sum(isinstance(module, PackedLinear) for module in names["model"].modules()) == 12
    assert sum(type(module) is nn.Linear for module in names["merged"].modules()) == 14  # and pooler and head
    assert "encoder.layer.0-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "step", ["python3 -m venv .venv", "-c constraints.txt -e '.[dev]'", ".venv/bin/python -m pytest"]
)
def test_ci_runs_the_test_command(step):
    assert step in README and step in (ROOT / ".ci" / "run").read_text().replace("--quiet ", "")


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"TODO|TBD|XXX|RESULTS_TABLE", text(page)), page


def test_links_lead_somewhere():
    for page, path in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text(page)):
            assert target.startswith("http") or (path.parent / target).exists(), f"{page}: {target}"
