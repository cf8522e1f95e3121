"""The format cannot drift: a checkpoint written once, read by transformers, by plain Python and by docs/format.md."""

import dataclasses
import importlib.util
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import python_blocks, text
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rebnn_hf import ReBNNConfig
from rebnn_hf.config import FORMAT_VERSION
from rebnn_hf.layers import PACKED_TYPES

TESTS = Path(__file__).parent
FORMAT = text("format.md")
BLOCK = "bert.encoder.layer.0"
WIDTHS = {  # module: signs in a row
    "bert.embeddings.word_embeddings": 12,
    f"{BLOCK}.attention.self.query": 12,
    f"{BLOCK}.attention.self.key": 12,
    f"{BLOCK}.attention.self.value": 12,
    f"{BLOCK}.attention.output.dense": 12,
    f"{BLOCK}.intermediate.dense": 12,
    f"{BLOCK}.output.dense": 20,
}


@pytest.fixture(scope="module", params=["golden_v1", "golden_v2"])
def folder(request):
    return TESTS / "data" / request.param


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_golden", TESTS / "data" / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def latent(maker, folder):
    """Latent weights and scales by formula, before any packing."""
    return {name: tensor.detach() for name, tensor in maker.latent_model(folder.name).state_dict().items()}


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def raw(folder):
    """Tensors of the file as (type, shape, bytes), read without safetensors."""
    blob = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__")
    data = blob[8 + size :]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def signs_by_hand(row, width):
    """Signs of a packed row, by the words of docs/format.md: bit j % 8 of byte j // 8, set means +1."""
    return [1.0 if row[j // 8] // 2 ** (j % 8) % 2 else -1.0 for j in range(width)]


def test_loads_with_the_stored_logits(folder, expected):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert {n for n, m in model.named_modules() if isinstance(m, PACKED_TYPES)} == set(WIDTHS)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(expected["input_ids"])).logits
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-6)
    spread = torch.tensor(expected["logits"]).std(0)
    assert (spread > 0.01).all(), "logits that depend on the input"


def test_loaded_bits_are_the_stored_bytes(folder, expected, raw):
    state = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert expected["bits"].keys() == {f"{module}.weight" for module in WIDTHS}
    for name, bits in expected["bits"].items():
        assert state[name].numpy().tobytes().hex() == bits
        assert raw[name][2].hex() == bits


def test_file_decoded_by_hand_holds_the_signs_and_scales_of_the_formula(raw, latent):
    assert sum((latent[f"{module}.weight"] == 0).sum() for module in WIDTHS) > 9, "zeros, whose sign is +1"
    for module, width in WIDTHS.items():
        kind, (rows, in_a_row), data = raw[f"{module}.weight"]
        assert (kind, in_a_row, len(data)) == ("U8", (width + 7) // 8, rows * ((width + 7) // 8))
        weight = latent[f"{module}.weight"]
        assert weight.shape == (rows, width)
        for i in range(rows):
            row = data[i * in_a_row : (i + 1) * in_a_row]
            assert signs_by_hand(row, width) == [1.0 if w >= 0 else -1.0 for w in weight[i].tolist()]
            assert row[-1] < 2 ** (width % 8), "spare bits are zero"
        kind, shape, data = raw[f"{module}.weight_scale"]
        assert (kind, shape) == ("F32", [rows])
        assert list(struct.unpack(f"<{rows}f", data)) == latent[f"{module}.weight_scale"].tolist()


def test_what_stays_float_is_stored_unchanged(raw, latent):
    for name, (kind, shape, data) in raw.items():
        if name.rpartition(".")[0] in WIDTHS and not name.endswith("bias"):
            continue
        assert (kind, shape) == ("F32", list(latent[name].shape)), name
        assert list(struct.unpack(f"<{len(data) // 4}f", data)) == latent[name].flatten().tolist(), name
    assert raw.keys() == {name for name in latent if not name.endswith("balance")}


def test_the_same_model_is_written_the_same_way_today(maker, folder, tmp_path, expected):
    maker.main(tmp_path / folder.name)
    written = load_file(tmp_path / folder.name / "model.safetensors")
    golden = load_file(folder / "model.safetensors")
    assert written.keys() == golden.keys()
    for name, tensor in written.items():
        assert tensor.dtype == golden[name].dtype and torch.equal(tensor, golden[name]), name
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / folder.name, folder)]
    ours, theirs = (config["quantization_config"] for config in configs)
    assert folder.name == f"golden_v{theirs.pop('format_version')}" and ours["format_version"] == FORMAT_VERSION
    assert {name: ours[name] for name in theirs} == theirs
    assert [config["tie_word_embeddings"] for config in configs] == [False, False]
    assert json.loads((tmp_path / folder.name / "expected.json").read_text())["bits"] == expected["bits"]


# docs/format.md


def test_the_reader_in_the_specification_reads_the_golden_file(folder, latent):
    (code,) = python_blocks("format.md")
    scope = {}
    exec(code, scope)
    for module, width in WIDTHS.items():
        signs = np.where(latent[f"{module}.weight"].numpy() >= 0, 1.0, -1.0)
        weights = scope["binary_weights"](folder, module, width)
        np.testing.assert_array_equal(weights, signs * latent[f"{module}.weight_scale"].numpy()[:, None])
    with pytest.raises(ValueError, match="does not hold rows of 11 signs"):
        scope["binary_weights"](folder, f"{BLOCK}.output.dense", 11)
    with pytest.raises(ValueError, match="does not hold rows of 19 signs"):  # one set bit beyond the 19th
        scope["binary_weights"](folder, f"{BLOCK}.output.dense", 19)


def test_the_example_in_the_specification():
    shown, first, second = re.search(r"signs `([-+ |]+)` are the bytes `(0x\w\w) (0x\w\w)`", FORMAT).groups()
    signs = [1.0 if char == "+" else -1.0 for char in shown if char in "+-"]
    assert len(signs) == 10
    assert signs_by_hand([int(first, 16), int(second, 16)], 10) == signs


def test_the_specification_names_every_field_of_the_config():
    for field in dataclasses.fields(ReBNNConfig):
        assert f"`{field.name}`" in FORMAT, field.name
    newest = TESTS / "data" / f"golden_v{FORMAT_VERSION}"
    saved = json.loads((newest / "config.json").read_text())["quantization_config"]
    assert saved.keys() == {field.name for field in dataclasses.fields(ReBNNConfig)}
