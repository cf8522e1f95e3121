"""Data augmentation for `glue.py` and `embedder.py`: new sentences for the distillation, by replacing words (TinyBERT).

TinyBERT (arXiv 1909.10351, algorithm 1) makes N new sentences of every training sentence. Each word is replaced with
probability p by one of K candidates, all equally likely. For a word of a single word piece the candidates are the most
likely words of a masked language model in its place. For a word of several pieces TinyBERT takes the nearest words by
GloVe vectors; here they are the nearest by cosine similarity of the encoder's own input embeddings, of which the word
has the mean over its pieces. An encoder without a masked-language-model head gives embedding neighbours for all words.

What this module decides beyond that:

- Only content words are replaced, and never by themselves, so that p is the probability of a change
  (`augmentation_candidates` says what a word is).
- Of a sentence pair one sentence, drawn anew for every new pair, is changed. What such a task asks is how the two
  relate: replaced on both sides, words that they share would hardly ever survive on both.
- A new example carries the label of the example it was made of. The losses against the teacher do not read it, the
  teacher answers for the new sentence itself; `--label_weight` does, and there it is only as right as the
  replacements are harmless.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from augmentation_candidates import (
    CandidateFinder,
    Encoder,
    Sentence,
    Vocabulary,
    Word,
    check_vocabulary,
    load_encoder,
    read_sentences,
)
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from recipe_arguments import AugmentationArguments
from recipe_folder import read_json, write_json
from recipe_job import Job, digest
from tqdm.auto import tqdm

FOLDER = "augmented"
RECORD_FILE = "augmentation.json"
ROWS = 256  # training examples worked on together


# ------------------------------------------------------------------------------------------- the student's training set


def student_tokens(job: Job) -> tuple[Dataset, dict[str, Any]]:
    """The student's training set as token ids, with the new examples at its end, and what to record about them."""
    original = job.tokens["train"]
    if not job.arguments.augmentation.augment:
        return original, {}
    examples, record = augmented_examples(job)
    new = job.tokenized(DatasetDict(train=examples))["train"]
    return concatenate_datasets([original, new]), {"augmentation": record}


def check_augmentation(job: Job) -> None:
    """Refuses a model, tokenizer or vocabulary that cannot be used before the teacher is trained, not after."""
    options, teacher = job.arguments.augmentation, job.arguments.teacher
    if not options.augment:
        return
    if options.augmentation_model is None and teacher.source is None:  # the demo's, of which there is a tokenizer yet
        check_vocabulary(Vocabulary(job.tokenizer), options.augmentation_candidates, "the demo")
    else:
        encoder = load_encoder(job)
        check_vocabulary(Vocabulary(encoder.tokenizer), options.augmentation_candidates, encoder.source)


def augmented_examples(job: Job) -> tuple[Dataset, dict[str, Any]]:
    """The new examples and how they were made; made once and then read from the output folder."""
    folder = job.run.root / FOLDER
    settings = cache_settings(job)
    finished = (read_json(folder / RECORD_FILE) or {}).get("settings") == settings
    job.process.wait_for_everyone()  # all have looked before anyone writes
    if not finished:
        make_examples(job, folder, settings)
    record = read_json(folder / RECORD_FILE)["record"]
    job.process.print(f"augmentation: {'read again' if finished else 'made'}, {describe(record)}")
    return load_from_disk(str(folder)), record


def cache_settings(job: Job) -> dict[str, Any]:
    """Everything the new examples depend on; those of the teacher, because its embeddings may be the ones in use."""
    return job.arguments.stage_settings(digest(job.data))["teacher"] | asdict(job.arguments.augmentation)


def describe(record: Mapping[str, Any]) -> str:
    """One line for the console."""
    line = f"{record['examples']} new examples, {record['model']}: {record['single_piece_words']}"
    if record["reason"] is None:
        return f"{line}, for words of several pieces {record['several_piece_words']}"
    return f"{line} for ALL words, since {record['reason']}"


# ------------------------------------------------------------------------------------------------- making and keeping


def make_examples(job: Job, folder: Path, settings: dict[str, Any]) -> None:
    """Every process makes its share; the main process joins them and puts the whole in place in one step."""
    start = time.time()
    draft = folder.with_name(f"{folder.name}.draft")
    if job.process.is_main_process:
        for old in filter(Path.exists, (draft, folder)):
            shutil.rmtree(old)
    job.process.wait_for_everyone()
    encoder = load_encoder(job)
    share = make_share(job, encoder)
    share.save_to_disk(str(draft / f"share-{job.process.process_index}"))
    job.process.wait_for_everyone()
    if job.process.is_main_process:
        shares = [load_from_disk(str(draft / f"share-{index}")) for index in range(job.process.num_processes)]
        whole = concatenate_datasets(shares)
        whole.save_to_disk(str(draft / "whole"))
        record = {"examples": len(whole), **encoder.record(), "seconds": time.time() - start}
        write_json(draft / "whole" / RECORD_FILE, {"settings": settings, "record": record})
        os.replace(draft / "whole", folder)
        shutil.rmtree(draft)
    job.process.wait_for_everyone()


def make_share(job: Job, encoder: Encoder) -> Dataset:
    """The new examples of a contiguous part of the training set, this process's."""
    train, process = job.data["train"], job.process
    bounds = [len(train) * index // process.num_processes for index in range(process.num_processes + 1)]
    numbers = range(bounds[process.process_index], bounds[process.process_index + 1])
    augmenter = Augmenter(encoder, job.arguments, job.task.sentence_columns)
    parts = [train.select([])]  # a share may be empty
    with tqdm(total=len(numbers), desc="augmenting", unit=" examples", disable=not process.is_main_process) as bar:
        for start in numbers[::ROWS]:
            some = range(start, min(start + ROWS, numbers.stop))
            table = augmenter.examples(train[some.start : some.stop], some)
            parts.append(Dataset.from_dict(table, features=train.features))
            bar.update(len(some))
    return concatenate_datasets(parts)


@dataclass(frozen=True)
class Draw:
    """What happens to one new example.

    Attributes:
        row: The example it is made of, counted from the first of those worked on together.
        column: Which sentence of it is changed.
        ranks: For every word to be replaced, by its place among the words, which of the K candidates replaces it.
    """

    row: int
    column: str
    ranks: dict[int, int]


class Augmenter:
    """Draws the words to be replaced and replaces them.

    Args:
        encoder: What gives the candidates.
        arguments: The command line: how many sentences, probability, candidates, seed, longest input.
        columns: The sentence columns.
    """

    def __init__(self, encoder: Encoder, arguments: Any, columns: Sequence[str]):
        self.options: AugmentationArguments = arguments.augmentation
        self.seed = arguments.run.seed
        self.max_length = arguments.data.max_length
        self.columns = columns
        self.tokenizer = encoder.tokenizer
        self.finder = CandidateFinder(encoder, self.options.augmentation_candidates)

    def examples(self, rows: Mapping[str, list], numbers: Sequence[int]) -> dict[str, list]:
        """The new examples of `rows`, those of one row together, with all of their columns.

        Args:
            rows: Examples by column.
            numbers: Their numbers in the training set; with the seed they decide what is drawn.
        """
        texts = list(dict.fromkeys(text for column in self.columns for text in rows[column]))
        read = dict(zip(texts, read_sentences(texts, self.tokenizer, self.max_length), strict=True))
        draws = [draw for row, number in enumerate(numbers) for draw in self._draws(rows, row, number, read)]
        queries = [(read[rows[draw.column][draw.row]], place) for draw in draws for place in draw.ranks]
        queries = [(sentence, sentence.words[place]) for sentence, place in queries]
        candidates = iter(self.finder.find(queries))  # in the order of the queries
        table: dict[str, list] = {column: [values[draw.row] for draw in draws] for column, values in rows.items()}
        for index, draw in enumerate(draws):
            sentence = read[table[draw.column][index]]
            new = {sentence.words[place]: next(candidates)[rank] for place, rank in draw.ranks.items()}
            table[draw.column][index] = replace_words(sentence.text, new)
        return table

    def _draws(self, rows: Mapping[str, list], row: int, number: int, read: Mapping[str, Sentence]) -> Iterator[Draw]:
        rng = np.random.default_rng((self.seed, number))  # its own: no row depends on those before it
        for _ in range(self.options.augment):
            column = self.columns[rng.integers(len(self.columns))]
            count = len(read[rows[column][row]].words)
            replaced = rng.random(count) < self.options.augmentation_probability
            ranks = rng.integers(self.options.augmentation_candidates, size=count)
            yield Draw(row, column, {int(place): int(ranks[place]) for place in np.flatnonzero(replaced)})


def replace_words(text: str, new: Mapping[Word, str]) -> str:
    """`text` with some of its words replaced."""
    for word in sorted(new, key=lambda word: word.start, reverse=True):  # from the end: what is left keeps its place
        text = text[: word.start] + new[word] + text[word.end :]
    return text
