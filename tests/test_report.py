"""Summary and size accounting: worked counts of BERT-base, agreement with files, the printed table."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, DistilBertConfig
from transformers import DistilBertForSequenceClassification as DistilBert

import rebnn_hf
from rebnn_hf import ReBNNConfig, binarize, pack, summary, unpack
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


def bert_base_on_meta(state):
    config = ReBNNConfig(**ALL)
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
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("choices", CONFIGS.values(), ids=CONFIGS)
def test_packed_size_is_that_of_the_file(tmp_path, choices, dtype):
    model = binarize(bert(), ReBNNConfig(**choices))
    foreseen = packed_size(model, dtype)
    pack(model, dtype)
    assert packed_size(model, dtype) == foreseen
    assert foreseen["total"] == file_bytes(model, tmp_path)
    assert summary(model).totals["bytes_packed"] == foreseen["total"]


def test_summary_foresees_the_packed_bytes_of_each_module():
    model = binarize(bert(), ReBNNConfig(**ALL))
    latent = {row.name: row for row in summary(model).rows}
    packed = {row.name: row for row in summary(pack(model)).rows}
    assert latent.keys() == packed.keys()
    for name, row in latent.items():
        assert (row.parameters, row.binary, row.bits) == (
            packed[name].parameters,
            packed[name].binary,
            packed[name].bits,
        )
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
    assert totals["bytes_packed"] == 4 * (9 * 4 + 4) + 3 * (1 + 4 + 4) + 4 * 12 + 8


# Notes and table


def test_notes_say_why_a_module_is_float():
    choices = {"modules_to_not_convert": ["layer.1.attention"]}
    found = notes(binarize(bert(), ReBNNConfig(**choices)))
    assert found["bert.encoder.layer.0.output.dense"] == "latent: 32 while training, 1 packed; bias float"
    assert found["bert.encoder.layer.1.attention.self.query"] == "float: listed in modules_to_not_convert"
    assert found["bert.encoder.layer.0.output.LayerNorm"] == "float: LayerNorm"
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
    assert query.split()[1:6] == ["BinaryLinear", f"{3 * (36 * 36 + 36):,}", "1", f"{now:,}", f"{packed:,}"]
    totals = summary(binarize(bert())).totals
    assert f"{totals['parameters']:,} parameters" in text
    assert f"{totals['ratio']:.1f} x smaller than float32" in text


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
