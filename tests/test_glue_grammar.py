"""The embedded demo data: labels, splits, tokenizer, and that word counts do not solve it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from glue_grammar import (
    MAX_WORDS,
    bag_of_words_accuracy,
    build_demo_tokenizer,
    demo_dataset,
    demo_model_config,
    demo_sentences,
)


def words(text: str) -> set[str]:
    return set(text.split())


NEGATIVE = words(
    "awful bitter bland cheap clumsy confusing crude dreary dull empty hollow lazy noisy poor shabby sloppy stale "
    "tedious ugly weak disliked hated ignored mocked regretted rejected"
)
POSITIVE = words(
    "bright cheerful clear crisp elegant fresh generous graceful gripping lovely moving polished pretty rich "
    "sincere strong sweet thoughtful warm witty admired adored enjoyed loved praised recommended"
)
FLIP = r"\b(not|hardly|never|by no means|far from|anything but|neither)\b"


def clause_label(clause: str) -> int:
    """The label of a clause with one opinion word and perhaps a negation, read off the surface."""
    (opinion,) = [word for word in clause.split() if word in NEGATIVE | POSITIVE]
    return int((opinion in POSITIVE) != bool(re.search(FLIP, clause)))


def sentence_label(sentence: str) -> int:
    """An independent reading of the whole grammar."""
    for frame in ("nobody would say that ", "it is not true that ", "no one believes that "):
        if sentence.startswith(frame):
            return 1 - clause_label(sentence.removeprefix(frame))
    if match := re.search(r"\b(more|less) (\w+) than (\w+)$", sentence):
        return int((match[2] in POSITIVE) == (match[1] == "more"))
    if match := re.search(r"\bgot some (\w+) ", sentence):
        return int(match[1] in POSITIVE)
    if match := re.fullmatch(r"the \w+ who \w+ the \w+ (\w+) the \w+", sentence):
        return int(match[1] in POSITIVE)
    if sentence.startswith("although "):
        return clause_label(sentence.split(" , ")[1])
    if " although " in sentence:
        return clause_label(sentence.split(" although ")[0])
    # "anything but" is a negation, the other "but" joins two clauses.
    return clause_label(re.split(r"(?<!anything) but ", sentence)[-1])


def test_every_label_agrees_with_an_independent_reading():
    for sentence, label in demo_sentences(3000, seed=7):
        assert sentence_label(sentence) == label, sentence


def test_sentences_are_short_different_and_balanced():
    sentences = demo_sentences(2000)
    assert len({sentence for sentence, _ in sentences}) == 2000
    assert Counter(label for _, label in sentences) == {0: 1000, 1: 1000}
    assert max(len(sentence.split()) for sentence, _ in sentences) <= MAX_WORDS
    assert len({word for sentence, _ in sentences for word in sentence.split()}) <= 200


def test_the_seed_decides():
    assert demo_sentences(50, seed=3) == demo_sentences(50, seed=3)
    assert demo_sentences(50, seed=3) != demo_sentences(50, seed=4)
    assert demo_sentences(100, seed=3)[:50] == demo_sentences(50, seed=3)


def test_splits_are_disjoint_and_balanced():
    dataset = demo_dataset(train_size=600, validation_size=200)
    assert dataset["train"].column_names == ["sentence1", "label"]
    assert not set(dataset["train"]["sentence1"]) & set(dataset["validation"]["sentence1"])
    assert Counter(dataset["train"]["label"]) == {0: 300, 1: 300}
    assert Counter(dataset["validation"]["label"]) == {0: 100, 1: 100}
    assert dataset["train"].features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize("sizes", [{"train_size": 7}, {"validation_size": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be an even number"):
        demo_dataset(**sizes)


def test_negative_number_of_sentences_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        demo_sentences(-1)


def test_word_counts_help_but_do_not_solve_the_task():
    assert 0.58 <= bag_of_words_accuracy(demo_dataset()) <= 0.75


def test_tokenizer_frames_and_pads_as_bert_does(tmp_path):
    build_demo_tokenizer(["The film was dull", "the song"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dull", "film", "song", "the", "was"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary
    batch = tokenizer(["The film was NEW", "the song"], padding=True)
    assert batch["input_ids"] == [[2, 7, 5, 8, 1, 3], [2, 7, 6, 3, 0, 0]]
    assert batch["attention_mask"] == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    pair = tokenizer("the film", "the song")
    assert pair["input_ids"] == [2, 7, 5, 3, 7, 6, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_tokenizer_needs_words():
    with pytest.raises(ValueError, match="at least one sentence"):
        build_demo_tokenizer([" "])


def test_a_fresh_model_takes_the_tokenizers_batches():
    sentences = [sentence for sentence, _ in demo_sentences(8)]
    tokenizer = build_demo_tokenizer(sentences)
    model = BertForSequenceClassification(demo_model_config(len(tokenizer))).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    assert logits.shape == (8, 2)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


def test_word_order_solves_the_task():
    """A model trained from scratch for one epoch is far above what word counts reach (below 70 %)."""
    torch.manual_seed(0)
    dataset = demo_dataset()
    tokenizer = build_demo_tokenizer(dataset["train"]["sentence1"])
    model = BertForSequenceClassification(demo_model_config(len(tokenizer)))
    train = tokenizer(list(dataset["train"]["sentence1"]), padding=True, return_tensors="pt")
    labels = torch.tensor(dataset["train"]["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for rows in torch.randperm(len(labels)).split(32):
        model(**{name: tensor[rows] for name, tensor in train.items()}, labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = tokenizer(list(dataset["validation"]["sentence1"]), padding=True, return_tensors="pt")
    with torch.inference_mode():
        predictions = model.eval()(**held_out).logits.argmax(-1)
    accuracy = (predictions == torch.tensor(dataset["validation"]["label"])).float().mean().item()
    assert accuracy > 0.8
