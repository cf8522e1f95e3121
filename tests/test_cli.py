"""The command `rebnn`, run as its users run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import rebnn_hf
from rebnn_hf import cli, kernels
from rebnn_hf.benchmark import missing_for_onnx
from rebnn_hf.inputs import random_inputs
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES

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
    assert result.returncode == 2 and result.stdout == ""
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
    assert cli.main(arguments) == 2
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


def test_bench_as_json(capsys):
    assert (
        cli.main(["bench", GOLDEN, "--batch", "1", "--length", "4", "--rounds", "1", "--threads", "1", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == GOLDEN and len(result["places"]) == 11
    assert {"packed", "torch fp32"} <= {row["contender"] for row in result["rows"]}
    assert all(row["batch x tokens"] == "1 x 4" and row["median ms"] > 0 for row in result["rows"])


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backend"] == kernels.backend() and result["versions"]["torch"] == torch.__version__
    assert set(result["instruction_sets"]) == (set(cpu.instruction_sets()) if cpu.available() else set())


# From a float model to bits and back

TEXTS = ["a good film", "a bad film", "the film is bad and good", "good good bad"]
TREE = "bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model with its tokenizer, and what the commands make of it."""
    root = tmp_path_factory.mktemp("cli")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "the", "is", "and"]
    (root / "vocab.txt").write_text("\n".join(words))
    (root / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    hf.BertTokenizer(vocab=str(root / "vocab.txt")).save_pretrained(root / "float")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=52)
    config = hf.BertConfig(vocab_size=len(words), max_position_embeddings=16, initializer_range=0.2, **sizes)
    hf.BertForSequenceClassification(config).save_pretrained(root / "float")
    for command, source, made in (
        ("binarize", "float", "latent"),
        ("pack", "latent", "packed"),
        ("unpack", "packed", "back"),
    ):
        assert cli.main([command, str(root / source), str(root / made)]) == 0
    return root


def load(folder):
    return hf.AutoModelForSequenceClassification.from_pretrained(folder)


@torch.no_grad()
def logits(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    return torch.cat([load(folder)(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def of_types(folder, types):
    return sum(isinstance(module, types) for module in load(folder).modules())


def test_each_state_is_a_folder_that_loads_with_its_tokenizer(folders):
    assert of_types(folders / "latent", LATENT_TYPES) == of_types(folders / "packed", PACKED_TYPES) == 12
    assert of_types(folders / "back", LATENT_TYPES + PACKED_TYPES) == 0
    expected = logits(folders / "latent")
    assert expected.std() > 0.01 and (logits(folders / "float") - expected).abs().max() > 0.01
    for state in ("packed", "back"):
        torch.testing.assert_close(logits(folders / state), expected, rtol=1e-5, atol=1e-5)
    tensors = load_file(folders / "packed" / "model.safetensors")
    assert tensors[f"{TREE}.weight"].dtype == torch.uint8 and tensors[f"{TREE}.weight"].shape == (32, 7)


def test_presets_switches_and_types(folders, tmp_path, capsys):
    latent, packed = str(tmp_path / "latent"), str(tmp_path / "new" / "packed")
    choices = ["--preset", "bwn-w1a32", "--word-embeddings", "--pooler", "--keep-float", "layer.0", "--json"]
    assert cli.main(["binarize", str(folders / "float"), latent, *choices]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == latent and result["binary_parameters"] == 12 * 32 + 32 * 32 + 4 * 32 * 32 + 2 * 32 * 52
    assert cli.main(["pack", latent, packed, "--dtype", "float16"]) == 0
    assert f"Written to {packed}, with its BertTokenizer." in capsys.readouterr().out
    model = load(packed)
    assert model.dtype == torch.float16 and model.config.quantization_config.weight_scale == "mean_abs"
    assert {n for n, m in model.named_modules() if isinstance(m, PACKED_TYPES) and "layer" not in n} == {
        "bert.embeddings.word_embeddings",
        "bert.pooler.dense",
    }


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """Float image models: a transformer and a convolutional network."""
    root = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=52)
    vit = hf.ViTForImageClassification(hf.ViTConfig(image_size=12, patch_size=4, num_labels=3, **sizes))
    vit.save_pretrained(root / "vit")
    sizes = dict(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=3)
    hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).save_pretrained(root / "resnet")
    return root


@pytest.fixture(scope="module")
def packed_images(image_folders):
    """The same in few bits: weights and inputs of the ViT 1-bit; of the other, inputs are 4-bit."""
    for name, bits in (("vit", 1), ("resnet", 4)):
        model = hf.AutoModelForImageClassification.from_pretrained(image_folders / name).eval()
        rebnn_hf.binarize(model, rebnn_hf.ReBNNConfig.preset("rebnn-elastic-w1a1", activation_bits=bits))
        rebnn_hf.calibrate(model, random_inputs(model, 2, 12 if name == "vit" else 32))
        rebnn_hf.pack(model).save_pretrained(image_folders / f"packed-{name}")
    return image_folders


@needs_engine
@pytest.mark.parametrize(
    "name, options, sizes, layers, baselines",
    [
        ("vit", ["--batch", "1", "2"], ["1 x 12", "2 x 12"], 12, {"torch fp32", "torch bf16", "torch int8"}),
        ("resnet", ["--batch", "2", "--side", "24", "40"], ["2 x 24", "2 x 40"], 4, {"torch fp32", "torch bf16"}),
    ],
)
def test_bench_of_images(packed_images, name, options, sizes, layers, baselines, capsys):
    packed = str(packed_images / f"packed-{name}")
    real = str(packed_images / name)
    assert cli.main(["bench", packed, "--float", real, *options, "--rounds", "1", "--threads", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    places = list(result["places"].values())
    assert (
        places.count("engine") == layers and places.count("float") == len(places) - layers and "reference" not in places
    )
    expected = {"packed"} | baselines | (set() if missing_for_onnx() else {"ORT fp32", "ORT int8"})
    for size in sizes:
        rows = [row for row in result["rows"] if row["batch x side"] == size]
        assert {row["contender"] for row in rows} == expected and all(row["median ms"] > 0 for row in rows)
    assert len(result["rows"]) == len(sizes) * len(expected)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (
            "packed-vit",
            ["--length", "8"],
            "ViTForImageClassification reads images, which have no --length; give their --side",
        ),
        (
            None,
            ["--side", "8"],
            "BertForSequenceClassification does not read images, which have a --side; give a --length",
        ),
        ("packed-vit", ["--side", "16"], "Input image size (16*16) doesn't match model (12*12)"),
        ("packed-resnet", ["--side", "0"], "1 images of 0 x 0 do not fit"),
    ],
)
def test_bench_refuses_sizes_that_are_not_the_models(packed_images, model, options, message, capsys):
    assert cli.main(["bench", GOLDEN if model is None else str(packed_images / model), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "|" not in printed.out


def saved_method(folder):
    return rebnn_hf.ReBNNConfig.from_dict(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    ).method()


def test_set_overrides_any_field_of_a_preset(folders, tmp_path, capsys):
    """What is saved is what the same call in Python gives, in the types of the fields."""
    settings = ["activation_bits=4", "ffn_activation=model", "balance_rule=none", "word_embeddings=true", "pooler=True"]
    settings += [
        "balance_strength=1e-1",
        "balance_lower=null",
        "balance_upper=None",
        'modules_to_not_convert=["layer.0"]',
    ]
    latent = tmp_path / "latent"
    arguments = ["binarize", str(folders / "float"), str(latent), "--preset", "rebnn-bit-w1a1", "--set", *settings]
    assert cli.main([*arguments, "--set", "weight_scale=mean_abs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == saved_method(latent)
    expected = rebnn_hf.ReBNNConfig.preset(
        "rebnn-bit-w1a1",
        activation_bits=4,
        ffn_activation="model",
        balance_rule="none",
        word_embeddings=True,
        pooler=True,
        balance_strength=0.1,
        modules_to_not_convert=["layer.0"],
        weight_scale="mean_abs",
    )
    assert saved_method(latent) == expected.method()
    assert of_types(latent, LATENT_TYPES) == 6 + 2


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_advice_of_the_error_works(image_folders, name, tmp_path, capsys):
    """No few-bit attention outside of the BERT family; both ways out that are named are taken."""
    source = str(image_folders / name)
    assert cli.main(["binarize", source, str(tmp_path / "no"), "--preset", "rebnn-bit-w1a1"]) == 2
    said = capsys.readouterr().err
    assert "attention='softmax' with ffn_activation='model' works on every architecture" in said
    assert "preset 'rebnn-elastic-w1a1'" in said and said.endswith("Fields are set with --set FIELD=VALUE.\n")
    assert not (tmp_path / "no").exists()
    advice = ["--preset", "rebnn-bit-w1a1", "--set", "attention=softmax", "ffn_activation=model"]
    for folder, options in (("by_hand", advice), ("preset", ["--preset", "rebnn-elastic-w1a1"])):
        assert cli.main(["binarize", source, str(tmp_path / folder), *options]) == 0
        method = saved_method(tmp_path / folder)
        assert (method["activation"], method["activation_bits"], method["attention"]) == ("elastic", 1, "softmax")
    assert saved_method(tmp_path / "by_hand") == saved_method(tmp_path / "preset")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--set", "activation_bits"],
            "--set expects FIELD=VALUE, for example activation_bits=4; got 'activation_bits'",
        ),
        (["--set", "activaton=sign"], "there is no field 'activaton'; expected one of weight_scale, "),
        (["--set", "activaton=sign"], "Did you mean activation?"),
        (["--set", "state=packed"], "there is no field 'state'; expected one of weight_scale, "),
        (["--set", "pooler=true", "pooler=false"], "--set gives pooler twice: True and 'false'"),
        (["--pooler", "--set", "pooler=false"], "pooler is given twice: True by an option of its own, False by --set"),
        (["--keep-float", "a", "--set", "modules_to_not_convert=null"], "modules_to_not_convert is given twice"),
        (["--set", "activation=signs"], "activation='signs' is unknown; expected one of 'none', 'sign', "),
        (["--set", "activation_bits=many"], "activation_bits='many' must be an integer or None"),
        (["--set", "activation_bits=1.5"], "activation_bits=1.5 must be an integer or None"),
        (["--set", "pooler=1"], "pooler=1 must be True or False"),
        (["--set", "pooler=yes"], "pooler='yes' must be True or False"),
        (["--set", "balance_strength=null"], "balance_strength=None must be a number"),
        (
            ["--set", "modules_to_not_convert=layer"],
            "modules_to_not_convert must be a list of module names, got 'layer'",
        ),
        (
            ["--set", "attention=elastic"],
            "attention='elastic' has the bits of the activations, and activation='none' has 32",
        ),
    ],
)
def test_wrong_fields_are_refused_before_the_model_is_read(options, message, tmp_path, capsys):
    assert cli.main(["binarize", "no/model", str(tmp_path / "new"), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("state, format_version", [("float", None), ("latent", 2), ("packed", 2)])
def test_info_of_a_model_is_its_summary(folders, state, format_version, capsys):
    assert cli.main(["info", str(folders / state), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["format_version"]) == (state, format_version)
    assert result["class"] == "BertForSequenceClassification"
    expected = rebnn_hf.summary(load(folders / state)).to_dict()
    assert result["rows"] == expected["rows"] and result["totals"] == expected["totals"]
    assert result["file_bytes"] == (folders / state / "model.safetensors").stat().st_size
    assert cli.main(["info", str(folders / state)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folders / state}: BertForSequenceClassification, {state}")
    assert printed.endswith(f"{rebnn_hf.summary(load(folders / state))}\n")


def test_info_reads_no_weights(folders, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    shutil.copy(folders / "packed" / "config.json", tmp_path / "only")
    assert cli.main(["info", str(tmp_path / "only")]) == 0
    assert "weights 1-bit (learned), activations float, attention softmax" in capsys.readouterr().out


def test_verify_of_what_was_packed(folders, capsys):
    arguments = ["verify", str(folders / "packed"), str(folders / "latent"), "--texts", str(folders / "texts.txt")]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] and result["batches"] == 4 and result["equal_answers"] == 1.0
    assert result["largest_difference"] < 1e-5 and result["tolerance"] == 1e-3
    assert result["largest_output"] == pytest.approx(logits(folders / "latent").abs().max().item(), rel=1e-5)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.endswith("Verified.\n")


def test_verify_finds_a_changed_bit_and_another_model(folders, tmp_path, capsys):
    shutil.copytree(folders / "packed", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[f"{TREE}.weight"][3, 2] ^= 0b100
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["verify", str(tmp_path / "changed"), str(folders / "latent"), "--text", *TEXTS]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "Not verified: outputs differ by" in printed.out and printed.err == ""
    assert cli.main([*arguments, "--tolerance", "10"]) == 0
    done = rebnn(
        "verify", str(folders / "packed"), str(folders / "float"), "--text", *TEXTS, "--tolerance", "1e-4", "--json"
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    expected = (logits(folders / "packed") - logits(folders / "float")).abs().max().item()
    assert not result["verified"] and result["largest_difference"] == pytest.approx(expected, rel=1e-4)
    same = (logits(folders / "packed").argmax(-1) == logits(folders / "float").argmax(-1)).float().mean().item()
    assert result["equal_answers"] == same


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["pack", "{float}", "{new}"],
            "is not a latent model: its config has no quantization_config; `rebnn binarize`",
        ),
        (["pack", "{packed}", "{new}"], "is not a latent model: its config has quant_method='rebnn', state='packed'"),
        (["binarize", "{latent}", "{new}"], "is not a float model"),
        (["unpack", "{float}", "{new}"], "is not a packed or latent model"),
        (["binarize", "{float}", "{new}", "--keep-float", "layer"], "rebnn: "),
        (["pack", "{latent}", "{packed}"], "packed exists; give another folder, or --overwrite to replace it."),
        (["pack", "{latent}", "{texts}", "--overwrite"], "texts holds no config.json, so it is no model"),
        (["pack", "{latent}", "{latent}", "--overwrite"], "latent is where the model comes from"),
        (["info", "{texts}"], "texts' is no model"),
        (["verify", "{packed}", "{latent}"], "there is nothing to read, or two kinds of it; give texts with --text"),
        (["verify", "{packed}", "{latent}", "--text", "a", "--image", "b.png"], "nothing to read, or two kinds of it"),
        (["verify", "{packed}", "{latent}", "--image", "b.png"], "BertForSequenceClassification reads texts, and no"),
        (["verify", "{packed}", "{latent}", "--texts", "{new}"], "No such file"),
        (
            ["verify", "{packed}", "{latent}", "--text", "a", "--tokenizer", "{texts}"],
            "has no tokenizer; name one with",
        ),
        (["verify", "{packed}", GOLDEN, "--text", "a"], "is not a latent or float model"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(folders, tmp_path, arguments, message, capsys):
    shutil.copytree(folders, tmp_path / "all")
    (tmp_path / "all" / "texts").mkdir()
    names = ("float", "latent", "packed", "texts", "new")
    places = {name: str(tmp_path / "all" / name) for name in names}
    before = contents(tmp_path)
    assert cli.main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("rebnn: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_damaged_file_is_one_sentence(folders, tmp_path, capsys):
    shutil.copytree(folders / "packed", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert cli.main(["unpack", str(tmp_path / "cut"), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_overwrite_replaces_the_folder_as_a_whole(folders, tmp_path, capsys):
    shutil.copytree(folders / "float", tmp_path / "out")
    (tmp_path / "out" / "left_over.txt").write_text("old")
    assert cli.main(["pack", str(folders / "latent"), str(tmp_path / "out"), "--overwrite"]) == 0
    assert of_types(tmp_path / "out", PACKED_TYPES) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "left_over.txt").exists()


def test_an_interrupted_write_leaves_nothing(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders / "packed", tmp_path / "out")
    before = contents(tmp_path)

    def full(self, folder, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    assert cli.main(["pack", str(folders / "latent"), str(tmp_path / "out"), "--overwrite"]) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def choices(folders, tmp_path_factory):
    """Folders of a model of multiple choice, and questions with two and three choices."""
    root = tmp_path_factory.mktemp("choices")
    config = hf.AutoConfig.from_pretrained(folders / "float")
    torch.manual_seed(1)
    hf.BertForMultipleChoice(config).save_pretrained(root / "float")
    hf.AutoTokenizer.from_pretrained(folders / "float").save_pretrained(root / "float")
    assert cli.main(["binarize", str(root / "float"), str(root / "latent")]) == 0
    assert cli.main(["pack", str(root / "latent"), str(root / "packed")]) == 0
    (root / "texts.txt").write_text("the film is\tgood\tbad and bad\nis the film bad\ta\tthe bad film\tgood and bad\n")
    return root


def test_verify_of_multiple_choice(choices, capsys):
    arguments = ["verify", str(choices / "packed"), str(choices / "latent"), "--texts", str(choices / "texts.txt")]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 2 and found["equal_answers"] == 1 and found["largest_difference"] < 1e-4
    assert cli.main(["verify", str(choices / "packed"), str(choices / "latent"), "--text", "the film\tis"]) == 2
    assert "'the film\\tis' has 1 choices; for multiple choice a text is a question" in capsys.readouterr().err


def test_verify_compares_the_choices_of_transformers(choices, tmp_path, capsys):
    """The largest logit that is reported, by transformers' classes from the strings."""
    model = hf.AutoModelForMultipleChoice.from_pretrained(choices / "latent")
    tokenizer = hf.AutoTokenizer.from_pretrained(choices / "latent")
    tokens = tokenizer(["the film"] * 2, ["good", "bad"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**{name: tensor[None] for name, tensor in tokens.items()}).logits.abs().max().item()
    arguments = [str(choices / "packed"), str(choices / "latent"), "--text", "the film\tgood\tbad", "--json"]
    assert cli.main(["verify", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["largest_output"] == pytest.approx(expected, rel=1e-4)


def test_verify_of_images(folders, tmp_path, capsys):
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(2)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8)
    vit = hf.ViTForImageClassification(hf.ViTConfig(patch_size=4, initializer_range=0.5, **sizes))
    vit.classifier.weight.data.normal_()  # transformers starts it at 0
    vit.save_pretrained(tmp_path / "float")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "float")
    places = {name: str(tmp_path / name) for name in ("float", "latent", "packed")}
    assert cli.main(["binarize", places["float"], places["latent"]]) == 0
    assert cli.main(["pack", places["latent"], places["packed"]]) == 0
    images = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file in images:
        Image.fromarray(torch.randint(256, (9, 11, 3), dtype=torch.uint8).numpy()).save(file)
    capsys.readouterr()
    arguments = ["verify", places["packed"], places["latent"]]
    assert cli.main([*arguments, "--image", *images, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 3 and found["equal_answers"] == 1 and found["largest_difference"] < 1e-4
    processor = hf.AutoImageProcessor.from_pretrained(places["latent"])
    model = hf.AutoModelForImageClassification.from_pretrained(places["latent"])
    with torch.no_grad():
        logits = [model(**processor(images=Image.open(file), return_tensors="pt")).logits for file in images]
    assert found["largest_output"] == pytest.approx(torch.cat(logits).abs().max().item(), rel=1e-4)
    assert cli.main([*arguments, "--text", "a"]) == 2
    assert "ViTForImageClassification looks at images; give some with --image" in capsys.readouterr().err
    assert cli.main([*arguments, "--image", str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
    Path(places["packed"], "preprocessor_config.json").unlink()
    assert cli.main([*arguments, "--image", *images]) == 2
    assert "packed has no image processor" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["binarize", "pack", "unpack", "verify", "info", "bench"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and f"rebnn {command}" in printed and f"\n    rebnn {command}" in printed
