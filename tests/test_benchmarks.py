"""The benchmarks run, and their tables are consistent."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name):
    """Module of a benchmark script."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_training(clock, capsys, keep_threads):
    training = load("training")
    table = training.main(["--shape", "tiny", "--steps", "3", "--warmup", "1", "--clock", clock])
    steps = {(r["precision"], r["method"]): r for r in table if r["part"] == "step"}
    assert list(steps) == [(p, m) for p in ("fp32", "bf16") for m in ("fine-tuning", "ReBNN", "recipe")]
    for (precision, method), step in steps.items():
        baseline = steps[precision, "fine-tuning"]
        assert step["ratio"] == pytest.approx(step["median"] / baseline["median"])
        assert 0 < step["min"] <= step["q1"] <= step["median"] <= step["q3"]
        parts = [r for r in table if (r["precision"], r["method"]) == (precision, method) and r["part"] != "step"]
        expected = [p for p in training.PARTS if method != "fine-tuning" or p not in training.REBNN_ONLY]
        assert [r["part"] for r in parts] == expected
        assert sum(r["share"] for r in parts) == pytest.approx(1)
    assert all(steps[p, "fine-tuning"]["ratio"] == 1 for p in ("fp32", "bf16"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(table)
    assert printed[0].endswith(f"1 thread(s), 3 steps, {clock} time, rebnn-w1a32")
    assert all(line.startswith("tiny") for line in printed[2:])


def test_training_steps_move_the_models_and_the_balance(tmp_path):
    training = load("training")
    contender = training.distillation(
        training.SHAPES["tiny"], str(tmp_path), training.CLOCKS["cpu"], as_in_recipe=False
    )
    model = contender.trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        contender.step(training.SHAPES["tiny"].inputs(), None)
    layers = contender.trainer.resilience.statistics()
    assert layers
    assert sum(layer["flip_ratio"] for layer in layers.values()) > 0
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved


@pytest.mark.parametrize("preset", ["bibert", "rebnn-bit-w1a1"])
@pytest.mark.parametrize("as_in_recipe", [False, True])
def test_training_takes_bits_and_losses_from_a_preset(preset, as_in_recipe, tmp_path):
    training = load("training")
    shape = training.SHAPES["tiny"]
    contender = training.distillation(shape, str(tmp_path), training.CLOCKS["cpu"], as_in_recipe, preset)
    trainer = contender.trainer
    config = trainer.model.config.quantization_config
    assert config.method() == training.ReBNNConfig.preset(preset).method()
    assert trainer.args.hidden_loss == ("direction" if preset == "bibert" else "relative_mse")
    assert trainer.teacher.config._attn_implementation == ("eager" if as_in_recipe else "sdpa")
    spent = contender.step(shape.inputs(), None)
    assert set(spent) == set(training.PARTS) and all(spent[part] > 0 for part in training.PARTS)


@pytest.mark.parametrize("wrong", [["--preset", "bits"], ["--steps", "0"], ["--threads", "0"], ["--shape", "huge"]])
def test_training_refuses(wrong, capsys):
    with pytest.raises(SystemExit):
        load("training").main(wrong)


def test_size_table_agrees_with_the_files(capsys):
    rows = {row["part"]: row for row in load("size").main(["--layers", "1"])}
    for column, itemsize in (("fp32 model", 4), ("packed, rest float32", 4), ("packed, rest float16", 2)):
        total, file = rows["tensors, total"][column], rows["file on disk"][column]
        parts = sum(row[column] for part, row in rows.items() if part not in ("tensors, total", "file on disk"))
        assert parts == total
        assert total < file < total + 16_384  # the header of the file
        assert rows["head"][column] == (2 * 768 + 2) * itemsize
    assert rows["encoder"]["packed, rest float32"] * 32 == rows["encoder"]["fp32 model"] == 7_077_888 * 4
    assert "| word_embeddings | 93,763,584 | 2,930,112 | 2,930,112 |" in capsys.readouterr().out
