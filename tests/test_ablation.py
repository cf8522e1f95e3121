"""The grid of weight rules: its table, and a real run that continues where it stopped."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import ablation  # noqa: E402


def row(rule, seed, score, flips=0.2):
    values = {"teacher": 0.9, "flips": flips, "late_flips": 1e-4, "flip_backs": 0.01, "loss": 2 - score}
    return {"rule": rule, "seed": seed, "score": score} | values


def test_table_has_means_spreads_and_paired_differences():
    rows = [row("bwn", 1, 0.80), row("bwn", 2, 0.84), row("rebnn", 1, 0.82), row("rebnn", 2, 0.87)]
    lines = ablation.markdown(rows, ["bwn", "rebnn"], "bwn").splitlines()
    assert lines[2].startswith("| bwn | 0.8200 ± 0.0283 | +0.0000 ± 0.0000 | 1.1800 ± 0.0283 | +0.0000 ±")
    assert lines[3].endswith("| 0.200 ± 0.000 | 1.0e-04 ± 0.0e+00 | 0.0100 ± 0.0000 |")
    # Paired: .02 and .03, although the scores themselves spread by .035.
    assert lines[3].startswith("| rebnn | 0.8450 ± 0.0354 | +0.0250 ± 0.0071 | 1.1550 ± 0.0354 | -0.0250 ± 0.0071 |")
    assert lines[-1] == "2 seeds, mean ± standard deviation; teacher 0.9000."


def test_unknown_rules_and_baselines_are_refused(capsys):
    common = ["--task", "demo", "--teacher", "t", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        ablation.parse_arguments([*common, "--rules", "median"])
    assert "invalid choice: 'median'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablation.parse_arguments([*common, "--rules", "bwn"])
    assert "--baseline 'learned scale' is not among the rules: bwn" in capsys.readouterr().err


def test_a_grid_on_the_demo(tmp_path):
    from glue_grammar import build_demo_tokenizer, demo_dataset, demo_model_config
    from transformers import BertForSequenceClassification, set_seed

    tokenizer = build_demo_tokenizer(demo_dataset()["train"]["sentence1"])
    set_seed(0)
    BertForSequenceClassification(demo_model_config(len(tokenizer))).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    grid = ["--task", "demo", "--teacher", str(tmp_path / "teacher"), "--rules", "bwn", "learned scale"]
    grid += ["--seeds", "1", "--baseline", "bwn", "--jobs", "2", "--output_dir", str(tmp_path / "grid")]
    command = [sys.executable, str(RECIPES / "ablation.py"), *grid, "--", "--max_steps", "4", "--logging_steps", "2"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    with (tmp_path / "grid" / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["rule"] for r in rows] == ["bwn", "learned scale"]
    assert 0 < float(rows[0]["flips"]) < 1 and rows[0]["flips"] != rows[1]["flips"]
    assert (tmp_path / "grid" / "ablation.png").read_bytes()[:4] == b"\x89PNG"

    results = tmp_path / "grid" / "bwn-1" / "results.json"
    written = results.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert results.stat().st_mtime_ns == written  # finished runs are kept
