"""Summary and size accounting: worked counts of BERT-base, agreement with files, the printed table."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification as DistilBert,
)

import rebnn_hf
from rebnn_hf import ReBNNConfig, binarize, calibrate, pack, summary, unpack
from rebnn_hf.patching import prepare_for_loading, select_for_loading
from rebnn_hf.report import packed_size

ALL = {"word_embeddings": True, "pooler": True}
PARAMETERS, BINARY = 109_482_240, 108_965_376  # of BERT-base without a head; word embeddings and pooler 1-bit
HONEST = 16_151_216  # bytes of BERT-base with a head of two classes and all floats in fp32 (oracle E1)
HEAD = 768 * 2 + 2


def bert(model_class=BertForSequenceClassification, **changes):
    """Small model with widths that do not fill their last byte, and three blocks."""
    torch.manual_seed(0)
    shape = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 50, "max_position_embeddings": 20}
    return model_class(BertConfig(**shape | changes))


def bert_base_on_meta(state, preset="rebnn-w1a32"):
    config = ReBNNConfig.preset(preset, **ALL)
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    select_for_loading(model, config)
    config.state = state
    prepare_for_loading(model, config)
    model.config.quantization_config = config
    return model


def file_bytes(model, folder):
    """Bytes of the tensors that save_pretrained writes, without headers."""
    model.save_pretrained(folder)
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def notes(model):
    return {row.name: row.note for row in summary(model).rows}


# BERT-base (oracle E1)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_counts_of_bert_base(state):
    totals = summary(bert_base_on_meta(state)).totals
    assert totals["parameters"] == PARAMETERS + HEAD
    assert totals["binary_parameters"] == BINARY
    assert totals["binary_share"] == BINARY / (PARAMETERS + HEAD)
    assert totals["bytes_packed"] == HONEST
    assert totals["bytes_float32"] == 4 * (PARAMETERS + HEAD)
    assert totals["ratio"] == pytest.approx(27.1, abs=0.05)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_parts_of_bert_base(state):
    scales = 30522 + 12 * (4 * 768 + 3072 + 768) + 768
    expected = {
        "word_embeddings": 30522 * 768 // 8,
        "encoder": 84_934_656 // 8,
        "pooler": 768 * 768 // 8,
        "scales": 4 * scales,
        "activations": 0,
        "other_embeddings": 4 * (512 + 2) * 768,
        "biases": 4 * (82_944 + 768),
        "norms": 4 * 25 * 2 * 768,
        "head": 4 * HEAD,
        "other": 0,
        "total": HONEST,
    }
    model = bert_base_on_meta(state)
    assert packed_size(model) == expected
    bits = ("word_embeddings", "encoder", "pooler")
    halved = {part: size if part in bits else size // 2 for part, size in expected.items() if part != "total"}
    assert packed_size(model, torch.float16) == halved | {"total": sum(halved.values())}


INPUTS = 12 * (5 * 768 + 3072) + 768  # features of the inputs of all 1-bit linear layers of BERT-base
ACTIVATIONS = {  # preset -> values that its activations add
    "rebnn-bibert-w1a1": 0,
    "rebnn-bit-w1a1": (6 * 12 + 1) + INPUTS + 4 * 12,
    "rebnn-bit-w1a4": (6 * 12 + 1) + INPUTS + 4 * 12,
    "reactnet": INPUTS + 3 * 12 * 3072,
}


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("preset", ACTIVATIONS)
def test_activations_of_bert_base(preset, state):
    model = bert_base_on_meta(state, preset)
    added, scales = ACTIVATIONS[preset], 114_234
    sizes = packed_size(model)
    assert sizes["activations"] == 4 * added
    assert sizes["scales"] == 4 * scales
    assert sizes["total"] == HONEST + 4 * added
    assert packed_size(model, torch.float16)["activations"] == 2 * added
    totals = summary(model).totals
    assert totals["parameters"] == PARAMETERS + HEAD  # those of the float model
    assert totals["added_parameters"] == scales + added
    assert totals["bytes_packed"] == HONEST + 4 * added
    assert totals["ratio"] == 4 * (PARAMETERS + HEAD) / (HONEST + 4 * added)


def test_activations_of_bit_are_those_that_were_published():
    assert ACTIVATIONS["rebnn-bit-w1a1"] == 121 + 83_712  # scales, shifts that have an effect
    scales_of_bit = 30_522 + 73  # of the embeddings one per row, else one per matrix
    mebibytes = (HONEST + 4 * (scales_of_bit - 114_234 + ACTIVATIONS["rebnn-bit-w1a1"])) / 2**20
    assert round(mebibytes, 3) == 15.404


@pytest.mark.slow
def test_bert_base_on_disk_fits_its_budget(tmp_path):
    model = BertForSequenceClassification(BertConfig(num_labels=2))
    pack(binarize(model, ReBNNConfig(**ALL)))
    for dtype, budget in ((torch.float32, 16_300_000), (torch.float16, 15_000_000)):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        (file,) = folder.glob("*.safetensors")
        assert file.stat().st_size <= budget
        assert packed_size(model, dtype)["total"] < file.stat().st_size


# Agreement with files and memory


CONFIGS = {
    "default": {},
    "all": ALL | {"head": True},
    "tensor": ALL | {"scale_granularity": "tensor"},
    "closed form": ALL | {"weight_scale": "mean_abs"},
    "listed": {"modules_to_not_convert": ["layer.1.attention"]},
    "elastic": ReBNNConfig.preset("rebnn-bit-w1a2", **ALL, head=True).method(),
    "shifted signs": ReBNNConfig.preset("reactnet", **ALL).method(),
    "signs": ReBNNConfig.preset("bibert").method(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("choices", CONFIGS.values(), ids=CONFIGS)
def test_packed_size_is_that_of_the_file(tmp_path, choices, dtype):
    model = binarize(bert(), ReBNNConfig(**choices))
    foreseen = packed_size(model, dtype)
    calibrate(model, {"input_ids": torch.arange(8)[None]})
    pack(model, dtype)
    assert packed_size(model, dtype) == foreseen
    assert foreseen["total"] == file_bytes(model, tmp_path)
    assert summary(model).totals["bytes_packed"] == foreseen["total"]


@pytest.mark.parametrize("preset", ["rebnn-w1a32", "bwn-w1a32", "rebnn-bit-w1a1", "reactnet"])
def test_summary_foresees_the_packed_bytes_of_each_module(preset):
    model = binarize(bert(), ReBNNConfig.preset(preset, **ALL))
    calibrate(model, {"input_ids": torch.arange(8)[None]})
    latent = {row.name: row for row in summary(model).rows}
    packed = {row.name: row for row in summary(pack(model)).rows}
    assert latent.keys() == packed.keys()
    for name, row in latent.items():
        for column in ("parameters", "added", "binary", "bits", "activation_bits"):
            assert getattr(row, column) == getattr(packed[name], column)
        assert row.bytes_packed == packed[name].bytes_packed


@pytest.mark.parametrize("state", ["float", "latent", "packed", "unpacked"])
def test_bytes_now_are_those_in_memory(state):
    model = bert()
    parameters = sum(p.numel() for p in model.parameters())
    if state != "float":
        binarize(model, ReBNNConfig(**ALL))
    if state == "packed":
        pack(model)
    if state == "unpacked":
        unpack(model)
    totals = summary(model).totals
    tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert totals["bytes_now"] == sum(tensors.values())
    assert totals["parameters"] == parameters
    assert (totals["binary_parameters"] > 0) == (state in ("latent", "packed"))


def test_float_model_keeps_its_size(tmp_path):
    model = bert()
    totals = summary(model).totals
    assert totals["bytes_packed"] == file_bytes(model, tmp_path) == packed_size(model)["total"]
    assert totals["ratio"] == 1
    assert packed_size(model)["scales"] == 0


def test_tied_parameters_count_once(tmp_path):
    model = bert(BertForMaskedLM)
    result = summary(model)
    assert result.totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert "weight tied to bert.embeddings.word_embeddings" in notes(model)["cls.predictions.decoder"]
    assert result.totals["bytes_packed"] == file_bytes(model, tmp_path)


def test_other_architectures(tmp_path):
    shape = {"vocab_size": 101, "dim": 36, "n_layers": 2, "n_heads": 2, "hidden_dim": 50, "max_position_embeddings": 20}
    model = binarize(DistilBert(DistilBertConfig(**shape)), ReBNNConfig(word_embeddings=True))
    sizes = packed_size(model)
    assert sizes["total"] == file_bytes(pack(model), tmp_path)
    assert sizes["other"] == 0
    assert sizes["head"] == 4 * (36 * 36 + 36 + 2 * 36 + 2)


def test_modules_outside_transformers():
    model = torch.nn.Sequential(torch.nn.Linear(9, 4), rebnn_hf.BinaryLinear(4, 3), torch.nn.BatchNorm1d(3))
    totals = summary(model).totals
    assert totals["parameters"] == 9 * 4 + 4 + 4 * 3 + 3 + 6
    assert totals["added_parameters"] == 3
    assert totals["bytes_packed"] == 4 * (9 * 4 + 4) + 3 * (1 + 4 + 4) + 4 * 12 + 8


# Notes and table


def test_notes_say_why_a_module_is_float():
    choices = {"modules_to_not_convert": ["layer.1.attention"]}
    found = notes(binarize(bert(), ReBNNConfig(**choices)))
    assert found["bert.encoder.layer.0.output.dense"] == "latent: 32 while training, 1 packed; bias float"
    assert found["bert.encoder.layer.1.attention.self.query"] == "float: listed in modules_to_not_convert"
    assert found["bert.encoder.layer.0.output.LayerNorm"] == "float: norm"
    assert found["bert.embeddings.word_embeddings"] == "float: word embeddings (word_embeddings=False)"
    assert found["bert.embeddings.position_embeddings"] == "float: embedding"
    assert found["bert.pooler.dense"] == "float: pooler (pooler=False)"
    assert found["classifier"] == "float: head (head=False)"
    assert set(notes(bert()).values()) == {"float model", "buffers"}


def test_notes_of_listed_switches():
    listed = ["pooler", "classifier", "word_embeddings"]
    found = notes(binarize(bert(), ReBNNConfig(**ALL, head=True, modules_to_not_convert=listed)))
    for name in ("bert.pooler.dense", "classifier", "bert.embeddings.word_embeddings"):
        assert found[name] == "float: listed in modules_to_not_convert"


def test_notes_say_what_scales_and_shifts_belong_to():
    found = notes(binarize(bert(), ReBNNConfig.preset("rebnn-bit-w1a4", **ALL, head=True)))
    block = "bert.encoder.layer.2"
    for name in (f"{block}.attention.self.key", f"{block}.output.dense", "bert.pooler.dense", "classifier"):
        assert found[name] == "latent: 32 while training, 1 packed; bias float"
        assert found[f"{name}.input_binarizer"] == "scale and shift of 4-bit inputs"
    for name in ("query", "key", "value", "probabilities"):
        assert found[f"{block}.attention.self.binary_attention.{name}"] == "scale of 4-bit attention"
    assert found["bert.embeddings.position_embeddings"] == "float: embedding"
    assert found[f"{block}.output.LayerNorm"] == "float: norm"
    found = notes(binarize(bert(), ReBNNConfig.preset("reactnet")))
    assert found[f"{block}.intermediate.dense.input_binarizer"] == "shift of 1-bit inputs"
    assert found[f"{block}.intermediate.intermediate_act_fn"] == "shifts and slopes of RPReLU"


@pytest.mark.parametrize(
    "choices, inputs",
    [
        ({}, 32),
        ({"activation": "sign"}, 1),
        ({"activation": "rsign"}, 1),
        ({"activation": "elastic", "activation_bits": 4}, 4),
        ({"activation": "token"}, 8),
    ],
)
def test_bits_of_weights_and_inputs(choices, inputs):
    model = binarize(bert(), ReBNNConfig(**choices, word_embeddings=True))
    bits = {row.name: (row.bits, row.activation_bits) for row in summary(model).rows}
    assert bits["bert.encoder.layer.0.attention.self.query"] == (1, inputs)
    assert bits["bert.pooler.dense"] == bits["classifier"] == (32, 32)
    assert bits["bert.embeddings.word_embeddings"] == (1, None)
    assert bits["bert.embeddings.position_embeddings"] == bits["bert.embeddings.LayerNorm"] == (32, None)
    lines = {line.split()[0]: line.split() for line in str(summary(model)).splitlines()}
    assert lines["bert.encoder.layer.0-2.attention.self.query"][4] == f"1/{inputs}"
    assert lines["classifier"][4] == "32/32"
    assert lines["bert.embeddings.word_embeddings"][4] == "1"


def test_bits_of_half_precision():
    model = pack(binarize(bert()), torch.float16)
    bits = {row.name: (row.bits, row.activation_bits) for row in summary(model).rows}
    assert bits["bert.encoder.layer.0.attention.self.query"] == (1, 16)
    assert bits["classifier"] == (16, 16)


def test_packed_modules_are_marked():
    found = notes(pack(binarize(bert(), ReBNNConfig(**ALL))))
    assert found["bert.embeddings.word_embeddings"] == "packed"
    assert found["bert.pooler.dense"] == "packed; bias float"


def test_table_groups_equal_blocks():
    text = str(summary(binarize(bert())))
    assert "bert.encoder.layer.0-2.attention.self.query" in text
    assert len(text.splitlines()) == 1 + 15 + 2
    query = next(line for line in text.splitlines() if "self.query" in line)
    now = 4 * 3 * (36 * 36 + 36 + 2 * 36)  # weight, bias, scale and balance of three blocks
    packed = 3 * 36 * (5 + 4 + 4)
    values, added = f"{3 * (36 * 36 + 36):,}", f"{3 * 36}"
    assert query.split()[1:7] == ["BinaryLinear", values, added, "1/32", f"{now:,}", f"{packed:,}"]
    totals = summary(binarize(bert())).totals
    assert f"{totals['parameters']:,} parameters" in text
    assert f"{3 * (5 * 36 + 50):,} added (scales, shifts, slopes)" in text
    assert f"{totals['ratio']:.1f} x smaller than float32" in text


def test_table_with_few_bit_activations():
    text = str(summary(binarize(bert(), ReBNNConfig.preset("rebnn-bit-w1a1"))))
    assert len(text.splitlines()) == 1 + 15 + 6 + 4 + 2
    shifts = next(line for line in text.splitlines() if "0-2.output.dense.input_binarizer" in line)
    size = f"{4 * 3 * 51}"
    assert shifts.split(maxsplit=7)[1:] == ["Elastic", "0", "153", "32", size, size, "scale and shift of 1-bit inputs"]
    assert "bert.encoder.layer.0-2.attention.self.binary_attention.probabilities " in text


def test_table_names_blocks_that_differ():
    config = ReBNNConfig(modules_to_not_convert=["layer.1.attention"])
    text = str(summary(binarize(bert(), config)))
    assert "bert.encoder.layer.0,2.attention.self.query " in text
    assert "bert.encoder.layer.1.attention.self.query " in text


def test_to_dict_is_json():
    result = summary(binarize(bert()))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["totals"] == result.totals
    assert len(data["rows"]) == len(result.rows)
    assert sum(row["parameters"] for row in data["rows"]) == result.totals["parameters"]


def test_errors():
    with pytest.raises(TypeError, match="expects a model"):
        summary("model")
    with pytest.raises(TypeError, match="not floating point"):
        packed_size(bert(), torch.int8)
