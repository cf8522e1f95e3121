"""The command `rebnn`, run as its users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rebnn_hf import cli, kernels
from rebnn_hf.kernels import cpu

ROOT = Path(__file__).parents[1]
GOLDEN = str(ROOT / "tests" / "data" / "golden_v2")
needs_engine = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


def rebnn(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REBNN_")}
    return subprocess.run(
        [sys.executable, "-m", "rebnn_hf.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **environment},
    )


@needs_engine
def test_info_names_the_instruction_set_in_use(monkeypatch):
    monkeypatch.delenv(cpu.ISA_ENVIRONMENT, raising=False)
    result = rebnn("info")
    assert result.returncode == 0, result.stderr
    best = cpu.isa_name()
    assert f"backend: cpu, with {best}\n" in result.stdout and f"{best} (in use)" in result.stdout
    assert result.stdout.count("(in use)") == 1
    listed = next(line for line in result.stdout.splitlines() if line.startswith("instruction sets: "))
    assert [part.split()[0] for part in listed.removeprefix("instruction sets: ").split(", ")] == list(
        cpu.instruction_sets()
    )


@needs_engine
def test_info_follows_the_environment(monkeypatch, capsys):
    portable = rebnn("info", REBNN_ISA="portable").stdout
    assert "backend: cpu, with portable\n" in portable and "portable (in use)" in portable
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert cli.main(["info"]) == 0
    reference = capsys.readouterr().out
    assert "backend: reference, because REBNN_BACKEND=reference\n" in reference and "in use" not in reference


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(cpu, "_path", lambda: None)
    cpu._load.cache_clear()
    yield
    monkeypatch.undo()
    cpu._load.cache_clear()


def test_info_without_the_library(no_library, capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend: reference, because librebnn" in printed and "was not built" in printed
    assert "instruction sets" not in printed


def test_errors_have_no_traceback():
    result = rebnn("bench", "no/model")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("rebnn: 'no/model' is no model: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["info"], {"REBNN_BACKEND": "gpu"}, "REBNN_BACKEND='gpu' is not a backend"),
        pytest.param(["info"], {"REBNN_ISA": "mmx"}, "REBNN_ISA='mmx' cannot be used", marks=needs_engine),
        (["bench", GOLDEN, "--float", GOLDEN, "--length", "4"], {}, "is not a float model"),
        (["bench", GOLDEN, "--length", "7"], {}, "1 x 7 tokens do not fit"),
        (["bench", GOLDEN, "--threads", "1000"], {}, "1000 threads cannot be measured"),
        (["bench", GOLDEN, "--length", "4", "--rounds", "0"], {}, "rounds=0 measures nothing"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, environment, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("rebnn: ") and message in printed.err and printed.err.count("\n") == 1
    assert "|" not in printed.out


@needs_engine
def test_bench_says_where_layers_ran_and_compares():
    result = rebnn("bench", GOLDEN, "--batch", "1", "2", "--length", "4", "--threads", "1", "--rounds", "2")
    assert result.returncode == 0, result.stderr
    assert "7 layer(s) by the engine, each in a call of its own: bert.embeddings.word_embeddings, " in result.stdout
    assert "not fused: heads of 6 features" in result.stdout
    assert "float model: of the same config with random weights" in result.stdout
    for size in ("1 x 4", "2 x 4"):
        assert f"| {size} " in result.stdout
    for contender in ("packed", "torch fp32", "torch bf16", "torch int8"):
        assert result.stdout.count(f"| {contender} ") == 2


def test_bench_with_the_reference_backend(monkeypatch, capsys):
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert cli.main(["bench", GOLDEN, "--batch", "1", "--length", "4", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "7 layer(s) 1-bit, but unpacked for torch" in printed
    assert "backend reference, because REBNN_BACKEND=reference" in printed
