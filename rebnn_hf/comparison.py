"""Models side by side: bytes, operations, scores and measured times of a float model and its 1-bit ones, `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .flops import operations
from .notebook import html_table
from .patching import saved_config
from .report import summary
from .timing import Contender, cell, interleave, quartiles, table

TOKENS = 128
"""Length of the sequence whose operations are counted where no inputs say it."""


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: in the table.
        parameters: values of the float model.
        bytes: of its tensors in a file; of a latent model, once packed.
        macs: multiply-accumulates of one sequence or image; None where they could not be counted.
        equivalent_flops: see `flops`; an ideal that compares methods, never a measured speed.
        milliseconds: median of a call on the inputs; None where nothing was measured.
        quartiles: first and third.
        scores: by name, as they were given.
    """

    name: str
    parameters: int
    bytes: int
    macs: int | None
    equivalent_flops: float | None
    milliseconds: float | None
    quartiles: tuple[float, float] | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; `print`, and a notebook, show it as a table with ratios to the first model.

    Attributes:
        rows: one per model.
        counted: what operations were counted for, or why they were not.
        measured: what times were measured on; empty where none were.
    """

    rows: list[ComparedModel]
    counted: str
    measured: str

    def to_dict(self) -> dict:
        """Rows and conditions as plain data for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "counted": self.counted, "measured": self.measured}

    def __str__(self) -> str:
        return "\n".join([table(self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        rows = self._table()
        return html_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows], (0,), self._notes())

    def _table(self) -> list[dict[str, float | str]]:
        return [_cells(row, self.rows[0]) for row in self.rows]

    def _notes(self) -> list[str]:
        counted = f"{self.counted}; an ideal for comparing methods (see rebnn_hf.operations), never a measured speed."
        notes = [self.counted if self.rows[0].macs is None else f"Equivalent FLOPs: of {counted}"]
        return notes + ([f"Times: medians, {self.measured}."] if self.measured else [])


def compare(
    *models: PreTrainedModel,
    names: Sequence[str] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    rounds: int = 9,
) -> Comparison:
    """Compare models in bytes, operations, scores and, on given inputs, in measured time.

    Times are taken in turns, all models in each round, with the threads of torch and in eval mode: ratios hold on a
    busy machine, too. Scores are yours; nothing is evaluated here.

    Args:
        *models: two or more; the first, usually the float one, is what the others are compared with.
        names: for the table; default: the state of each, and the bits of its weights and activations.
        inputs: as for `model(**inputs)`, the same for all; without them nothing is measured, and operations are
            counted for a sequence of 128 tokens.
        scores: by name, one for each model.
        rounds: turns of each model.

    Returns:
        `print` shows a table, `.to_dict()` is JSON, `rebnn_hf.plot_tradeoff` draws it.

    Raises:
        TypeError: not a transformers model.
        ValueError: fewer than two models, as many names or scores as there are not models, or equal names.

    Example:
        >>> print(rebnn_hf.compare(teacher, model, inputs=batch, scores={"accuracy": (0.899, 0.897)}))
    """
    names = _checked_names(models, names)
    scores = {} if scores is None else scores
    for name, values in scores.items():
        _require_one_each(values, models, f"scores[{name!r}]")
    counts, counted = _operations(models, inputs)
    times = {} if inputs is None else _times(dict(zip(names, models, strict=True)), inputs, rounds)
    rows = []
    for index, (name, model) in enumerate(zip(names, models, strict=True)):
        totals = summary(model).totals
        low, middle, high = (1e3 * value for value in quartiles(times[name])) if times else (None,) * 3
        rows.append(
            ComparedModel(
                name=name,
                parameters=totals["parameters"],
                bytes=totals["bytes_packed"],
                macs=counts[index]["macs"] if counts else None,
                equivalent_flops=counts[index]["equivalent_flops"] if counts else None,
                milliseconds=middle,
                quartiles=(low, high) if times else None,
                scores={key: values[index] for key, values in scores.items()},
            )
        )
    return Comparison(rows, counted, "" if inputs is None else _conditions(inputs, rounds))


def _cells(row: ComparedModel, first: ComparedModel) -> dict[str, float | str]:
    cells = {"model": row.name, "MB": row.bytes / 1e6, "x smaller": first.bytes / row.bytes}
    if row.equivalent_flops is not None:
        cells["equivalent GFLOPs"] = row.equivalent_flops / 1e9
        cells["x fewer"] = first.equivalent_flops / row.equivalent_flops
    if row.milliseconds is not None:
        low, high = row.quartiles
        cells |= {"ms": row.milliseconds, "q1": low, "q3": high, "x faster": first.milliseconds / row.milliseconds}
    return cells | row.scores


# Checks


def _checked_names(models: Sequence[PreTrainedModel], names: Sequence[str] | None) -> list[str]:
    for model in models:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"compare() expects transformers models, got {type(model).__name__}.")
    if len(models) < 2:
        raise ValueError(f"compare() expects two models or more, got {len(models)}.")
    if names is not None:
        _require_one_each(names, models, "names")
    names = [_state(model) for model in models] if names is None else list(names)
    if len(set(names)) < len(names):
        raise ValueError(f"the models would be called {', '.join(names)}; give each a name of its own: names=(...).")
    return names


def _require_one_each(values: Sequence, models: Sequence, what: str) -> None:
    if isinstance(values, str) or len(values) != len(models):
        raise ValueError(f"{what} must have one entry for each of the {len(models)} models, got {values!r}.")


def _state(model: PreTrainedModel) -> str:
    config = saved_config(model)
    if config is None:
        return "float"
    return f"{config.state} W1A{32 if config.activation == 'none' else config.activation_bits}"


# What is counted and measured


def _operations(models, inputs: Mapping[str, Tensor] | None) -> tuple[list[dict[str, float]], str]:
    """Totals of each model, and what they were counted for or why they were not."""
    given = {} if inputs is None else inputs
    sizes = {"tokens": given["input_ids"].shape[-1] if "input_ids" in given else TOKENS}
    if "pixel_values" in given:
        sizes["image_size"] = tuple(given["pixel_values"].shape[-2:])
    try:
        found = [operations(model, **sizes) for model in models]
    except ValueError as reason:
        return [], f"Operations were not counted: {reason}"
    return [each.totals for each in found], found[0].inputs


def _times(models: Mapping[str, PreTrainedModel], inputs: Mapping[str, Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each round, by name."""
    contenders = [Contender(name, partial(model, **inputs)) for name, model in models.items()]
    with _evaluating(models.values()), torch.inference_mode():
        return interleave(contenders, rounds)


@contextmanager
def _evaluating(models) -> Iterator[None]:
    """All in eval mode for the time of a `with` block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _conditions(inputs: Mapping[str, Tensor], rounds: int) -> str:
    sizes = " x ".join(str(size) for size in next(iter(inputs.values())).shape)
    return f"{rounds} rounds of all models in turns, inputs of {sizes}, {torch.get_num_threads()} thread(s)"
