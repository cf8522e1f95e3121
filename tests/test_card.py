"""Model cards: true numbers, front matter that the Hub takes, code that loads, and no scores without their command."""

import re

import pytest
import torch
import transformers as hf
from hub_server import front_matter_fault
from huggingface_hub import EvalResult, ModelCard
from torch import nn

from rebnn_hf import ReBNNConfig, binarize, calibrate, model_card, pack, unpack
from rebnn_hf.auto_classes import auto_classes

SIZES = dict(vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36)
BINARY = 2 * (4 * 20 * 20 + 2 * 20 * 36)  # weights of the encoder's linear layers
COMMAND = "python evaluate.py --task 'sst2'"


def build(model_class=hf.BertForSequenceClassification):
    torch.manual_seed(0)
    return model_class(hf.BertConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def packed():
    return pack(binarize(build()))


def score(metric, value, split="validation"):
    return EvalResult("text-classification", "nyu-mll/glue", "GLUE SST-2", metric, value, dataset_split=split)


def front_matter(card, tmp_path):
    """What a reader of the saved file finds."""
    card.save(tmp_path / "README.md")
    assert front_matter_fault((tmp_path / "README.md").read_text()) is None
    return ModelCard.load(tmp_path / "README.md").data


# What it says


def test_numbers(packed):
    text = model_card(packed, "user/model").text
    parameters = sum(parameter.numel() for parameter in build().parameters())
    assert f"This is a model of {parameters:,} parameters" in text
    assert f"{parameters:,} parameters, {BINARY / parameters:.2%} of them 1-bit" in text
    scales = 2 * (4 * 20 + 36 + 20)
    elements = parameters - BINARY + scales + 2 * (4 * 20 * 3 + 36 * 3 + 20 * 5)
    assert sum(tensor.numel() for tensor in packed.state_dict().values()) == elements < parameters
    size = 4 * (parameters - BINARY + scales) + 2 * (4 * 20 * 3 + 36 * 3 + 20 * 5)
    assert f"{size:,} packed: {4 * parameters / size:.1f} x smaller than float32" in text


def test_what_is_one_bit_and_why_the_rest_is_not(packed):
    text = model_card(packed).text
    assert re.search(r"bert\.encoder\.layer\.0-1\.output\.dense +PackedLinear .* 1/32 .* packed; bias float", text)
    assert "float: pooler (pooler=False)" in text and "float: norm" in text
    model = binarize(build(), ReBNNConfig.preset("rebnn-bit-w1a2"))
    calibrate(model, {"input_ids": torch.arange(8)[None]})
    assert " 1/2 " in model_card(model).text


def test_the_code_loads_the_model(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    names = {}
    (code,) = re.findall(r"```python\n(.*?)```", model_card(packed, str(tmp_path)).text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(names["model"](ids).logits, packed(ids).logits)


def test_own_words(packed):
    card = model_card(packed, title="Tiny", about="Made in **vain**.", usage="model = None", tags=["tiny", "1-bit"])
    assert card.text.startswith("\n# Tiny\n\nMade in **vain**.\n\n## Use\n\n```python\nimport rebnn_hf ")
    assert "\nmodel = None\n```" in card.text and "from_pretrained" not in card.text
    assert card.data.tags == ["rebnn", "1-bit", "tiny"]


def test_a_latent_model_is_called_one(packed):
    latent, bits = model_card(binarize(build())).text, model_card(packed).text
    assert "`rebnn_hf.pack(model)` makes them one bit each" in latent and "latent: 32 while training" in latent
    assert "stored as one bit each" in bits and "the Hub counts" in bits and "the Hub counts" not in latent
    needs = "It needs `pip install rebnn_hf`. Without the import transformers stops with an error that says so."
    assert needs in latent and needs in bits


# Front matter


def test_front_matter(packed, tmp_path):
    results = [score("accuracy", 0.9), score("f1", 0.8), score("accuracy", 0.7, "test")]
    given = dict(base_model="user/teacher", license="mit", language="en", base_model_relation="quantized")
    data = front_matter(model_card(packed, "user/model", eval_results=results, command=COMMAND, **given), tmp_path)
    assert {name: data.get(name) for name in given} == given
    assert data.library_name == "transformers" and data.pipeline_tag == "text-classification"
    assert data.model_name == "model" and data.metrics == ["accuracy", "f1"] and data.tags == ["rebnn", "1-bit"]
    assert data.eval_results == results


def test_front_matter_without_scores(packed, tmp_path):
    data = front_matter(model_card(packed), tmp_path).to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["rebnn", "1-bit"],
    }


@pytest.mark.parametrize(
    ("model_class", "tag", "auto"),
    [
        (hf.BertModel, None, "AutoModel"),
        (hf.BertForMaskedLM, "fill-mask", "AutoModelForMaskedLM"),
        (hf.BertForTokenClassification, "token-classification", "AutoModelForTokenClassification"),
        (hf.BertForQuestionAnswering, "question-answering", "AutoModelForQuestionAnswering"),
    ],
)
def test_task_and_class(model_class, tag, auto):
    card = model_card(binarize(build(model_class)))
    assert card.data.pipeline_tag == tag and f"model = {auto}.from_pretrained(" in card.text


def test_auto_classes():
    assert auto_classes(hf.BertModel, hf.BertConfig())[0] == "AutoModel"
    assert auto_classes(hf.RobertaForMaskedLM, hf.RobertaConfig()) == [
        "AutoModelForMaskedLM",
        "AutoModelForPreTraining",
    ]
    assert auto_classes(hf.ViTForImageClassification, hf.ViTConfig()) == ["AutoModelForImageClassification"]
    assert auto_classes(nn.Module, hf.BertConfig()) == []


# Scores


def test_scores_as_a_table_with_their_command(packed):
    text = model_card(packed, eval_results=[score("accuracy", 0.8968)], command=COMMAND).text
    header = "| data | split | metric | value |\n| --- | --- | --- | ---: |\n"
    assert f"{header}| GLUE SST-2 | validation | accuracy | 0.8968 |\n\n" in text
    assert text.endswith(f"Measured by\n\n```\n{COMMAND}\n```\n")


def test_scores_in_own_words(packed):
    card = model_card(packed, eval_results=[score("f1", 0.5)], measured="Half of them.", command=COMMAND)
    assert "## Measured\n\nHalf of them.\n\nMeasured by" in card.text and "| f1 |" not in card.text
    assert card.data.eval_results[0].metric_value == 0.5


@pytest.mark.parametrize(
    "given", [{"eval_results": [score("f1", 0.5)]}, {"measured": "Half of them."}, {"command": COMMAND}]
)
def test_scores_and_command_belong_together(packed, given):
    with pytest.raises(ValueError, match=r"belong together: pass eval_results \(or measured\) and command"):
        model_card(packed, **given)


# Mistakes, and the tags of the model


def test_float_models_are_refused():
    with pytest.raises(ValueError, match=r"describes 1-bit models, got a float one; binarize\(\) it"):
        model_card(build())
    with pytest.raises(TypeError, match="expects a transformers PreTrainedModel, got Linear"):
        model_card(nn.Linear(2, 2))


def test_tags_come_and_go_with_the_bits():
    model = build()
    model.add_model_tags(["mine"])
    binarize(model)
    assert pack(model).model_tags == ["mine", "rebnn", "1-bit"]
    assert unpack(model).model_tags == ["mine"]
    assert hf.BertModel.model_tags is None and unpack(binarize(build())).model_tags is None


def test_tags_of_loaded_models(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    assert hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).model_tags == ["rebnn", "1-bit"]
