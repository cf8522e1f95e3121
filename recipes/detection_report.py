"""What `detection.py` leaves to read: results.json, the model card, plots, and the table on the console."""

from __future__ import annotations

import time
from typing import Any

from detection_job import DetectionJob
from huggingface_hub import EvalResult, ModelCardData
from recipe_folder import read_json, write_json
from recipe_report import MEGABYTE, command, draw_training, hardware, installed_versions, model_bytes, oscillation

from rebnn_hf.checkpoints import STATE_FILE


def write_report(job: DetectionJob) -> None:
    """Writes the plots, the model card and, last, `results.json`: where it exists, everything else does."""
    results = collect(job)
    if job.binary:
        results["oscillation"] = oscillation(read_json(job.run.folder("latent") / STATE_FILE)["log_history"])
        draw_training(job)
    (job.run.folder(job.run.stages[-1]) / "README.md").write_text(model_card(job, results), encoding="utf-8")
    write_json(job.run.results_file, results)


def collect(job: DetectionJob) -> dict[str, Any]:
    """The results of a run whose stages are complete."""
    records = {stage: job.run.record(stage) for stage in job.run.stages}
    results = {
        "task": job.task.name,
        "classes": list(job.task.labels),
        "metric": "COCO's mean average precision (pycocotools), also for annotations in VOC's format",
        "scores": {stage: record["scores"] for stage, record in records.items()},
        "scores_by_class": {stage: record["scores_by_class"] for stage, record in records.items()},
        "bytes": {stage: model_bytes(job.run.folder(stage)) for stage in job.run.stages},
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "steps": {stage: record["steps"] for stage, record in records.items() if "steps" in record},
        "examples": {name: len(images) for name, images in job.data.items()},
        "seed": job.arguments.run.seed,
        "processes": job.process.num_processes,
        "command": command(job),
        "arguments": job.arguments.to_dict(),
        "versions": installed_versions(*job.libraries),
        "hardware": hardware(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    packed = {name: records["packed"][name] for name in ("size", "largest_difference")} if job.binary else {}
    return results | packed


def summary(results: dict[str, Any]) -> str:
    """The table of stages by metrics and size, and that of the classes, as Markdown."""
    stages, metrics = list(results["scores"]), list(next(iter(results["scores"].values())))
    rows = [["model", *metrics, "MB on disk"]]
    for stage, scores in results["scores"].items():
        values = (f"{scores[metric]:.4f}" for metric in metrics)
        rows.append([stage, *values, f"{results['bytes'][stage] / MEGABYTE:.2f}"])
    classes = [["class", *stages]]
    for name in results["scores_by_class"][stages[-1]]:
        classes.append([name, *(f"{results['scores_by_class'][stage][name]:.4f}" for stage in stages)])
    return f"{table(rows)}\n\n{table(classes)}"


def table(rows: list[list[str]]) -> str:
    """Rows, the first of which is the header, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def print_summary(results: dict[str, Any]) -> None:
    """Prints the scores and sizes of the models, and the time each stage took."""
    print("\n" + summary(results))
    seconds = "  ".join(f"{stage} {value:.0f} s" for stage, value in results["seconds"].items())
    print(f"\nwall time: {seconds}  (together {sum(results['seconds'].values()):.0f} s)")


# The model card


def model_card(job: DetectionJob, results: dict[str, Any]) -> str:
    """The README.md of the last stage's folder: what the model is, what was measured, how to load it."""
    machine, versions = results["hardware"], results["versions"]
    layers = f"\n## What is 1-bit\n\n```\n{job.run.record('packed')['layers']}\n```\n" if job.binary else ""
    return f"""---
{card_metadata(job, results).to_yaml()}
---

# {job.title}

{job.about}

## Use

```python
{job.usage}
```
{layers}
## Measured

{summary(results)}

{results["metric"]}: the mean over overlaps from 0.50 to 0.95, first over all classes and then for each. On the
validation split ({results["examples"]["validation"]} images), from one run with seed {results["seed"]}. Made by

```
{results["command"]}
```

on {machine["accelerator"] or machine["cpu"]} with torch {versions["torch"]}, torchvision {versions["torchvision"]},
transformers {versions["transformers"]} and rebnn_hf {versions["rebnn_hf"]}.
"""


def card_metadata(job: DetectionJob, results: dict[str, Any]) -> ModelCardData:
    """The front matter of the model card."""
    scores = [
        EvalResult(
            task_type=job.pipeline_tag,
            dataset_type=job.task.name,
            dataset_name=job.task.title,
            dataset_split="validation",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in results["scores"][job.run.stages[-1]].items()
    ]
    return ModelCardData(
        eval_results=scores,
        library_name=job.library_name,
        license=job.arguments.run.license,
        metrics=list(job.task.metrics),
        model_name=job.model_name,
        pipeline_tag=job.pipeline_tag,
        tags=["rebnn", "1-bit", "binary-neural-network"] if job.binary else ["rebnn"],
    )
