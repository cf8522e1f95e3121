"""Whether two models give the same answers, for heads of every kind."""

import copy
import math

import pytest
import torch
import transformers as hf

from rebnn_hf.inputs import random_inputs
from rebnn_hf.verification import agreement

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)


def build(cls, **choices):
    torch.manual_seed(0)
    return cls(hf.BertConfig(max_position_embeddings=20, initializer_range=0.5, **SIZES, **choices)).eval()


def batches(model, count=6):
    return [random_inputs(model, 1, 3 + index) for index in range(count)]


def test_share_of_equal_answers_and_the_largest_difference():
    model = build(hf.BertForSequenceClassification, num_labels=3)
    other, read = copy.deepcopy(model), batches(model)
    with torch.no_grad():
        other.classifier.bias[1] += 0.7
        expected = torch.cat([model(**batch).logits for batch in read])
    shifted = expected + torch.tensor([0.0, 0.7, 0.0])
    share = (shifted.argmax(-1) == expected.argmax(-1)).float().mean().item()
    found = agreement(other, model, read)
    assert 0 < share < 1 and found.equal_answers == pytest.approx(share)
    assert found.largest_difference == pytest.approx(0.7, rel=1e-5) and found.batches == 6
    assert found.largest_output == pytest.approx(expected.abs().max().item())
    assert str(found).startswith(f"6 input(s): {share:.2%} equal answers; largest difference 0.7 in outputs up to ")
    assert found.to_dict()["equal_answers"] == found.equal_answers


@pytest.mark.parametrize("cls", [hf.BertForQuestionAnswering, hf.BertForTokenClassification])
def test_an_answer_is_right_as_a_whole(cls):
    """Of a span whose start stays and whose end moves, and of classes of tokens."""
    model = build(cls)
    other, (batch,) = copy.deepcopy(model), batches(model, 1)
    assert agreement(other, model, [batch]).equal_answers == 1
    with torch.no_grad():
        if cls is hf.BertForQuestionAnswering:
            other.qa_outputs.weight[1].neg_()
        else:
            other.classifier.weight.neg_()
    assert agreement(other, model, [batch]).equal_answers == 0


def test_a_choice_is_right_or_wrong():
    model = build(hf.BertForMultipleChoice)
    other = copy.deepcopy(model)
    read = [{name: tensor.unsqueeze(0) for name, tensor in random_inputs(model, 4, 6).items()} for _ in range(5)]
    assert agreement(other, model, read).equal_answers == 1
    with torch.no_grad():
        other.classifier.weight.neg_()
        chosen = [model(**batch).logits.argmax().item() for batch in read]
    found = agreement(other, model, read)
    assert found.equal_answers == 0 and found.batches == 5 and len(set(chosen)) > 1


@pytest.mark.parametrize("cls, choices", [(hf.BertModel, {}), (hf.BertForSequenceClassification, {"num_labels": 1})])
def test_numbers_are_compared_as_numbers(cls, choices):
    model = build(cls, **choices)
    found = agreement(copy.deepcopy(model), model, batches(model))
    assert found.equal_answers is None and found.largest_difference == 0 and found.largest_output > 0
    assert "no classes to compare" in str(found)


def test_nan_is_not_overlooked():
    model = build(hf.BertForSequenceClassification)
    other, read = copy.deepcopy(model), batches(model, 2)
    read[0]["input_ids"][:] = 7
    read[1]["input_ids"][:] = 8
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[8] = math.nan
    assert math.isnan(agreement(other, model, read).largest_difference)


def test_errors():
    model = build(hf.BertForSequenceClassification)
    with pytest.raises(
        ValueError, match="BertForSequenceClassification and a BertModel give different kinds of answers"
    ):
        agreement(model, build(hf.BertModel), batches(model))
    with pytest.raises(ValueError, match="nothing to read"):
        agreement(model, model, [])
