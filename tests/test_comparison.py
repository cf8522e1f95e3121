"""Models side by side: bytes, operations, times and scores are those of the parts, in text, HTML and JSON."""

import json
import re

import pytest
import torch
import transformers as hf
from torch import nn

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.inputs import random_inputs

SIZES = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


def bert():
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(max_position_embeddings=40, initializer_range=0.2, **SIZES))


def packed(preset):
    model = rebnn_hf.binarize(bert(), ReBNNConfig.preset(preset))
    rebnn_hf.calibrate(model, random_inputs(model, 2, 8))
    return rebnn_hf.pack(model)


@pytest.fixture(scope="module")
def models():
    return bert().eval(), packed("rebnn-w1a32"), packed("rebnn-bit-w1a1")


SCORES = {"accuracy": (0.9, 0.89, 0.85), "F1": [0.8, 0.79, 0.7]}


@pytest.fixture(scope="module")
def compared(models):
    return rebnn_hf.compare(*models, inputs=random_inputs(models[0], 2, 32), scores=SCORES, rounds=3)


def test_numbers_are_those_of_the_parts(models, compared, tmp_path):
    assert [row.name for row in compared.rows] == ["float", "packed W1A32", "packed W1A1"]
    for index, (model, row) in enumerate(zip(models, compared.rows, strict=True)):
        operations = rebnn_hf.operations(model, tokens=32).totals
        assert (row.macs, row.equivalent_flops) == (operations["macs"], operations["equivalent_flops"])
        assert row.bytes == rebnn_hf.packed_size(model)["total"]
        model.save_pretrained(tmp_path / str(index))
        assert 0 < (tmp_path / str(index) / "model.safetensors").stat().st_size - row.bytes < 12_000  # its header
        assert row.scores == {"accuracy": SCORES["accuracy"][index], "F1": SCORES["F1"][index]}
        low, high = row.quartiles
        assert 0 < low <= row.milliseconds <= high
    assert compared.counted == "one sequence of 32 tokens"
    assert (
        compared.measured == f"3 rounds of all models in turns, inputs of 2 x 32, {torch.get_num_threads()} thread(s)"
    )


def test_ratios_in_the_table_are_to_the_first(compared):
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in str(compared).splitlines() if "|" in line
    ]
    first, *others = (dict(zip(header, line, strict=True)) for line in lines)
    assert first["x smaller"] == first["x fewer"] == first["x faster"] == "1.00"
    for row, shown in zip(compared.rows[1:], others, strict=True):
        assert shown["model"] == row.name and shown["accuracy"] == f"{row.scores['accuracy']:.3f}"
        for column, attribute in (
            ("x smaller", "bytes"),
            ("x fewer", "equivalent_flops"),
            ("x faster", "milliseconds"),
        ):
            ratio = getattr(compared.rows[0], attribute) / getattr(row, attribute)
            assert float(shown[column]) == pytest.approx(ratio, rel=6e-3), column
    assert "never a measured speed" in str(compared) and compared.measured in str(compared)


def test_json_and_html_hold_the_same(compared):
    data = json.loads(json.dumps(compared.to_dict()))
    assert [row["bytes"] for row in data["rows"]] == [row.bytes for row in compared.rows]
    assert data["measured"] == compared.measured
    cells = re.findall(r"<t[dh] [^>]*>([^<]*)<", compared._repr_html_())
    shown = [cell.strip() for line in str(compared).splitlines() if "|" in line for cell in line.strip("|").split("|")]
    assert cells == [cell for cell in shown if not re.fullmatch("-+:?", cell)]


def test_modes_stay_and_nothing_is_measured_without_inputs(models):
    model = packed("rebnn-w1a32").train()
    model.classifier.eval()
    result = rebnn_hf.compare(models[0], model, names=("teacher", "student"))
    assert result.measured == "" and result.rows[1].milliseconds is None and result.rows[1].name == "student"
    assert "ms" not in str(result) and result.counted == "one sequence of 128 tokens"
    rebnn_hf.compare(models[0], model, inputs=random_inputs(model, 1, 4), rounds=1)
    assert model.training and model.bert.training and not model.classifier.training and not models[0].training


def test_what_cannot_be_counted_is_said(models):
    config = hf.DebertaV2Config(**SIZES)
    model = hf.DebertaV2ForSequenceClassification(config)
    other = rebnn_hf.pack(rebnn_hf.binarize(hf.DebertaV2ForSequenceClassification(config)))
    result = rebnn_hf.compare(model, other)
    assert result.rows[0].macs is None and result.rows[1].bytes < result.rows[0].bytes
    assert result.counted.startswith("Operations were not counted: ") and "'deberta-v2' is not among" in str(result)
    assert "FLOPs" not in str(result).splitlines()[0]


def test_pictures(compared, models, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'rebnn_hf[plot]'")
    rebnn_hf.plot_tradeoff(compared, tmp_path / "both.png", score="accuracy")
    sizes = rebnn_hf.compare(*models, scores={"accuracy": SCORES["accuracy"]})
    rebnn_hf.plot_tradeoff(sizes, tmp_path / "size.png")
    both, one = ((tmp_path / name).read_bytes() for name in ("both.png", "size.png"))
    assert both.startswith(b"\x89PNG") and one.startswith(b"\x89PNG")
    width = {name: int.from_bytes(data[16:20], "big") for name, data in (("both", both), ("one", one))}
    assert width["both"] == 2 * width["one"], "a panel for each cost"
    with pytest.raises(ValueError, match="score=None is not one that was compared; expected one of accuracy, F1"):
        rebnn_hf.plot_tradeoff(compared, tmp_path / "none.png")
    with pytest.raises(ValueError, match="expected one of none"):
        rebnn_hf.plot_tradeoff(rebnn_hf.compare(*models), tmp_path / "none.png", score="accuracy")
    assert not (tmp_path / "none.png").exists()


def test_errors(models):
    model, other, _ = models
    with pytest.raises(TypeError, match="expects transformers models, got Linear"):
        rebnn_hf.compare(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two models or more, got 1"):
        rebnn_hf.compare(model)
    with pytest.raises(ValueError, match="would be called float, float; give each a name"):
        rebnn_hf.compare(model, model)
    with pytest.raises(ValueError, match=r"names must have one entry for each of the 2 models, got \('a',\)"):
        rebnn_hf.compare(model, other, names=("a",))
    with pytest.raises(
        ValueError, match=r"scores\['accuracy'\] must have one entry for each of the 2 models, got \[1\]"
    ):
        rebnn_hf.compare(model, other, scores={"accuracy": [1]})
