"""The benchmarks run, and their tables are consistent."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from rebnn_hf.kernels import cpu

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


needs_engine = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@needs_engine
def test_linear(capsys):
    linear = load("linear")
    rows = linear.main(["--shape", "3x20x40", "2x16x100", "--rounds", "3"])
    contenders = ["W1A1 C", "W1A1 call", "W1A1 layer", "W1A2 call", "W1A2 layer", "W1A4 call", "W1A4 layer"]
    contenders += ["W1A8 token call", "W1A8 token layer", "W1A32 layer", *linear.BASELINES]
    assert [r["contender"] for r in rows] == contenders * 2
    for r in rows:
        baseline = next(b for b in rows if b["shape"] == r["shape"] and b["contender"] == "torch int8")
        assert r["x torch int8"] == pytest.approx(baseline["median us"] / r["median us"])
        products = 3 * 20 * 40 if r["shape"] == "3x20x40" else 2 * 16 * 100
        assert r["T MAC/s"] * 1e12 == pytest.approx(products / (r["median us"] * 1e-6))
    printed = capsys.readouterr().out
    assert printed.startswith(f"torch {torch.__version__}") and f"engine {cpu.isa_name()}, 3 interleaved" in printed
    assert printed.count("| W1A1 layer ") == 2


@needs_engine
def test_linear_calls_compute_the_layers_they_are_compared_with():
    linear = load("linear")
    x = torch.randn(5, 70)
    contenders = {c.name: c.call for c in linear.engine(x, 33)}
    for name in ("W1A1", "W1A2", "W1A4", "W1A8 token"):
        layer = contenders[f"{name} layer"].func
        assert torch.equal(contenders[f"{name} call"](), layer(x)), name
        torch.testing.assert_close(layer(x), layer.reference(x))
    assert torch.equal(contenders["W1A1 C"](), contenders["W1A1 layer"]())
    widths = {name: contenders[f"{name} layer"].func.input_binarizer for name in linear.INPUTS}
    assert {n: getattr(b, "bits", None) for n, b in widths.items()} == {
        "W1A1": 1,
        "W1A2": 2,
        "W1A4": 4,
        "W1A8 token": None,
        "W1A32": None,
    }


@needs_engine
def test_linear_forces_each_instruction_set(monkeypatch):
    linear = load("linear")
    used = []
    monkeypatch.setattr(linear.cpu, "linear", lambda *_: used.append(cpu.isa_name()))
    runs = [name for name, here in cpu.instruction_sets().items() if here]
    rows = linear.main(["--shape", "2x8x64", "--rounds", "1", "--isa"])
    assert [r["contender"] for r in rows] == [*runs, *linear.BASELINES]
    assert list(dict.fromkeys(used)) == runs[::-1]  # the first round goes back


@needs_engine
def test_encoder(capsys):
    encoder = load("encoder")
    options = ["--model", "tiny", "--size", "1x8", "2x4", "--padded", "16", "--rounds", "2", "--processes", "1"]
    tables = encoder.main(options)
    assert list(tables) == ["speed", "padding", "memory"]
    ours = ["W1A1", "W1A1 layered", "W1A8 token", "W1A32"]
    for size in ("1 x 8", "2 x 4"):
        rows = [r for r in tables["speed"] if r["batch x tokens"] == size]
        floats = [r["contender"] for r in rows[4:]]
        assert [r["contender"] for r in rows[:4]] == ours and floats[:3] == ["torch fp32", "torch bf16", "torch int8"]
        assert all(r["x torch fp32"] == pytest.approx(rows[4]["median ms"] / r["median ms"]) for r in rows)
    names = ["8 x 16", "72 tokens padded to 8 x 16", "8 x 9"]
    assert [(r["model"], r["contender"]) for r in tables["padding"]] == [
        (model, name) for model in ("W1A1", "torch fp32") for name in names
    ]
    small, packed = tables["memory"]
    assert small["model"] == "tiny float32" and packed["file MiB"] < small["file MiB"]
    assert packed["x less"] == pytest.approx(small["resident MiB"] / packed["resident MiB"])
    printed = capsys.readouterr().out
    assert "tiny, W1A1\n12 layer(s) in one call of the engine: bert.encoder.layer.*.attention.self.query" in printed
    assert "tiny, W1A1 layered\n12 layer(s) by the engine, each in a call of its own" in printed


def test_encoder_models_do_not_share_a_config():
    encoder = load("encoder")
    if cpu.available():
        encoder.packed_model("tiny", encoder.W1A1)
    assert encoder.float_model("tiny").config._attn_implementation == "sdpa"
    types = {type(m).__name__ for m in encoder.float_model("tiny").modules()}
    assert "Linear" in types and not types & {"BinaryLinear", "PackedLinear", "ElasticAttention"}


@pytest.fixture
def small_embedder(tmp_path):
    """Folders of an embedder, and of sentences as STS-B hands them out."""
    from embedders import SENTENCES, embedder  # here: sentence-transformers takes seconds to import

    embedder(tmp_path / "transformer").save_pretrained(str(tmp_path / "whole"))
    lines = ["index\tsentence1", *(f"{number}\t{sentence}" for number, sentence in enumerate(SENTENCES))]
    (tmp_path / "dev.tsv").write_text("\n".join(lines))
    return ["--embedder", str(tmp_path / "whole"), "--sentences", str(tmp_path / "dev.tsv")]


@needs_engine
def test_embedder(small_embedder, capsys):
    benchmark = load("embedder")
    rows = benchmark.main([*small_embedder, "--count", "6", "--batch", "1", "4", "--rounds", "2"])
    names = ["W1A1", "W1A8 token", "W1A32", "torch fp32", "torch int8"]
    names += [] if benchmark.missing_for_onnx() else ["ORT fp32", "ORT int8"]
    assert [(r["batch"], r["contender"]) for r in rows] == [(batch, name) for batch in ("1", "4") for name in names]
    for row in rows:
        baseline = next(r for r in rows if r["batch"] == row["batch"] and r["contender"] == "torch fp32")
        assert row["x torch fp32"] == pytest.approx(row["sentences/s"] / baseline["sentences/s"])
        assert 0 < row["q1"] <= row["sentences/s"] <= row["q3"]
    printed = capsys.readouterr().out
    assert "6 sentences of 12.3 tokens on average" in printed
    assert "W1A1\n12 layer(s) in one call of the engine" in printed


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_embedder_contenders_give_the_same_embeddings(small_embedder, tmp_path):
    benchmark = load("embedder")
    embedder = benchmark.SentenceTransformer(small_embedder[1], device="cpu")
    transformer = embedder[0].auto_model
    sentences = benchmark.read_sentences(Path(small_embedder[3]))
    expected = torch.from_numpy(embedder.encode(sentences))
    for name, path in benchmark.onnx_files(transformer, tmp_path / "onnx").items():
        other = benchmark.with_transformer(embedder, benchmark.OnnxTransformer(path, transformer.config, 1))
        found = torch.from_numpy(other.encode(sentences, batch_size=7))
        torch.testing.assert_close(found, expected, atol=1e-5 if name == "ORT fp32" else 0.1, rtol=0)
        assert not torch.equal(found, expected), "another transformer answered"


TINY_EXPORT = "--layers 1 --hidden 32 --heads 2 --intermediate 52 --vocabulary 60 --texts 40 --rounds 2 --size 1x8 2x5"
ONNX_PACKAGES = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(ONNX_PACKAGES), reason=f"not installed: {', '.join(ONNX_PACKAGES)}")
@needs_engine
def test_export(capsys):
    export = load("export")
    tables = export.main(TINY_EXPORT.split())
    files = {row["contender"]: row for row in tables["files"]}
    assert [*files] == [*export.MADE_FROM]
    for name in ("W1A1 ONNX", "W1A32 engine", "W1A32 ONNX", "ORT fp32"):
        assert files[name]["largest difference"] < 1e-5 < files[name]["largest logit"] / 10, name
        assert files[name]["equal answers"] == "100.0%"
    assert files["W1A32 ONNX"]["largest difference"] > 0, "the file was run, and not the engine"
    assert 1e-5 < files["ORT int8"]["largest difference"] < files["ORT int8"]["largest logit"]
    assert files["W1A32 engine"]["file MB"] < files["torch fp32"]["file MB"]
    assert files["W1A32 engine"]["largest logit"] != files["W1A1 engine"]["largest logit"]
    for size in ("1 x 8", "2 x 5"):
        rows = {row["contender"]: row for row in tables["speed"] if row["batch x tokens"] == size}
        assert [*rows] == [*export.MADE_FROM]
        for base in export.BASELINES:
            ratios = [row[f"x {base}"] for row in rows.values()]
            assert ratios == pytest.approx([rows[base]["median ms"] / row["median ms"] for row in rows.values()])
    printed = capsys.readouterr().out
    assert f"engine {cpu.isa_name()}, 1 thread(s), 2 interleaved rounds, wall time; 1 layers of 32 x 52" in printed


@pytest.mark.parametrize("name, wrong", [("linear", ["--rounds", "x"]), ("encoder", ["--model", "huge"])])
def test_engine_benchmarks_refuse(name, wrong):
    with pytest.raises(SystemExit):
        load(name).main(wrong)
