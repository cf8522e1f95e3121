"""Loading through transformers: damaged files, other versions, shards, types, devices, memory, a forgotten import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rebnn_hf import ReBNNConfig, binarize, pack, unpack
from rebnn_hf.config import FORMAT_VERSION
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES, PackedLinear

ROOT = Path(__file__).parents[1]
SIZES = dict(vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36)
IDS = torch.arange(3, 17).reshape(2, 7)
LAYER = "bert.encoder.layer.1.output.dense"  # [20, 36]: rows of 5 bytes, the last one with 4 spare bits


def build():
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(folder, **kwargs):
    return hf.AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    model = binarize(build())
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = pack(binarize(build()))
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to damage."""
    shutil.copytree(packed[1], tmp_path / "copy")
    return tmp_path / "copy"


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # no longer mapped to the file
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


# Damaged files


def test_an_undamaged_copy_loads(packed, folder):
    change_tensors(folder, lambda tensors: None)
    change_config(folder, lambda config: None)
    assert torch.equal(logits(load(folder)), logits(packed[0]))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SafetensorError):
        load(folder)


def set_spare_bit(tensors):
    tensors[f"{LAYER}.weight"][7, -1] |= 0b0001_0000  # bit 4 is the first spare one


def negative_scale(tensors):
    tensors[f"{LAYER}.weight_scale"][3] = -0.5


def nan_scale(tensors):
    tensors[f"{LAYER}.weight_scale"][3] = float("nan")


def infinite_scale(tensors):
    tensors[f"{LAYER}.weight_scale"][3] = float("inf")


def wide_integers(tensors):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].int()


def signed_bytes(tensors):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].view(torch.int8)


def float_bytes(tensors):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].float()


def integer_scale(tensors):
    tensors[f"{LAYER}.weight_scale"] = torch.ones(20, dtype=torch.int32)


NAME = LAYER.replace(".", r"\.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_spare_bit, rf"{NAME}\.weight has spare bits set; the checkpoint was damaged"),
        (negative_scale, rf"{NAME}\.weight_scale must be >= 0; the checkpoint was damaged"),
        (nan_scale, rf"{NAME}\.weight_scale holds NaN or infinity; the checkpoint was damaged"),
        (infinite_scale, rf"{NAME}\.weight_scale holds NaN or infinity; the checkpoint was damaged"),
        (wide_integers, rf"{NAME}\.weight is torch\.int32 in the checkpoint; packed bits are uint8"),
        (signed_bytes, rf"{NAME}\.weight is torch\.int8 in the checkpoint; packed bits are uint8"),
        (float_bytes, rf"{NAME}\.weight is torch\.float32 in the checkpoint; packed bits are uint8"),
        (integer_scale, rf"{NAME}\.weight_scale is torch\.int32 in the checkpoint; expected floating point numbers"),
    ],
)
def test_tampered_values_are_refused(folder, damage, message):
    change_tensors(folder, damage)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("tensor", ["weight", "weight_scale", "bias"])
def test_a_missing_tensor_is_refused(folder, tensor):
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.{tensor}"))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {NAME}\.{tensor}: it was cut, or its config\.json"):
        load(folder)


@pytest.mark.parametrize("tensor", ["weight", "weight_scale", "bias", "balance"])
def test_a_missing_latent_tensor_is_refused(latent, tmp_path, tensor):
    shutil.copytree(latent[1], tmp_path / "copy")
    change_tensors(tmp_path / "copy", lambda tensors: tensors.pop(f"{LAYER}.{tensor}"))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {NAME}\.{tensor}"):
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("tensor", "shape"), [("weight", (20, 4)), ("weight", (20, 36)), ("weight", (19, 5)), ("weight_scale", (19,))]
)
def test_a_wrong_shape_is_refused(folder, tensor, shape):
    def change(tensors):
        key = f"{LAYER}.{tensor}"
        tensors[key] = torch.ones(shape, dtype=tensors[key].dtype)

    change_tensors(folder, change)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {NAME}\.{tensor}"):
        load(folder, ignore_mismatched_sizes=True)


# The config


def test_a_newer_version_is_refused_before_its_fields_look_unknown(folder):
    change_config(folder, lambda config: config.update(format_version=FORMAT_VERSION + 1, invented_later=True))
    with pytest.raises(ValueError, match=r"format_version=3 cannot be read: .* versions 1 to 2\. Upgrade with"):
        load(folder)


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5])
def test_a_senseless_version_is_refused(folder, version):
    change_config(folder, lambda config: config.update(format_version=version))
    with pytest.raises(ValueError, match=r"format_version=.* cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(colour="red"), r"unknown fields in the rebnn config: colour; expected some of .*weight_scale"),
        (dict(state="frozen"), r"state='frozen' is unknown; expected one of 'latent', 'packed'"),
        (dict(weight_scale="guessed"), r"scale='guessed' is unknown; expected one of 'learned', 'mean_abs'"),
        (dict(weight_bits=2), r"weight_bits=2 is not a rebnn config"),
        (dict(converted="encoder"), r"converted must be a list of module names, got 'encoder'"),
        (dict(converted=[]), r"names no converted module; the checkpoint's config\.json was damaged"),
        (
            dict(converted=["encoder.layer.9.output.dense"]),
            r"calls 'bert\.encoder\.layer\.9\.output\.dense' a 1-bit module, but BertForSequence\w+ has none",
        ),
        (
            dict(converted=["encoder.layer.0.output.LayerNorm"]),
            r"calls 'bert\.encoder\.layer\.0\.output\.LayerNorm' a 1-bit module, but .* it is a LayerNorm",
        ),
    ],
)
def test_a_damaged_config_is_refused(folder, change, message):
    change_config(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_config_that_forgets_a_module_is_refused(folder):
    change_config(folder, lambda config: config["converted"].pop())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)


def test_packed_bits_called_latent_are_refused(folder):
    change_config(folder, lambda config: config.update(state="latent"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)


def test_a_float_checkpoint_is_not_packed_on_the_way(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its signs alone are useless without training; use ReBNNConfig\(state='lat"):
        load(tmp_path, quantization_config=ReBNNConfig(state="packed"))


def test_auto_config_reads_the_saved_fields(packed):
    saved = hf.AutoConfig.from_pretrained(packed[1]).quantization_config
    assert ReBNNConfig.from_dict(saved) == packed[0].config.quantization_config
    assert saved["quant_method"] == "rebnn"
    assert saved["format_version"] == FORMAT_VERSION
    assert saved["state"] == "packed"
    assert len(saved["converted"]) == 12


def test_the_checkpoint_wins_over_a_config_given_while_loading(packed):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(packed[1], quantization_config=ReBNNConfig(pooler=True))
    assert loaded.config.quantization_config == packed[0].config.quantization_config


def test_one_config_for_two_models(tmp_path):
    build().save_pretrained(tmp_path)
    config = ReBNNConfig()
    cls = hf.BertForSequenceClassification  # the Auto classes hand over a copy, this one the very object
    first, second = (cls.from_pretrained(tmp_path, quantization_config=config) for _ in range(2))
    pack(first)
    assert second.config.quantization_config.state == "latent"
    assert config == ReBNNConfig()


# A forgotten import

FORGOTTEN = """
import sys, torch, transformers
try:
    transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except ValueError as error:
    print("refused:", error)
else:
    print("loaded")
if "rebnn_hf" in sys.modules:
    print("the package was imported after all")
"""


def run(script, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_import_nothing_random_is_loaded(packed):
    output = run(FORGOTTEN, packed[1])
    assert output.startswith("refused:")
    assert "`pip install rebnn_hf`, and `import rebnn_hf` before loading it" in output
    assert "after all" not in output


def test_the_import_alone_is_enough(packed):
    script = "import rebnn_hf" + FORGOTTEN.split("if ")[0]
    assert run(script, packed[1]) == "loaded\n"


# Memory


class FloatTensorsMade(TorchDispatchMode):
    """Sizes of the float tensors that operations return outside the meta device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.device.type != "meta":
                self.shapes.append(tuple(leaf.shape))
        return result


def test_loading_makes_no_float_copy_of_binary_weights(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode watches its own thread
    with FloatTensorsMade() as watched:
        loaded = load(packed[1])
    shapes = {(m.out_features, m.in_features) for m in loaded.modules() if isinstance(m, PackedLinear)}
    assert shapes == {(20, 20), (36, 20), (20, 36)}
    others = {tuple(p.shape) for p in loaded.parameters()}
    assert (50, 20) in others and (50, 20) in watched.shapes, "the watch sees float tensors that are read"
    # The pooler, [20, 20], is a float layer: read once from the file and moved at most once more.
    assert [s for s in watched.shapes if s in shapes - {(20, 20)}] == []
    pooler = packed[0].bert.pooler.dense.weight.shape
    float_dir = tmp_path / "float"
    unpack(load(packed[1])).save_pretrained(float_dir)
    with FloatTensorsMade() as unpacked:
        load(float_dir)
    squares = [w.shapes.count(tuple(pooler)) for w in (watched, unpacked)]
    assert squares[1] == 9 * squares[0] > 0, "one float square matrix (the pooler) instead of nine"
    assert {(36, 20), (20, 36)} <= set(unpacked.shapes), "the watch would have seen float copies"


def test_a_loaded_model_holds_one_byte_for_eight_weights(packed):
    loaded = load(packed[1])
    for module in loaded.modules():
        if isinstance(module, PackedLinear):
            held = {name: tensor.nbytes for name, tensor in module.state_dict().items()}
            rows, bytes_a_row = module.out_features, -(-module.in_features // 8)
            assert held == {"weight": rows * bytes_a_row, "weight_scale": 4 * rows, "bias": 4 * rows}


# Ways to load


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_shards(request, state, tmp_path):
    model = request.getfixturevalue(state)[0]
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(packed, device_map):
    loaded = load(packed[1], device_map=device_map)
    assert torch.equal(logits(loaded), logits(packed[0]))
    assert len([m for m in loaded.modules() if isinstance(m, PACKED_TYPES)]) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_float_type(packed, dtype):
    loaded = load(packed[1], dtype=dtype)
    for key, tensor in loaded.state_dict().items():
        original = packed[0].state_dict()[key]
        assert tensor.dtype == (torch.uint8 if original.dtype == torch.uint8 else dtype), key
        assert torch.equal(tensor, original.to(tensor.dtype)), key
    # About 20 roundings of relative size eps/2 lie on the path of a logit of size 1, as in test_patching.
    tolerance = max(10 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(logits(loaded).double(), logits(packed[0]).double(), rtol=tolerance, atol=tolerance)


def test_config_object_in_place_of_the_saved_one(packed):
    loaded = load(packed[1], config=packed[0].config)
    assert torch.equal(logits(loaded), logits(packed[0]))
    assert loaded.config.quantization_config is not packed[0].config.quantization_config


def test_a_loaded_packed_model_is_saved_again_as_it_was(packed, tmp_path):
    load(packed[1]).save_pretrained(tmp_path)
    first, second = (load_file(Path(f) / "model.safetensors") for f in (packed[1], tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    configs = [json.loads((Path(f) / "config.json").read_text()) for f in (packed[1], tmp_path)]
    assert configs[0] == configs[1]


def test_a_loaded_latent_model_is_packed(latent, packed, tmp_path):
    model = pack(load(latent[1]))
    assert torch.equal(logits(model), logits(packed[0]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(packed[0]))


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_dequantize_is_unpack(request, state, tmp_path):
    model, saved = request.getfixturevalue(state)
    loaded = load(saved)
    loaded.dequantize()
    expected = unpack(load(saved))
    assert not [m for m in loaded.modules() if isinstance(m, LATENT_TYPES + PACKED_TYPES)]
    assert torch.equal(logits(loaded), logits(expected))
    # scale * (x b^T) against x (scale * b)^T
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(expected))
    loaded.half()  # refused for models that count as quantized


def test_transformers_is_told_that_latent_weights_train(latent):
    loaded = load(latent[1])
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_qat_trainable
    assert loaded.hf_quantizer.is_serializable()


def test_the_plain_trainer_scores_packed_models(packed, tmp_path):
    """It refuses, at once and for whatever purpose, models whose quantizer denies that they train."""
    ids = torch.arange(1, 41).reshape(8, 5)
    loaded = load(packed[1])
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    found = hf.Trainer(model=loaded, args=arguments).predict([{"input_ids": row} for row in ids]).predictions
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), loaded(input_ids=ids).logits)
