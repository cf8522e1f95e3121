"""From questions and their contexts to token ids, and back from scores of tokens to text.

A context too long for the model is cut into overlapping windows, each behind the question. Every window knows for its
context tokens which characters they cover: `char_start` (inclusive) and `char_end` (exclusive), both -1 for what is no
context (question, special tokens). A span of tokens is therefore a slice of the context, and nothing else can be
answered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

NO_CONTEXT = -1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses tokenizers that windows cannot be made with.

    Raises:
        ValueError: With what is missing.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens lie in the text: pass a fast one")
    if tokenizer.cls_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no [CLS] token, where windows without an answer point to")
    if tokenizer.padding_side != "right":
        raise ValueError(f"the tokenizer pads on the {tokenizer.padding_side}, which moves answers: set it to right")


def training_windows(rows: dict[str, list], **options: Any) -> dict[str, list]:
    """Windows of a batch of questions, with the first answer as `start_positions` and `end_positions`.

    In a window without the whole answer both point to [CLS]. `options` are those of `cut`.
    """
    encoded = cut(rows, **options)
    spans = []
    for window, question in enumerate(encoded.pop("overflow_to_sample_mapping")):
        text, start = (rows["answers"][question][name][0] for name in ("text", "answer_start"))
        start += len(text) - len(text.lstrip())
        span = find_span(*context_offsets(encoded, window), start, start + len(text.strip()))
        cls = encoded["input_ids"][window].index(options["tokenizer"].cls_token_id)
        spans.append((cls, cls) if span is None else span)
    del encoded["offset_mapping"]
    starts, ends = zip(*spans, strict=True)
    return {**encoded, "start_positions": list(starts), "end_positions": list(ends)}


def validation_windows(rows: dict[str, list], indices: list[int], **options: Any) -> dict[str, list]:
    """Windows of a batch of questions, with the number of the question as `question`, and the offsets."""
    encoded = cut(rows, **options)
    questions = [indices[question] for question in encoded.pop("overflow_to_sample_mapping")]
    offsets = [context_offsets(encoded, window) for window in range(len(questions))]
    del encoded["offset_mapping"]
    char_starts, char_ends = zip(*offsets, strict=True)
    return {**encoded, "question": questions, "char_start": list(char_starts), "char_end": list(char_ends)}


def cut(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> BatchEncoding:
    """Token ids of windows of at most `max_length` tokens; neighbours share `stride` tokens of the context.

    Raises:
        ValueError: If a question leaves no room for a context.
    """
    questions = [question.strip() for question in rows["question"]]
    _check_room(rows["id"], questions, tokenizer, max_length, stride)
    return tokenizer(
        questions,
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _check_room(
    ids: list[str], questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for identity, tokens in zip(ids, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
        room = max_length - special - len(tokens)
        if room <= stride:
            raise ValueError(
                f"question {identity!r} has {len(tokens)} tokens and leaves {room} of {max_length} to the context, "
                f"which must be more than the {stride} that windows share: "
                "choose a greater --max_length or a smaller --stride"
            )


def context_offsets(encoded: BatchEncoding, window: int) -> tuple[list[int], list[int]]:
    """The characters each token of a window covers in the context; `NO_CONTEXT` for other tokens."""
    offsets = zip(encoded.sequence_ids(window), encoded["offset_mapping"][window], strict=True)
    pairs = [span if part == 1 else (NO_CONTEXT, NO_CONTEXT) for part, span in offsets]
    starts, ends = zip(*pairs, strict=True)
    return list(starts), list(ends)


def find_span(char_start: list[int], char_end: list[int], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters from `start` to before `end`; None if they are not all in the window."""
    context = np.flatnonzero(np.asarray(char_start) != NO_CONTEXT)
    starts, ends = np.asarray(char_start)[context], np.asarray(char_end)[context]
    if len(context) == 0 or start < starts[0] or end > ends[-1]:
        return None
    first = np.searchsorted(ends, start, side="right")  # the first token that ends behind the beginning
    last = np.searchsorted(starts, end, side="left") - 1  # the last one that begins before the end
    return int(context[first]), int(context[last])


def best_answers(
    data: Dataset, windows: Dataset, start_logits: np.ndarray, end_logits: np.ndarray, max_answer_length: int
) -> list[str]:
    """The text of the best span of each question over all its windows.

    Args:
        data: The questions, with their `context`.
        windows: What `validation_windows` made of them.
        start_logits: [windows, tokens], padded on the right.
        end_logits: The same for the last token of an answer.
        max_answer_length: Of an answer, in tokens.

    Returns:
        One text for each row of `data`: empty where the context has no tokens.

    Raises:
        ValueError: If a logit is NaN.
    """
    if np.isnan(start_logits).any() or np.isnan(end_logits).any():
        raise ValueError("the model's outputs contain NaN: it has diverged, try a lower learning rate")
    contexts = data["context"][:]
    texts, scores = [""] * len(contexts), [-np.inf] * len(contexts)
    columns = (windows[name] for name in ("question", "char_start", "char_end"))
    for question, char_start, char_end, start, end in zip(*columns, start_logits, end_logits, strict=True):
        context = np.flatnonzero(np.asarray(char_start) != NO_CONTEXT)
        if len(context) == 0:
            continue
        score, first, last = best_span(start[context], end[context], max_answer_length)
        if score > scores[question]:
            scores[question] = score
            texts[question] = contexts[question][char_start[context[first]] : char_end[context[last]]]
    return texts


def best_span(start: np.ndarray, end: np.ndarray, max_answer_length: int) -> tuple[float, int, int]:
    """Score, first and last token of the span with the highest `start[first] + end[last]`.

    All spans with `first <= last < first + max_answer_length` are compared, not only those between a few best starts
    and ends: so there always is one, and none is overlooked. Of equal ones the first and shortest is taken.
    """
    beyond = np.full(max_answer_length - 1, -np.inf, dtype=end.dtype)
    reachable = np.lib.stride_tricks.sliding_window_view(np.concatenate([end, beyond]), max_answer_length)
    scores = start[:, None] + reachable  # [first, last - first]
    first, more = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, more]), int(first), int(first + more)
