"""Data augmentation, in the GLUE recipe, with models so small that what they answer is known."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CanineTokenizer,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import augmentation
import augmentation_candidates
import glue
from augmentation import FOLDER, Augmenter, augmented_examples, check_augmentation, student_tokens
from augmentation_candidates import (
    CandidateFinder,
    Encoder,
    Vocabulary,
    load_encoder,
    load_masked_lm,
    read_sentences,
    whole_words,
)
from glue_arguments import parse_glue_arguments
from glue_grammar import demo_dataset
from glue_job import GlueJob
from glue_tasks import get_task
from recipe_folder import RunFolder, read_json

ROOT = Path(__file__).parents[1]
ANIMALS = ("bear", "bird", "camel", "cat", "dog", "duck", "fish", "goat", "horse", "lion", "mouse", "sheep", "wolf")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OTHERS = ("the", "saw", "play", "##ing", "##s", "not", "a", ".", ",", "'", "s", "t", "wasn", "3", "[unused1]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over a dozen words; `playing` is two pieces, every animal one."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *OTHERS, *ANIMALS))}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = BertNormalizer(lowercase=True)
    made.pre_tokenizer = BertPreTokenizer()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def tiny(kind, tokenizer, **options):
    """A BERT whose answers depend on all it reads: its initial weights are large."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes, **options)).eval()


@pytest.fixture(scope="module")
def masked_lm(tokenizer) -> BertForMaskedLM:
    return tiny(BertForMaskedLM, tokenizer)


def encoder_of(tokenizer, model, *, embeddings=None, masked=True) -> Encoder:
    if embeddings is None:
        embeddings = model.get_input_embeddings().weight.detach()
    return Encoder("tiny", tokenizer, embeddings, model if masked else None, None if masked else "none")


def save(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory, tokenizer, masked_lm) -> str:
    return save(tmp_path_factory.mktemp("with_head"), masked_lm, tokenizer)


@pytest.fixture(scope="module")
def without_head(tmp_path_factory, tokenizer, masked_lm) -> str:
    return save(tmp_path_factory.mktemp("without_head"), masked_lm.bert, tokenizer)


def options_of(*options: object):
    arguments = parse_glue_arguments([str(option) for option in options])
    arguments.fill_in(get_task(arguments.data.task or "demo"))
    return arguments


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(["the", *rng.choice(ANIMALS, 5), "saw", *rng.choice(ANIMALS, 4), "."]) for _ in range(count)]


def queries_of(tokenizer, texts):
    read = read_sentences(texts, tokenizer, 64)
    return [(sentence, word) for sentence in read for word in sentence.words]


def text_of(sentence, word) -> str:
    return sentence.text[word.start : word.end]


# --------------------------------------------------------------------------------------------------------------- words


def test_whole_words_are_the_content_words_of_the_vocabulary(tokenizer):
    assert set(whole_words(tokenizer).values()) == {*ANIMALS, "saw", "play", "wasn"}
    assert all(tokenizer.convert_tokens_to_ids(word) == index for index, word in whole_words(tokenizer).items())


def test_function_words_numbers_contractions_and_unknown_words_stay(tokenizer):
    text = "The Dog's bear wasn't 3 not cat3, playing.A zebra saw 'wolf'; fish-duck"
    (sentence,) = read_sentences([text], tokenizer, 64)
    assert [text_of(sentence, word) for word in sentence.words] == [
        "Dog",
        "bear",
        "playing",
        "saw",
        "wolf",
        "fish",
        "duck",
    ]
    for word in sentence.words:
        tokens = tokenizer.convert_ids_to_tokens(word.pieces)
        assert tokens == tokenizer.tokenize(text_of(sentence, word))
        assert tuple(sentence.tokens[word.position : word.position + len(tokens)]) == word.pieces


def test_a_vocabulary_that_marks_the_beginnings_of_words():
    """Byte-level BPE as in RoBERTa: `Ġdog` is a word inside a sentence, `dog` is what ends another or begins a text."""
    made = Tokenizer(BPE(unk_token="[UNK]"))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[UNK]", "[MASK]"]
    trainer = BpeTrainer(special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(["the dog saw", "dog saw", "hotdog saw", "sawing saw"] * 50, trainer)
    made.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]")
    assert {"dog", "Ġdog", "Ġsaw", "hotdog", "sawing"} <= set(tokenizer.get_vocab())
    words = whole_words(tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(list(words))) == {"Ġdog", "Ġsaw"} and set(words.values()) == {
        "dog",
        "saw",
    }
    (sentence,) = read_sentences(["dog saw the dogsaw"], tokenizer, 64)
    pieces = [tokenizer.convert_ids_to_tokens(word.pieces) for word in sentence.words]
    assert [text_of(sentence, word) for word in sentence.words] == ["dog", "saw", "dogsaw"]
    assert pieces[:2] == [["dog"], ["Ġsaw"]] and pieces[2][0] == "Ġdog" and len(pieces[2]) > 1


def test_words_behind_the_longest_input_stay(tokenizer):
    (sentence,) = read_sentences(["the dog saw the cat saw the wolf"], tokenizer, 6)
    assert [text_of(sentence, word) for word in sentence.words] == ["dog", "saw"]


# ---------------------------------------------------------------------------------------------------------- candidates


def asked_one_by_one(tokenizer, model, sentence, word, count) -> list[str]:
    """The definition: write [MASK] for the word, sort the whole vocabulary by probability, keep other words."""
    masked = sentence.text[: word.start] + "[MASK]" + sentence.text[word.end :]
    inputs = tokenizer(masked, return_tensors="pt")
    place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, place].softmax(-1)
    ranked = tokenizer.convert_ids_to_tokens(probabilities.argsort(descending=True))
    return [token for token in ranked if token in {*ANIMALS, "saw", "play", "wasn"} - {text_of(sentence, word)}][:count]


@pytest.mark.parametrize("scores", [2**26, 700])
def test_candidates_are_the_most_likely_words_of_the_masked_language_model(tokenizer, masked_lm, monkeypatch, scores):
    monkeypatch.setattr(augmentation_candidates, "SCORES", scores)  # 700: one or two short sentences a batch
    texts = [*sentences(6), "the cat saw .", "the dog saw the cat ."]
    queries = queries_of(tokenizer, texts)
    found = CandidateFinder(encoder_of(tokenizer, masked_lm), 4).find(queries)
    assert found == [asked_one_by_one(tokenizer, masked_lm, *query, 4) for query in queries]
    assert len({tuple(candidates) for candidates in found}) > 10, "the answers depend on the sentence"


def test_a_model_with_known_answers(tokenizer, masked_lm):
    """Its bias decides; what is likelier than the words is no word or stays as a function word."""
    answers = (".", "##ing", "the", "wolf", "dog", "cat", "[unused1]", "lion", "fish")
    model = tiny(BertForMaskedLM, tokenizer)
    with torch.no_grad():
        for index, token in enumerate(answers):
            model.cls.predictions.bias[tokenizer.convert_tokens_to_ids(token)] = 1000.0 - 100 * index
    queries = queries_of(tokenizer, ["the goat saw the Dog"])
    found = CandidateFinder(encoder_of(tokenizer, model), 3).find(queries)
    assert found == [["wolf", "dog", "cat"], ["wolf", "dog", "cat"], ["wolf", "cat", "lion"]]


def test_neighbours_by_cosine(tokenizer, masked_lm):
    words = whole_words(tokenizer)
    table = masked_lm.get_input_embeddings().weight.detach() * torch.linspace(0.1, 9, len(tokenizer))[:, None]
    queries = queries_of(tokenizer, ["the dog saw the playing wolf"])
    found = CandidateFinder(encoder_of(tokenizer, masked_lm, embeddings=table, masked=False), 5).find(queries)
    for (sentence, word), candidates in zip(queries, found, strict=True):
        mean = table[list(word.pieces)].mean(0)
        cosine = {words[i]: torch.cosine_similarity(mean, table[i], dim=0).item() for i in words}
        cosine.pop(text_of(sentence, word), None)
        assert candidates == sorted(cosine, key=cosine.get, reverse=True)[:5]


def test_words_of_several_pieces_get_the_neighbours_of_their_mean(tokenizer, masked_lm):
    """Also where there is a masked language model, which is asked for words of one piece only."""
    table = torch.zeros(len(tokenizer), 3)
    table[:, 2] = -1.0
    for token, row in {"play": (2, 0, 0), "##ing": (0, 2, 0), "lion": (5, 5, 0), "duck": (1, 0, 0)}.items():
        table[tokenizer.convert_tokens_to_ids(token)] = torch.tensor(row, dtype=torch.float)
    queries = queries_of(tokenizer, ["the playing dog"])
    playing, dog = CandidateFinder(encoder_of(tokenizer, masked_lm, embeddings=table), 3).find(queries)
    assert playing[0] == "lion" and set(playing[1:]) == {"duck", "play"}
    assert dog == asked_one_by_one(tokenizer, masked_lm, *queries[1], 3)


def test_each_question_is_asked_once(tokenizer, masked_lm, monkeypatch):
    finder = CandidateFinder(encoder_of(tokenizer, masked_lm), 4)
    asked = []
    scores = CandidateFinder._mask_scores
    monkeypatch.setattr(CandidateFinder, "_mask_scores", lambda self, some: asked.extend(some) or scores(self, some))
    queries = queries_of(tokenizer, sentences(5))
    first = finder.find([*queries, *queries])
    assert len(asked) == len(queries) and first == finder.find(queries) * 2 and len(asked) == len(queries)
    monkeypatch.setattr(augmentation_candidates, "KNOWN", 3)
    assert finder.find(queries) == first[: len(queries)] and not finder.known


def test_batches_keep_the_scores_within_bounds(tokenizer, masked_lm, monkeypatch):
    monkeypatch.setattr(augmentation_candidates, "SCORES", 100 * len(tokenizer))  # 100 tokens
    lengths = [*np.random.default_rng(0).integers(3, 60, 300).tolist(), 150]
    batches = list(CandidateFinder(encoder_of(tokenizer, masked_lm), 4)._batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(301))
    sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert all(size <= 100 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[following[0]] > 100, "as large as the bound allows"


def test_too_many_candidates_are_refused(tokenizer, masked_lm):
    with pytest.raises(SystemExit, match=r"--augmentation_candidates 16 needs .* that of tiny has 16"):
        CandidateFinder(encoder_of(tokenizer, masked_lm), 16)


def test_spellings_of_the_word_itself_are_no_candidates(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    vocabulary.words = ["Dog", "dog", "cat", "wolf"]
    vocabulary.spellings = {"dog": [0, 1], "cat": [2], "wolf": [3]}
    assert vocabulary.best(torch.tensor([[4.0, 3, 1, 2], [4, 3, 1, 2]]), ["DOG", "cat"], 2) == [
        ["wolf", "cat"],
        ["Dog", "dog"],
    ]


# -------------------------------------------------------------------------------------------------------- new examples


def augmented(tokenizer, model, texts, *options, numbers=None, **columns):
    augmenter = Augmenter(
        encoder_of(tokenizer, model), options_of(*options), ["sentence1", *columns.keys() - {"label"}]
    )
    return augmenter.examples({"sentence1": texts, **columns}, numbers or range(len(texts)))


def test_words_are_replaced_with_the_probability_asked_for(tokenizer, masked_lm):
    texts, copies, count = sentences(40), 60, 3
    options = ("--augment", copies, "--augmentation_probability", 0.3, "--augmentation_candidates", count)
    new = augmented(tokenizer, masked_lm, texts, *options)["sentence1"]
    queries = queries_of(tokenizer, texts)
    candidates = iter(CandidateFinder(encoder_of(tokenizer, masked_lm), count).find(queries))
    assert len(new) == len(texts) * copies
    ranks, replaced, together = [], [], []
    for index, text in enumerate(texts):
        changes = []
        for place, word in enumerate(text.split()):
            if word in ("the", "."):
                assert all(copy.split()[place] == word for copy in new[index * copies : (index + 1) * copies])
                continue
            allowed = next(candidates)
            found = [copy.split()[place] for copy in new[index * copies : (index + 1) * copies]]
            changes.append([other != word for other in found])
            ranks += [allowed.index(other) for other in found if other != word]
        replaced += np.ravel(changes).tolist()
        together += np.sum(changes, axis=0).tolist()
    trials = len(replaced)  # 40 sentences * 60 copies * 10 words
    assert trials == 24000
    assert np.mean(replaced) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / trials))
    assert np.var(together) == pytest.approx(10 * 0.3 * 0.7, rel=0.12), "words are drawn one by one, not together"
    shares = np.bincount(ranks, minlength=count) / len(ranks)
    assert shares == pytest.approx([1 / count] * count, abs=0.025), "all candidates are equally likely"


def test_probability_one_replaces_every_word(tokenizer, masked_lm):
    options = ("--augment", 1, "--augmentation_probability", 1, "--augmentation_candidates", 1)
    (new,) = augmented(tokenizer, masked_lm, ["The dog's playing , saw  Dog."], *options)["sentence1"]
    assert new.startswith("The ") and "'s " in new and new.endswith(".")
    assert not {"dog", "playing", "saw", "Dog"} & set(new.replace("'s", "").strip(".").split())


def test_examples_are_a_function_of_the_seed(tokenizer, masked_lm):
    texts = sentences(30)
    options = ("--augment", 2, "--augmentation_candidates", 4)
    new = augmented(tokenizer, masked_lm, texts, *options)["sentence1"]
    assert new == augmented(tokenizer, masked_lm, texts, *options)["sentence1"]
    assert new != augmented(tokenizer, masked_lm, texts, *options, "--seed", 1)["sentence1"]
    assert new[20:40] == augmented(tokenizer, masked_lm, texts[10:20], *options, numbers=range(10, 20))["sentence1"]
    assert len(set(augmented(tokenizer, masked_lm, texts[:1] * 20, *options)["sentence1"])) > 20, "rows differ"


def test_labels_and_the_other_sentence_of_a_pair_stay(tokenizer, masked_lm):
    first, second = sentences(50), sentences(50, seed=1)
    labels = [0.5 * index for index in range(50)]
    options = ("--augment", 3, "--augmentation_candidates", 4, "--augmentation_probability", 0.9)
    new = augmented(tokenizer, masked_lm, first, *options, sentence2=second, label=labels)
    assert new["label"] == [label for label in labels for _ in range(3)]
    changed = [
        (one != first[index // 3], two != second[index // 3])
        for index, (one, two) in enumerate(zip(new["sentence1"], new["sentence2"], strict=True))
    ]
    assert set(changed) == {(True, False), (False, True)}, "one sentence each"
    assert 50 < sum(one for one, _ in changed) < 100


# ---------------------------------------------------------------------------------------------------------- whole jobs


def job_of(folder: Path, tokenizer, source: str, *options: object, task: str = "sst2", rows: int = 10) -> GlueJob:
    features = Features({"sentence1": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = DatasetDict(
        {
            name: Dataset.from_dict({"sentence1": sentences(rows, seed), "label": [0, 1] * (rows // 2)}, features)
            for seed, name in enumerate(("train", "validation"))
        }
    )
    arguments = options_of("--task", task, "--augment", 2, *options, "--model_name_or_path", source)
    if "--augmentation_candidates" not in options:
        arguments.augmentation.augmentation_candidates = 4
    run = RunFolder(folder)
    return GlueJob(arguments, get_task(task), data, tokenizer, run, run.folder("teacher"), PartialState(cpu=True))


def test_only_the_students_training_set_grows(tmp_path, tokenizer, with_head):
    job = job_of(tmp_path, tokenizer, with_head)
    untouched = {name: split.to_dict() for name, split in job.tokens.items()}
    train, record = student_tokens(job)
    assert {name: split.to_dict() for name, split in job.tokens.items()} == untouched
    assert train[:10] == untouched["train"]
    examples, _ = augmented_examples(job)
    assert train[10:]["input_ids"] == tokenizer(examples["sentence1"][:])["input_ids"]
    assert train[10:]["labels"] == [label for label in untouched["train"]["labels"] for _ in range(2)]
    assert examples.features == job.data["train"].features
    assert record["augmentation"] | {"seconds": 0} == {
        "examples": 20,
        "model": with_head,
        "single_piece_words": "masked language model",
        "several_piece_words": "embedding neighbours",
        "reason": None,
        "seconds": 0,
    }


def test_without_augmentation_nothing_is_loaded_or_written(tmp_path, tokenizer):
    job = job_of(tmp_path, tokenizer, "no/such-model", "--augment", 0)
    train, record = student_tokens(job)
    assert train is job.tokens["train"] and record == {} and not list(tmp_path.iterdir())


def test_finished_examples_are_read_again(tmp_path, tokenizer, with_head, monkeypatch, capsys):
    made, record = augmented_examples(job_of(tmp_path, tokenizer, with_head))
    assert "augmentation: made, 20 new examples" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(augmentation, "load_encoder", lambda job: 1 / 0)
        again, same = augmented_examples(job_of(tmp_path, tokenizer, with_head))
        assert again.to_dict() == made.to_dict() and same == record
        assert "augmentation: read again, 20 new examples" in capsys.readouterr().out
        for changed in (("--seed", 1), ("--augment", 3), ("--augmentation_probability", 0.5), ("--max_length", 9)):
            with pytest.raises(ZeroDivisionError):
                augmented_examples(job_of(tmp_path / "copy", tokenizer, with_head, *changed))
            with pytest.raises(ZeroDivisionError):
                augmented_examples(job_of(tmp_path, tokenizer, with_head, *changed))
            augmented_examples_again(tmp_path, tokenizer, with_head, patch)
    other, _ = augmented_examples(job_of(tmp_path, tokenizer, with_head, "--augmentation_candidates", 2))
    assert other.to_dict() != made.to_dict()


def augmented_examples_again(folder, tokenizer, source, patch) -> None:
    patch.setattr(augmentation, "load_encoder", load_encoder)
    augmented_examples(job_of(folder, tokenizer, source))
    patch.setattr(augmentation, "load_encoder", lambda job: 1 / 0)


def test_other_data_are_augmented_anew(tmp_path, tokenizer, with_head):
    augmented_examples(job_of(tmp_path, tokenizer, with_head))
    made, record = augmented_examples(job_of(tmp_path, tokenizer, with_head, rows=12))
    assert len(made) == record["examples"] == 24


def test_interrupted_augmentation_starts_again(tmp_path, tokenizer, with_head, monkeypatch):
    expected, _ = augmented_examples(job_of(tmp_path / "whole", tokenizer, with_head))
    save_to_disk, calls = Dataset.save_to_disk, []

    def fail_at_the_second(self, path, **options):
        calls.append(path)
        save_to_disk(self, path, **options)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", fail_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            augmented_examples(job_of(tmp_path / "run", tokenizer, with_head))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {f"{FOLDER}.draft"}
    (tmp_path / "run" / f"{FOLDER}.draft" / "whole" / "left_over").touch()
    made, _ = augmented_examples(job_of(tmp_path / "run", tokenizer, with_head))
    assert made.to_dict() == expected.to_dict()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {FOLDER}
    assert not (tmp_path / "run" / FOLDER / "left_over").exists()


def test_chunks_do_not_change_the_examples(tmp_path, tokenizer, with_head, monkeypatch):
    expected, _ = augmented_examples(job_of(tmp_path / "a", tokenizer, with_head))
    monkeypatch.setattr(augmentation, "ROWS", 3)
    made, _ = augmented_examples(job_of(tmp_path / "b", tokenizer, with_head))
    assert made.to_dict() == expected.to_dict()


# ------------------------------------------------------------------------------------------------------------- encoder


def test_a_missing_head_is_noticed(tmp_path, tokenizer, with_head, without_head):
    assert load_masked_lm(with_head, tokenizer)[1] is None
    assert load_encoder(job_of(tmp_path, tokenizer, with_head)).model is not None
    found = load_encoder(job_of(tmp_path, tokenizer, without_head))
    assert found.model is None and "no masked-language-model head" in found.reason
    assert found.record()["single_piece_words"] == "embedding neighbours"
    classifier = save(tmp_path / "classifier", tiny(BertForSequenceClassification, tokenizer), tokenizer)
    assert load_encoder(job_of(tmp_path, tokenizer, classifier)).model is None
    gpt = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    found = load_encoder(job_of(tmp_path, tokenizer, save(tmp_path / "gpt", gpt, tokenizer)))
    assert found.model is None and "architecture 'gpt2' has no masked-language-model head" in found.reason


def test_a_missing_head_is_said(tmp_path, tokenizer, without_head, capsys):
    _, record = augmented_examples(job_of(tmp_path, tokenizer, without_head))
    line = capsys.readouterr().out
    assert "embedding neighbours for ALL words, since it has no masked-language-model head" in line
    assert record["reason"] in line


def test_a_tokenizer_without_a_mask_has_no_use_for_a_head(tokenizer, masked_lm, tmp_path):
    folder = save(tmp_path, masked_lm, tokenizer)
    without = AutoTokenizer.from_pretrained(folder)
    without.mask_token = None
    assert load_masked_lm(folder, without)[1] == "its tokenizer has no mask token"


def test_a_model_asked_for_must_have_a_head(tmp_path, tokenizer, with_head, without_head):
    check_augmentation(job_of(tmp_path, tokenizer, without_head, "--augmentation_model", with_head))
    check_augmentation(job_of(tmp_path, tokenizer, "no/such-model", "--augment", 0))
    with pytest.raises(SystemExit, match=r"cannot be used: it has no masked-language-model head .* Pass a masked"):
        check_augmentation(job_of(tmp_path, tokenizer, with_head, "--augmentation_model", without_head))
    with pytest.raises(SystemExit, match="no/such-model cannot be loaded"):
        check_augmentation(job_of(tmp_path, tokenizer, with_head, "--augmentation_model", "no/such-model"))


def test_a_vocabulary_or_tokenizer_without_use_is_refused_before_the_teacher_is_trained(
    tmp_path, tokenizer, with_head, without_head
):
    """Also where it is the pretrained encoder, or the demo, that replaces words."""
    too_many = ("--augmentation_candidates", 16)
    for source in (with_head, without_head):
        check_augmentation(job_of(tmp_path, tokenizer, source))
        with pytest.raises(SystemExit, match=rf"--augmentation_candidates 16 needs .* that of {source} has 16"):
            check_augmentation(job_of(tmp_path, tokenizer, source, *too_many))
    demo = job_of(tmp_path, tokenizer, with_head, *too_many)
    demo.arguments.teacher.model_name_or_path = None
    with pytest.raises(SystemExit, match="that of the demo has 16"):
        check_augmentation(demo)
    demo.arguments.augmentation.augmentation_candidates = 4
    check_augmentation(demo)
    with pytest.raises(SystemExit, match="no/such-model cannot be loaded"):
        check_augmentation(job_of(tmp_path, tokenizer, "no/such-model"))
    slow = save(tmp_path / "slow", tiny(BertForMaskedLM, tokenizer), CanineTokenizer())
    with pytest.raises(SystemExit, match=f"needs a fast tokenizer.* that of {slow} is CanineTokenizer"):
        check_augmentation(job_of(tmp_path, tokenizer, slow))
    assert not (tmp_path / "teacher").exists()


def test_the_model_asked_for_is_the_one_in_use(tmp_path, tokenizer, with_head, without_head):
    _, record = augmented_examples(job_of(tmp_path, tokenizer, without_head, "--augmentation_model", with_head))
    assert record["model"] == with_head and record["single_piece_words"] == "masked language model"


def test_random_embeddings_are_refused(tmp_path, tokenizer, masked_lm):
    weights = {name: value for name, value in masked_lm.state_dict().items() if "word_embeddings" not in name}
    weights = {name: value for name, value in weights.items() if "decoder.weight" not in name}
    masked_lm.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="has no word embeddings"):
        load_masked_lm(str(tmp_path), tokenizer)


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--augment", "-1"], "--augment -1 counts sentences"),
        (["--augment", "2", "--augmentation_probability", "0"], "--augmentation_probability 0.0 must be greater"),
        (["--augment", "2", "--augmentation_probability", "1.5"], "and at most 1"),
        (["--augment", "2", "--augmentation_candidates", "0"], "--augmentation_candidates 0 must be at least 1"),
        (["--augmentation_model", "x"], "--augmentation_model x does nothing without --augment N"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_glue_arguments(options)
    assert complaint in capsys.readouterr().err


def test_options_are_settings_of_the_student_only():
    off, on = (options_of("--augment", count).stage_settings("data") for count in (0, 3))
    assert on["teacher"] == off["teacher"] and on["packed"] == off["packed"]
    assert {name: on["latent"][name] for name in on["latent"] if name not in off["latent"]} == {
        "augment": 3,
        "augmentation_probability": 0.4,
        "augmentation_candidates": 15,
        "augmentation_model": None,
    }
    assert options_of().to_dict()["augment"] == 0


def environment(**more: str) -> dict[str, str]:
    paths = filter(None, [str(ROOT), str(ROOT / "recipes"), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


@pytest.fixture
def _keep_threads():
    """The demo sets the number of threads of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_demo_from_the_command_line(tmp_path, _keep_threads):
    folder = tmp_path / "run"
    size = ["--max_train_samples", "96", "--max_eval_samples", "32", "--teacher_epochs", "1", "--epochs", "1"]
    options = ["--output_dir", str(folder), *size, "--logging_steps", "2"]
    process = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "glue.py"), *options, "--augment", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    results = read_json(folder / "results.json")
    assert results["steps"] == {"teacher": 3, "latent": 9}, "two new sentences for each of the student's examples"
    assert results["examples"] == {"train": 96, "validation": 32}
    assert results["arguments"]["augment"] == 2 and results["augmentation"]["examples"] == 192
    assert results["augmentation"]["reason"] in process.stdout and results["augmentation"]["model"].endswith("teacher")

    made = Dataset.load_from_disk(str(folder / FOLDER))
    rows = demo_dataset()["train"][:96]
    assert made["label"][::2] == made["label"][1::2] == rows["label"]
    pairs = zip(made["sentence1"][::2], rows["sentence1"], strict=True)
    differences = [[a != b for a, b in zip(new.split(), old.split(), strict=True)] for new, old in pairs]
    assert 0.1 < np.mean(np.concatenate(differences)) < 0.4

    with pytest.raises(SystemExit, match="augment: 2 -> 1"):
        glue.main([*options, "--augment", "1"])
    before = (folder / FOLDER / "augmentation.json").stat().st_mtime_ns
    glue.main([*options, "--augment", "2", "--learning_rate", "1e-4", "--overwrite"])
    assert (folder / FOLDER / "augmentation.json").stat().st_mtime_ns == before, (
        "the student changed, not the sentences"
    )


def test_an_unusable_model_is_refused_before_anything_is_trained(tmp_path, without_head, _keep_threads):
    with pytest.raises(SystemExit, match="cannot be used"):
        glue.main(["--output_dir", str(tmp_path / "run"), "--augment", "1", "--augmentation_model", without_head])
    assert not (tmp_path / "run").exists()


SHARE = """
import sys
from augmentation import augmented_examples
from glue_arguments import parse_glue_arguments
from glue_job import GlueJob
from recipe_job import prepare
examples, _ = augmented_examples(prepare(parse_glue_arguments(sys.argv[1:]), GlueJob))
"""


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path, tokenizer, with_head, _keep_threads):
    lines = [f"{text}\t{index % 2}" for index, text in enumerate(sentences(9))]
    (tmp_path / "data.tsv").write_text("\n".join(["text\tlabel", *lines]))
    options = ["--train_file", str(tmp_path / "data.tsv"), "--validation_file", str(tmp_path / "data.tsv")]
    options += ["--model_name_or_path", with_head, "--augment", "2", "--augmentation_candidates", "4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", SHARE, *options, "--output_dir"]
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / "two")],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert "18 new examples" in answers[0][0] and "new examples" not in answers[1][0]
    two = Dataset.load_from_disk(str(tmp_path / "two" / FOLDER))

    from recipe_job import prepare

    one, _ = augmented_examples(
        prepare(parse_glue_arguments([*options, "--output_dir", str(tmp_path / "one")]), GlueJob)
    )
    assert two.to_dict() == one.to_dict()
