"""What a grid found, as tables: means with their spread over seeds, and paired differences from a baseline.

Two methods of one seed saw the same batches. Their difference is taken seed by seed, so that what a seed does to both
drops out, and then averaged.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ablation_methods import METHODS
from glue_tasks import get_task
from recipe_folder import final_stage

NOTHING = "–"
Values = Mapping[int, float]  # one for each seed


@dataclass(frozen=True)
class Row:
    """What the tables keep of a run; its fields are the columns of ablation.csv.

    Attributes:
        score: Of the student, in the task's main metric.
        scored: Which form of the student that is: packed, or latent where nothing can be packed.
        teacher: The same of the float teacher.
        loss: Training loss in the last tenth of the steps.
        flips: Sign changes per weight over the run.
        late_flips: Share of the weights that flip in a step of the last tenth.
        flip_backs: Flips that the next step takes back, per weight over the run.
        steps: Of the distillation.
        seconds: Of the whole run.
    """

    task: str
    method: str
    seed: int
    metric: str
    scored: str
    score: float
    teacher: float
    loss: float
    flips: float
    late_flips: float
    flip_backs: float
    steps: int
    seconds: float
    hardware: str


def row_of(task: str, method: str, seed: int, results: Mapping[str, Any]) -> Row:
    """The row of a run that left `results`."""
    metric = get_task(task).main_metric
    scores, oscillation, hardware = results["scores"], results["oscillation"], results["hardware"]
    scored = final_stage(results)
    return Row(
        task=task,
        method=method,
        seed=seed,
        metric=metric,
        scored=scored,
        score=scores[scored][metric],
        teacher=scores["teacher"][metric],
        loss=oscillation["late_loss"],
        flips=oscillation["flips_per_weight"],
        late_flips=oscillation["late_flip_ratio"],
        flip_backs=oscillation["flip_backs_per_weight"],
        steps=sum(count for stage, count in results["steps"].items() if stage != "teacher"),
        seconds=round(sum(results["seconds"].values()), 1),
        hardware=hardware["accelerator"] or f"{hardware['cpu']} (threads: {hardware['threads']})",
    )


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """One line a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def summary(rows: Sequence[Row], tasks: Sequence[str], methods: Sequence[str], baseline: str) -> str:
    """Methods by tasks: scores, their average over the tasks, and that as a share of the teacher's average."""
    head = ["method", *tasks, "average", f"minus {baseline}, paired", "of the teacher", "seeds"]
    teachers = {row.task: row.teacher for row in rows}
    teacher_cells = [f"{teachers[task]:.4f}" if task in teachers else NOTHING for task in tasks]
    complete = len(teachers) == len(tasks)
    teacher_cells.append(f"{statistics.mean(teachers.values()):.4f}" if complete else NOTHING)
    body = [["float teacher", *teacher_cells, "", "100.0 %" if complete else NOTHING, ""]]
    reference = averages(rows, tasks, baseline, "score")
    for method in methods:
        scores, teacher = (averages(rows, tasks, method, column) for column in ("score", "teacher"))
        shares = [100 * score / teacher[seed] for seed, score in scores.items() if teacher[seed]]
        body.append(
            [
                method,
                *(spread(by_seed(rows, task, method, "score").values(), ".4f") for task in tasks),
                spread(scores.values(), ".4f"),
                NOTHING if method == baseline else spread(differences(scores, reference), "+.4f"),
                spread(shares, ".1f", " %"),
                str(len(scores)),
            ]
        )
    return markdown(head, body)


def task_table(rows: Sequence[Row], task: str, methods: Sequence[str], baseline: str) -> str:
    """One task: score, loss and flips of each method, with their differences from the baseline.

    A preset may bring distillation losses of its own, whose values say nothing beside those of others.
    """
    minus = f"minus {baseline}, paired"
    head = ["method", "score", minus, "loss, last tenth", minus, "sign changes per weight", minus]
    head += ["per step, last tenth", "there and back per weight", "seeds"]
    body = []
    for method in methods:
        cells = [method]
        for column, form in (("score", ".4f"), ("loss", ".4f"), ("flips", ".3f")):
            mine, reference = (by_seed(rows, task, name, column) for name in (method, baseline))
            comparable = column != "loss" or METHODS[method].same_losses(METHODS[baseline])
            difference = spread(differences(mine, reference), f"+{form}") if comparable else NOTHING
            cells += [spread(mine.values(), form), NOTHING if method == baseline else difference]
        for column, form in (("late_flips", ".1e"), ("flip_backs", ".4f")):
            cells.append(spread(by_seed(rows, task, method, column).values(), form))
        body.append([*cells, str(len(mine))])
    return markdown(head, body)


def by_seed(rows: Iterable[Row], task: str, method: str, column: str) -> dict[int, float]:
    """A column of the runs of a method on a task."""
    return {row.seed: getattr(row, column) for row in rows if (row.task, row.method) == (task, method)}


def averages(rows: Sequence[Row], tasks: Sequence[str], method: str, column: str) -> dict[int, float]:
    """For each seed the average of a column over all tasks; a seed that lacks a task has none."""
    values = [by_seed(rows, task, method, column) for task in tasks]
    complete = [seed for seed in values[0] if all(seed in one for one in values)]
    return {seed: statistics.mean(one[seed] for one in values) for seed in complete}


def differences(mine: Values, reference: Values) -> list[float]:
    """Paired: seed by seed, for the seeds that both have."""
    return [value - reference[seed] for seed, value in mine.items() if seed in reference]


def spread(values: Iterable[float], form: str, unit: str = "") -> str:
    """`mean ± standard deviation` (of the sample); the mean alone of a single value."""
    values = list(values)
    if not values:
        return NOTHING
    mean = format(statistics.mean(values), form)
    deviation = f" ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
    return f"{mean}{deviation}{unit}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of which every column but the first holds numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
