"""The data of `glue.py --task demo`: opinions from a small English grammar, told apart by their structure.

Every sentence says whether something was liked, and the opinion words alone do not decide it: negation flips
a clause, "but" and "although" say which of two clauses counts, "less ... than ..." turns a comparison round,
and a relative clause holds an opinion beside the one that counts. Word counts (`bag_of_words_accuracy`)
therefore stay far below a model that reads word order, which makes the demo a small but real test of an
encoder and of its 1-bit student.

Nothing is downloaded: the sentences, the tokenizer and the encoder to be trained from scratch are made here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, PreTrainedTokenizerFast

LABELS = ("negative", "positive")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MAX_WORDS = 20


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Indexed by the polarity: [0] negative, [1] positive.
_ADJECTIVES = (
    _words(
        "awful bitter bland cheap clumsy confusing crude dreary dull empty hollow lazy noisy poor shabby "
        "sloppy stale tedious ugly weak"
    ),
    _words(
        "bright cheerful clear crisp elegant fresh generous graceful gripping lovely moving polished pretty "
        "rich sincere strong sweet thoughtful warm witty"
    ),
)
_VERBS = (
    _words("disliked hated ignored mocked regretted rejected"),
    _words("admired adored enjoyed loved praised recommended"),
)
_NOUNS = _words(
    "banquet book camera cast castle chapter concert dance dinner drama ending exhibition festival film game "
    "garden hotel island journey lecture lesson library market meal melody museum novel opera painting park "
    "picnic plot poem room script song soup speech stage story train voice"
)
_PEOPLE = _words(
    "children critics experts guests judges neighbours parents readers reporters students teachers tourists"
)
_DEGREES = _words("quite rather really so truly very")
_NEGATIONS = ("not", "hardly", "never", "by no means", "far from", "anything but")
_DOUBLE_NEGATIONS = ("nobody would say that", "it is not true that", "no one believes that")

# A phrase and whether it is positive.
Phrase = tuple[str, bool]


def _adjective(rng: random.Random, positive: bool) -> str:
    return rng.choice(_ADJECTIVES[positive])


def _verb(rng: random.Random, positive: bool) -> str:
    return rng.choice(_VERBS[positive])


def _coin(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _plain(rng: random.Random) -> Phrase:
    """`the film was really dull`: the word decides."""
    positive = _coin(rng)
    degree = f"{rng.choice(_DEGREES)} " if _coin(rng) else ""
    return f"the {rng.choice(_NOUNS)} was {degree}{_adjective(rng, positive)}", positive


def _negated(rng: random.Random) -> Phrase:
    """`the film was hardly dull`: the negation flips the word."""
    positive = _coin(rng)
    return f"the {rng.choice(_NOUNS)} was {rng.choice(_NEGATIONS)} {_adjective(rng, positive)}", not positive


def _neither(rng: random.Random) -> Phrase:
    """`neither the film nor the song was dull`: the frame flips the word."""
    positive = _coin(rng)
    first, second = rng.sample(_NOUNS, 2)
    return f"neither the {first} nor the {second} was {_adjective(rng, positive)}", not positive


def _opinion(rng: random.Random) -> Phrase:
    """`the critics loved the film` or `the critics never loved the film`."""
    positive, negated = _coin(rng), rng.random() < 0.2
    negation = "never " if negated else ""
    who, what = rng.choice(_PEOPLE), rng.choice(_NOUNS)
    return f"the {who} {negation}{_verb(rng, positive)} the {what}", positive != negated


def _clause(rng: random.Random) -> Phrase:
    """One simple opinion, the building block of the longer sentences."""
    (build,) = rng.choices((_plain, _negated, _opinion), weights=(6, 1, 3))
    return build(rng)


def _contrast(rng: random.Random) -> Phrase:
    """`A but B`: B counts."""
    (first, _), (second, positive) = _clause(rng), _clause(rng)
    return f"{first} but {second}", positive


def _concession(rng: random.Random) -> Phrase:
    """`although A , B` and `B although A`: B counts, wherever it stands."""
    (aside, _), (main, positive) = _clause(rng), _clause(rng)
    return (f"although {aside} , {main}" if _coin(rng) else f"{main} although {aside}"), positive


def _relative(rng: random.Random) -> Phrase:
    """`the critics who hated the song loved the film`: the main verb counts, not the inner one."""
    inner, outer = _coin(rng), _coin(rng)
    first, second = rng.sample(_NOUNS, 2)
    who = rng.choice(_PEOPLE)
    return f"the {who} who {_verb(rng, inner)} the {first} {_verb(rng, outer)} the {second}", outer


def _comparison(rng: random.Random) -> Phrase:
    """`the film was more dull than witty`, `... less dull than witty`: "less" turns the comparison round."""
    first, less = _coin(rng), _coin(rng)
    pair = f"{_adjective(rng, first)} than {_adjective(rng, not first)}"
    return f"the {rng.choice(_NOUNS)} was {'less' if less else 'more'} {pair}", first != less


def _expectation(rng: random.Random) -> Phrase:
    """`we expected a dull film and got a witty one`: what came counts, whichever is told first."""
    hoped, positive = _coin(rng), _coin(rng)
    noun, expected, got = rng.choice(_NOUNS), _adjective(rng, hoped), _adjective(rng, positive)
    if _coin(rng):
        return f"we expected some {expected} {noun} and got some {got} one", positive
    return f"we got some {got} {noun} and expected some {expected} one", positive


def _double_negation(rng: random.Random) -> Phrase:
    """`nobody would say that A`: not A, also where A is itself a negation."""
    clause, positive = _clause(rng)
    return f"{rng.choice(_DOUBLE_NEGATIONS)} {clause}", not positive


_SENTENCES: dict[Callable[[random.Random], Phrase], int] = {
    _plain: 6,
    _negated: 2,
    _neither: 1,
    _opinion: 4,
    _contrast: 5,
    _concession: 5,
    _relative: 2,
    _comparison: 1,
    _expectation: 2,
    _double_negation: 2,
}


def demo_sentences(size: int, seed: int = 0) -> list[tuple[str, int]]:
    """Draws sentences of the grammar, all different, with the labels 0, 1, 0, 1, ...

    Args:
        size: How many sentences.
        seed: Of Python's own generator: the same seed gives the same sentences.

    Returns:
        Pairs of a sentence (lower case, single spaces, at most `MAX_WORDS` words) and its label.

    Raises:
        ValueError: If `size` is negative.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    rng = random.Random(seed)
    builders, weights = list(_SENTENCES), list(_SENTENCES.values())
    seen: set[str] = set()
    drawn: list[tuple[str, int]] = []
    while len(drawn) < size:
        (build,) = rng.choices(builders, weights=weights)
        sentence, positive = build(rng)
        if sentence in seen or positive != len(drawn) % 2:
            continue
        seen.add(sentence)
        drawn.append((sentence, int(positive)))
    return drawn


def _to_dataset(rows: Sequence[tuple[str, int]]) -> Dataset:
    columns = {"sentence1": [sentence for sentence, _ in rows], "label": [label for _, label in rows]}
    features = Features({"sentence1": Value("string"), "label": ClassLabel(names=list(LABELS))})
    return Dataset.from_dict(columns, features=features)


def demo_dataset(train_size: int = 8000, validation_size: int = 1000, seed: int = 0) -> DatasetDict:
    """The demo task: disjoint splits `train` and `validation` with the columns `sentence1` and `label`.

    Raises:
        ValueError: If a size is not an even number of at least 2 (both labels come equally often).
    """
    for name, size in (("train_size", train_size), ("validation_size", validation_size)):
        if size < 2 or size % 2:
            raise ValueError(f"{name} must be an even number of at least 2, got {size}")
    rows = demo_sentences(train_size + validation_size, seed)
    return DatasetDict(train=_to_dataset(rows[:train_size]), validation=_to_dataset(rows[train_size:]))


def build_demo_tokenizer(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows the words of `sentences` and frames them as BERT does.

    The special tokens have the ids 0 to 3 in the order of `SPECIAL_TOKENS`, the words follow alphabetically.

    Raises:
        ValueError: If `sentences` contains no word.
    """
    words = sorted({word for sentence in sentences for word in sentence.lower().split()})
    if not words:
        raise ValueError("the tokenizer needs at least one sentence with a word in it")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=2 * MAX_WORDS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def demo_model_config(vocab_size: int) -> BertConfig:
    """A two-layer BERT, small enough to be trained from scratch on a laptop in under a minute."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=2 * MAX_WORDS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )


def bag_of_words_accuracy(dataset: DatasetDict) -> float:
    """Validation accuracy of a logistic regression on word counts: what the words say without their order."""
    classifier = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
    classifier.fit(list(dataset["train"]["sentence1"]), list(dataset["train"]["label"]))
    return float(classifier.score(list(dataset["validation"]["sentence1"]), list(dataset["validation"]["label"])))
