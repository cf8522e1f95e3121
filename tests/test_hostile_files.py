"""Hostile checkpoints: damaged at random and on purpose, they are refused in words, and reading one runs and fetches
nothing."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from fuzz.checkpoint import NAMES, Checkpoint
from fuzz.damage import CONFIG, TENSORS, damage, joined, parts_of, replaced
from fuzz.verdict import BadEnd, end_of, refusal
from hypothesis import HealthCheck, given, settings, strategies as st

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.packing import has_clean_padding, pack_signs, packed_width, unpack_signs

ROOT = Path(__file__).parents[1]
SCALE = "bert.encoder.layer.0.output.dense.weight_scale"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return {name: Checkpoint(name, folder) for name in NAMES}


@pytest.fixture
def golden(checkpoints):
    """A good checkpoint of a fully binary BERT, whole again after each test."""
    golden = checkpoints["golden_v2"]
    yield golden
    golden.write(golden.config, golden.tensors)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers writes a page about each file that does not fit."""
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity(hf.logging.CRITICAL)
    hf.logging.disable_progress_bar()
    yield
    hf.logging.set_verbosity(before)
    hf.logging.enable_progress_bar()


# Damage at random


@pytest.mark.parametrize("name", NAMES)
def test_good_ones_load(checkpoints, name):
    good = checkpoints[name]
    good.write(good.config, good.tensors)
    assert end_of(good) == "loaded"


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choices=st.randoms(use_true_random=False), name=st.sampled_from(NAMES))
def test_what_is_damaged_is_refused_in_words_or_loaded_as_it_is(checkpoints, choices, name):
    good = checkpoints[name]
    good.write(*damage(choices, good.config, good.tensors)[1])
    end_of(good)  # raises what may not be


@pytest.mark.parametrize("kind", [*CONFIG, *TENSORS])
def test_every_kind_of_damage(checkpoints, kind):
    """Some of each kind are refused, or there would be nothing to see; and none ends badly."""
    good, refused = checkpoints["one_layer"], 0
    for seed in range(12):
        choices = random.Random(f"{kind} {seed}")
        if kind in CONFIG:
            good.write(CONFIG[kind](choices, good.config), good.tensors)
        else:
            good.write(good.config, TENSORS[kind](choices, good.tensors))
        refused += "loaded" not in end_of(good)
    assert refused


def test_the_fuzzer_sees_what_is_wrong(golden, monkeypatch):
    """Without a check of the package the same damage is a bad end: the test could fail."""
    header, data = parts_of(golden.tensors)
    norm = header["bert.encoder.layer.0.output.LayerNorm.weight"]
    header["x"] = header.pop("bert.encoder.layer.0.output.LayerNorm.weight")
    golden.write(golden.config, joined(header, data))
    assert end_of(golden) == "ValueError by rebnn_hf"
    monkeypatch.setattr("rebnn_hf.integrations.transformers._check_blocks", lambda model: None)
    with pytest.raises(BadEnd, match=r"LayerNorm\.weight is not in the file, and the model has one"):
        end_of(golden)
    assert norm["dtype"] == "F32"
    with pytest.raises(BadEnd, match="KeyError"):
        try:
            {}["x"]
        except KeyError as error:
            refusal(error)


# The config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation_bits=1.0), "activation_bits=1.0 must be an integer or None"),
        (dict(activation_bits=True), "activation_bits=True must be an integer or None"),
        (dict(weight_bits=True), "weight_bits=True must be an integer"),
        (dict(weight_bits=1.0), "weight_bits=1.0 must be an integer"),
        (dict(format_version=True), "format_version=True cannot be read"),
        (dict(balance_value="2e-4"), "balance_value='2e-4' must be a number"),
        (dict(balance_value=10**400), r"balance_value=10000.*\.\.\..*0000 must be a number"),
        (dict(balance_value=float("nan")), "value=nan must be a finite number >= 0"),
        (dict(center_gradient=1), "center_gradient=1 must be True or False"),
        (dict(word_embeddings="no"), "word_embeddings='no' must be True or False"),
        (dict(activation=["elastic"]), r"activation=\['elastic'\] is unknown; expected one of 'none', 'sign'"),
        (dict(state={"packed": 1}), r"state=\{'packed': 1\} is unknown; expected one of 'latent', 'packed'"),
        (dict(converted=["a", 1]), r"converted must be a list of module names, got \['a', 1\]"),
        (dict(converted=None), "converted must be a list of module names, got None"),
        (dict(converted=[[["deep"] * 9] * 9] * 9), r"converted must be a list of module names, got \[\[\["),
        (dict(converted=["encoder.layer.0.output.dense"] * 2), "converted names a module twice"),
        (dict(modules_to_not_convert="pooler"), "modules_to_not_convert must be a list of module names, got 'pooler'"),
    ],
)
def test_fields_of_another_type_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ReBNNConfig.from_dict({"quant_method": "rebnn", "format_version": 2, **change})


def test_messages_stay_short_whatever_the_file_holds():
    for config in (
        {"x" * 10**6: 1},
        {str(i): i for i in range(10**5)},
        {"state": "x" * 10**6},
        {"converted": ["x"] * 10**5},
    ):
        with pytest.raises(ValueError) as caught:
            ReBNNConfig.from_dict(config)
        assert len(str(caught.value)) < 2000


def change_config(golden, **changes):
    config = json.loads(golden.config)
    for name, value in changes.items():
        place = config["quantization_config"] if name in config["quantization_config"] else config
        place[name] = value
    golden.write(json.dumps(config).encode(), golden.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(converted_attention=["encoder.layer.7.attention.self"]),
            r"attention='elastic' and converted_attention with 'encoder\.layer\.7\.attention\.self', which Bert",
        ),
        (
            dict(converted_attention=["encoder.layer.0.attention"]),
            "converted_attention with 'encoder.layer.0.attention'",
        ),
        (dict(converted_ffn=["encoder.layer.0.output"]), r"ffn_activation='relu' and converted_ffn with 'encoder\.la"),
        (dict(attention="softmax"), r"attention='softmax' and converted_attention with 'encoder\.layer\.0\.attention"),
        (dict(ffn_activation="model"), "ffn_activation='model' and converted_ffn with"),
        (dict(converted_head=["bert.encoder.layer.0.output.dense"]), "a module of the base model one of the head too"),
        (dict(converted=["../../../etc/passwd"]), r"calls 'bert\.\.\./\.\./\.\./etc/passwd' a 1-bit module, but Bert"),
        (dict(converted=["__class__"]), r"calls 'bert\.__class__' a 1-bit module, but BertFor"),
    ],
)
def test_names_that_do_not_fit_the_architecture_are_refused(golden, change, message):
    change_config(golden, **change)
    with pytest.raises(ValueError, match=message):
        golden.load()


def test_bits_of_embeddings_are_not_tied_to_a_decoder(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12)
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, max_position_embeddings=8))
    config = ReBNNConfig(word_embeddings=True, untie_embeddings=True)
    rebnn_hf.pack(rebnn_hf.binarize(model, config)).save_pretrained(tmp_path)
    hf.BertForMaskedLM.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"calls 'bert\.embeddings\.word_embeddings\.weight' 1-bit, and has tie_word"):
        hf.BertForMaskedLM.from_pretrained(tmp_path)


# The tensors


def change_tensor(golden, name, dtype, data):
    header, old = parts_of(golden.tensors)
    new = replaced(header, old, name, data, {"dtype": dtype, "shape": header[name]["shape"]})
    golden.write(golden.config, joined(header, new))


INPUT_SCALE = "bert.encoder.layer.0.output.dense.input_binarizer.scale"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"


@pytest.mark.parametrize(
    ("name", "dtype", "data", "message"),
    [
        (
            NORM,
            "I64",
            struct.pack("<12q", *range(12)),
            r"LayerNorm\.weight is torch\.int64 in the checkpoint; expected fl",
        ),
        (NORM, "BOOL", bytes(12), r"LayerNorm\.weight is torch\.bool in the checkpoint; expected floating"),
        ("classifier.bias", "I32", bytes(12), r"classifier\.bias is torch\.int32 in the checkpoint"),
        (
            "bert.embeddings.word_embeddings.weight",
            "F8_E4M3",
            bytes(38),
            r"is torch\.float8_e4m3fn in the checkpoint; pa",
        ),
        (SCALE, "F64", struct.pack("<12d", *[1e300] * 12), r"weight_scale holds NaN or infinity"),
        (SCALE, "F32", struct.pack("<12f", *[float("nan")] * 12), r"weight_scale holds NaN or infinity"),
        (SCALE, "F32", struct.pack("<12f", *[-1.0] * 12), r"weight_scale must be >= 0"),
        (INPUT_SCALE, "F32", bytes(4), r"input_binarizer\.scale is 0, and a packed model has scales"),
    ],
)
def test_tensors_of_another_kind_are_refused(golden, name, dtype, data, message):
    change_tensor(golden, name, dtype, data)
    with pytest.raises(ValueError, match=message):
        golden.load()


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.output.dense.bias",
        "bert.encoder.layer.0.output.dense.input_binarizer.scale",
        "bert.encoder.layer.0.output.dense.input_binarizer.shift",
        "bert.encoder.layer.0.attention.self.binary_attention.query.scale",
    ],
)
def test_nan_anywhere_in_a_1bit_layer_is_refused(golden, name):
    elements = parts_of(golden.tensors)[0][name]["shape"][0]
    change_tensor(golden, name, "F32", struct.pack(f"<{elements}f", *[float("nan")] * elements))
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity; the checkpoint was damaged"):
        golden.load()


def test_memory_is_bounded_by_the_file_not_by_what_it_declares(golden, tmp_path):
    """In a process that can have little more memory than it needs for a good file."""
    script = """
import resource, sys, transformers as hf, rebnn_hf
hf.BertForSequenceClassification.from_pretrained(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for folder in sys.argv[2:]:
    try:
        hf.BertForSequenceClassification.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__)
"""
    folders = []
    for number, (shape, offsets) in enumerate(
        [([2**40], [0, 2**42]), ([2**31, 2**31], [0, 48]), ([2**62], [0, 2**64]), ([10**9, 10**9], [0, 4 * 10**18])]
    ):
        header, data = parts_of(golden.tensors)
        header[SCALE] |= {"shape": shape, "data_offsets": offsets}
        golden.write(golden.config, joined(header, data))
        folders.append(shutil.copytree(golden.folder, tmp_path / str(number)))
    golden.write(golden.config, struct.pack("<Q", 2**40) + golden.tensors[8:])
    folders.append(shutil.copytree(golden.folder, tmp_path / "header"))
    golden.write(golden.config, golden.tensors)
    output = run(script, golden.folder, *folders)
    assert output.split() == ["SafetensorError"] * 5


# Files


def run(script, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shards_outside_of_the_folder_are_not_read(golden, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    shutil.copytree(golden.folder, inside)
    outside.mkdir()
    os.replace(inside / "model.safetensors", outside / "secret.safetensors")
    names = [name for name in parts_of(golden.tensors)[0] if name != "__metadata__"]
    for shard in ("../outside/secret.safetensors", str(outside / "secret.safetensors")):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        (inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"names .*secret\.safetensors, which lies outside; it was tampered with"):
            hf.AutoModelForSequenceClassification.from_pretrained(inside)
    os.symlink(outside / "secret.safetensors", inside / "shard.safetensors")  # as the cache of the Hub does
    index["weight_map"] = dict.fromkeys(names, "shard.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    hf.AutoModelForSequenceClassification.from_pretrained(inside)


class Trap:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return (open, (str(Path(os.environ["TRAP"])), "w"))


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_pickle_is_never_read(golden, tmp_path, monkeypatch, weights_only):
    """Not even where the user allowed transformers to: no packed checkpoint has one."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = shutil.copytree(golden.folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file; rebnn checkpoints are"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder, weights_only=weights_only)
    assert not (tmp_path / "sprung").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)["x"].close()
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_code_beside_a_checkpoint_is_not_run(golden, tmp_path):
    folder = shutil.copytree(golden.folder, tmp_path / "copy")
    config = json.loads(golden.config)
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is hf.BertForSequenceClassification
    assert not (tmp_path / "sprung").exists()


OFFLINE = """
import socket, sys
def refuse(*arguments, **keywords):
    raise SystemExit(f"connects to {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import transformers as hf, rebnn_hf
model = hf.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
rebnn_hf.summary(model)
model.save_pretrained(sys.argv[2])
print("done")
"""


def test_nothing_is_fetched(golden, tmp_path):
    """With the network allowed, unlike in the other tests."""
    assert run(OFFLINE, golden.folder, tmp_path, HF_HUB_OFFLINE="0").splitlines()[-1] == "done"


# Bits


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 5), width=st.integers(0, 70), other=st.integers(0, 70), data=st.data())
def test_rows_of_any_bytes_are_unpacked_or_refused(rows, width, other, data):
    size = packed_width(width)
    content = data.draw(st.binary(min_size=rows * size, max_size=rows * size))
    bits = torch.tensor(list(content), dtype=torch.uint8).reshape(rows, size)
    if packed_width(other) != packed_width(width):
        with pytest.raises(ValueError, match=rf"rows of {other} signs take {packed_width(other)} bytes"):
            unpack_signs(bits, other)
        return
    signs = unpack_signs(bits, other)
    assert signs.shape == (rows, other)
    by_hand = [[1.0 if row[j // 8] >> j % 8 & 1 else -1.0 for j in range(other)] for row in bits.tolist()]
    assert signs.tolist() == by_hand
    if has_clean_padding(bits, other):
        assert torch.equal(pack_signs(signs), bits)
