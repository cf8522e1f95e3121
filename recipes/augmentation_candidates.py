"""Words that may take the place of a word, for `augmentation`: which words may be replaced, and by which others.

Words are runs of letters, at least two; numbers, punctuation, contractions and the function words of English keep the
sentence together and stay. A candidate is a whole word of the vocabulary of the same kind, and never the word itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from recipe_job import Job, load_pretrained
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SCORES = 2**26  # numbers (256 MiB) that the scores of one batch over the vocabulary may take
KNOWN = 2**18  # words whose candidates are kept for sentences that come again

WORD = re.compile(r"\w+(?:['’]\w+)*")
FUNCTION_WORDS = frozenset(
    word
    for words in (
        # articles, determiners, quantifiers
        "a an the this that these those each every either neither some any no all both half few fewer many much more "
        "most less least several enough such other another own same one two three four five six seven eight nine ten",
        # pronouns
        "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself "
        "we us our ours ourselves they them their theirs themselves who whom whose which what whoever whatever "
        "whichever someone somebody something anyone anybody anything everyone everybody everything nobody nothing "
        "none",
        # auxiliary verbs
        "am is are was were be been being have has had having do does did doing done will would shall should can "
        "could may might must ought cannot",
        # negation and degree
        "not never nor hardly too very so quite rather almost only just even also again still yet",
        # prepositions
        "about above across after against along among around as at before behind below beneath beside between beyond "
        "by despite down during except for from in inside into like near of off on onto out outside over past per "
        "since than through throughout till to toward towards under until up upon via with within without",
        # conjunctions and adverbs that stand for something said elsewhere
        "and but or if unless because although though while whereas whether when whenever where wherever why how "
        "however then there here now once thus therefore",
    )
    for word in words.split()
)


# --------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Word:
    """A word that may be replaced.

    Attributes:
        start: Its first character in the text.
        end: The character after its last.
        position: Its first token.
        pieces: Its token ids.
    """

    start: int
    end: int
    position: int
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Sentence:
    """A text, its token ids with the special ones, and its words that may be replaced."""

    text: str
    tokens: list[int]
    words: list[Word]


def read_sentences(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sentence]:
    """Finds the words that may be replaced; those behind `max_length` tokens, which no model reads, are left alone."""
    length = min(max_length, tokenizer.model_max_length)
    encodings = tokenizer(list(texts), truncation=True, max_length=length).encodings
    return [
        Sentence(text, list(encoding.ids), list(find_words(text, encoding, tokenizer.unk_token_id)))
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def find_words(text: str, encoding: Any, unknown: int | None) -> Iterator[Word]:
    """The words of `text` that may be replaced, with their tokens in its `tokenizers.Encoding`.

    Left alone is also what the tokenizer does not know (an unknown token has no neighbours) or does not keep apart
    from its surroundings.
    """
    for match in WORD.finditer(text):
        word = re.sub(r"['’][sS]$", "", match.group())
        if not is_replaceable(word):
            continue
        start, end = match.start(), match.start() + len(word)
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:  # cut off
            continue
        pieces = tuple(encoding.ids[first : last + 1])
        covered = text[encoding.offsets[first][0] : encoding.offsets[last][1]].strip()
        if covered == word and unknown not in pieces:
            yield Word(start, end, first, pieces)


def is_replaceable(word: str) -> bool:
    """Whether `word` is a content word; what contains an apostrophe (`don't`) or a digit is not."""
    return len(word) > 1 and word.isalpha() and word.lower() not in FUNCTION_WORDS


class Vocabulary:
    """The tokens that are whole words and may replace another.

    Attributes:
        ids: Their ids, `[words]`.
        words: Their texts, in the same order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        whole = whole_words(tokenizer)
        self.ids = torch.tensor(list(whole), dtype=torch.long)
        self.words = list(whole.values())
        self.spellings: dict[str, list[int]] = {}
        for index, word in enumerate(self.words):
            self.spellings.setdefault(word.lower(), []).append(index)

    def best(self, scores: Tensor, words: Sequence[str], count: int) -> list[list[str]]:
        """The words with the `count` highest scores, best first.

        Args:
            scores: Of every word of the vocabulary, `[queries, words]`; overwritten.
            words: What each of the queries is to be replaced by something other than, however it is capitalised.
            count: How many.
        """
        own = [(row, index) for row, word in enumerate(words) for index in self.spellings.get(word.lower(), ())]
        rows, indices = torch.tensor(own, dtype=torch.long, device=scores.device).reshape(-1, 2).T
        scores[rows, indices] = -torch.inf
        return [[self.words[index] for index in row] for row in scores.topk(count).indices.tolist()]


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that a content word inside a sentence becomes as a whole, by id.

    How a vocabulary marks the beginning or the inside of a word differs between tokenizers, so each token's text is
    tokenized again, behind another word.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = {index: tokenizer.decode([index]).strip() for index in ids}
    words = {index: word for index, word in words.items() if is_replaceable(word)}
    before = tokenizer("the", add_special_tokens=False)["input_ids"]
    texts = [f"the {word}" for word in words.values()]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {
        index: word for (index, word), found in zip(words.items(), tokens, strict=True) if found == [*before, index]
    }


def check_vocabulary(vocabulary: Vocabulary, count: int, source: str) -> None:
    """Refuses a vocabulary, that of `source`, in which a word has not so many candidates.

    Raises:
        SystemExit: Then.
    """
    if len(vocabulary.spellings) <= count:
        raise SystemExit(
            f"--augmentation_candidates {count} needs a vocabulary of more than {count} content words, but that of "
            f"{source} has {len(vocabulary.spellings)}: ask for fewer candidates, or pass another --augmentation_model."
        )


# ---------------------------------------------------------------------------------------------------------- candidates


class CandidateFinder:
    """Finds the words that may take the place of a word.

    Args:
        encoder: Its masked language model, or where it has none its input embeddings, are asked.
        count: How many candidates a word has (K).

    Raises:
        SystemExit: If the vocabulary has too few words.
    """

    def __init__(self, encoder: Encoder, count: int):
        self.encoder = encoder
        self.count = count
        self.vocabulary = Vocabulary(encoder.tokenizer)
        check_vocabulary(self.vocabulary, count, encoder.source)
        self.neighbours = normalize(encoder.embeddings[self.vocabulary.ids.to(encoder.embeddings.device)].float())
        self.known: dict[tuple, list[str]] = {}

    def find(self, queries: Sequence[tuple[Sentence, Word]]) -> list[list[str]]:
        """The candidates of words in their sentences, best first; each distinct question is asked once."""
        keys = [self._key(sentence, word) for sentence, word in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self.known}
        for ask, by_context in ((self._masked, True), (self._neighbours, False)):
            asked = {key: query for key, query in new.items() if self._by_context(query[1]) == by_context}
            if asked:
                self.known |= zip(asked, ask(list(asked.values())), strict=True)
        found = [self.known[key] for key in keys]
        if len(self.known) > KNOWN:
            self.known.clear()
        return found

    def _by_context(self, word: Word) -> bool:
        return self.encoder.model is not None and len(word.pieces) == 1

    def _key(self, sentence: Sentence, word: Word) -> tuple:
        """The candidates by the masked language model belong to a place in a sentence, neighbours to a word."""
        return (sentence.text, word.start) if self._by_context(word) else word.pieces

    def _neighbours(self, queries: Sequence[tuple[Sentence, Word]]) -> list[list[str]]:
        size = max(1, SCORES // len(self.neighbours))
        found = []
        for start in range(0, len(queries), size):
            some = queries[start : start + size]
            means = [self.encoder.embeddings[list(word.pieces)].float().mean(0) for _, word in some]
            scores = normalize(torch.stack(means)) @ self.neighbours.T
            found += self.vocabulary.best(scores, _texts(some), self.count)
        return found

    def _masked(self, queries: Sequence[tuple[Sentence, Word]]) -> list[list[str]]:
        found: list[list[str]] = [[]] * len(queries)
        for batch in self._batches([len(sentence.tokens) for sentence, _ in queries]):
            some = [queries[index] for index in batch]
            best = self.vocabulary.best(self._mask_scores(some), _texts(some), self.count)
            for index, candidates in zip(batch, best, strict=True):
                found[index] = candidates
        return found

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Queries of similar length, as many as keep the scores of all of their tokens within bounds."""
        tokens = SCORES // self.encoder.model.config.vocab_size
        batch: list[int] = []
        for index in np.argsort(lengths, kind="stable").tolist():
            if batch and (len(batch) + 1) * lengths[index] > tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _mask_scores(self, queries: Sequence[tuple[Sentence, Word]]) -> Tensor:
        """Logits of the vocabulary's words in the place of each query's word, `[queries, words]`."""
        encoder, device = self.encoder, self.encoder.model.device
        masked = [torch.tensor(sentence.tokens, device=device) for sentence, _ in queries]
        positions = [word.position for _, word in queries]
        for tokens, position in zip(masked, positions, strict=True):
            tokens[position] = encoder.tokenizer.mask_token_id
        attention = pad_sequence([torch.ones_like(tokens) for tokens in masked], batch_first=True)
        inputs = pad_sequence(masked, batch_first=True, padding_value=encoder.tokenizer.pad_token_id)
        logits = encoder.model(input_ids=inputs, attention_mask=attention).logits
        return logits[range(len(masked)), positions][:, self.vocabulary.ids.to(device)].float()


def _texts(queries: Sequence[tuple[Sentence, Word]]) -> list[str]:
    return [sentence.text[word.start : word.end] for sentence, word in queries]


# ------------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class Encoder:
    """The model that knows which words are alike.

    Attributes:
        source: Its name or folder.
        tokenizer: Its tokenizer.
        embeddings: Its input word embeddings, `[vocabulary, features]`.
        model: It, as a masked language model; None if it cannot be used as one.
        reason: Why it cannot.
    """

    source: str
    tokenizer: PreTrainedTokenizerBase
    embeddings: Tensor
    model: PreTrainedModel | None
    reason: str | None

    def record(self) -> dict[str, Any]:
        """What to record about it."""
        neighbours = "embedding neighbours"
        return {
            "model": self.source,
            "single_piece_words": neighbours if self.model is None else "masked language model",
            "several_piece_words": neighbours,
            "reason": self.reason,
        }


def load_encoder(job: Job) -> Encoder:
    """The model of `--augmentation_model`, or else the one the teacher comes from, or else the teacher.

    Raises:
        SystemExit: If it cannot be loaded, its tokenizer gives no offsets, or `--augmentation_model` is no masked
            language model.
    """
    named = job.arguments.augmentation.augmentation_model
    pretrained = None if job.arguments.teacher.teacher else job.arguments.teacher.model_name_or_path
    source = str(named or pretrained or job.teacher_folder)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source)
    if not tokenizer.is_fast:
        raise SystemExit(
            f"--augment needs a fast tokenizer, which knows where in a text its tokens are, but that of {source} is "
            f"{type(tokenizer).__name__}: pass another --augmentation_model."
        )
    model, reason = load_masked_lm(source, tokenizer)
    if named is not None and reason is not None:
        raise SystemExit(
            f"--augmentation_model {named} cannot be used: {reason}. Pass a masked language model, or leave the option "
            "out to replace words by their embedding neighbours where the encoder has no such head."
        )
    model = model.to(job.process.device).eval()
    embeddings = model.get_input_embeddings().weight.detach()
    return Encoder(source, tokenizer, embeddings, model if reason is None else None, reason)


def load_masked_lm(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, str | None]:
    """The model, and why it cannot be used as a masked language model; None if it can.

    transformers initialises at random what a file lacks; only the loading info tells.

    Raises:
        SystemExit: If the file lacks even the word embeddings.
    """
    config = load_pretrained(AutoConfig.from_pretrained, source)
    has_class = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its warning of missing weights; the reason given here says it
    try:
        loader = (AutoModelForMaskedLM if has_class else AutoModel).from_pretrained
        model, info = load_pretrained(loader, source, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    embeddings = model.get_input_embeddings().weight
    if any(parameter is embeddings and name in missing for name, parameter in model.named_parameters()):
        raise SystemExit(
            f"{source} has no word embeddings for {type(model).__name__}: pass another model to --augment."
        )
    if not has_class:
        return model, f"the architecture {config.model_type!r} has no masked-language-model head"
    if missing:
        return model, f"it has no masked-language-model head ({len(missing)} weights are missing, like {missing[0]})"
    if tokenizer.mask_token is None:
        return model, "its tokenizer has no mask token"
    return model, None
