"""What a recipe leaves to read: results.json, the model card, the oscillation plot and the table on the console."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from recipe_folder import final_stage, read_json, write_json
from recipe_job import Job, launcher

import rebnn_hf
from rebnn_hf import model_card, plot_epoch_flips, plot_latent_weights, plot_oscillation
from rebnn_hf.checkpoints import STATE_FILE

MEGABYTE = 1e6


def report(job: Job) -> None:
    """Writes and prints the results, unless a finished run left them."""
    if job.process.is_main_process:
        if not is_reported(job):
            write_report(job)
        print_summary(job.run.results())
    job.process.wait_for_everyone()


def write_report(job: Job) -> None:
    """Writes the plots, the model card and, last, `results.json`: where it exists, everything else does."""
    results = collect(job)
    draw_training(job)
    if "not_packed" not in results:
        card(job, results).save(job.run.folder("packed") / "README.md")
    if "adapter" in results:
        adapter_card(job, results).save(job.run.folder("adapter") / "README.md")
    write_json(job.run.results_file, results)


def draw_training(job: Job) -> None:
    """Draws what signs did in the training of the latent model, in steps and in epochs, and the weights it left."""
    root, latent = job.run.root, job.run.folder("latent")
    log = read_json(latent / STATE_FILE)["log_history"]
    plot_oscillation(log, root / "oscillation.png")
    if any("epoch_flip_ratio" in entry for entry in log):  # a run may be shorter than an epoch
        plot_epoch_flips(log, root / "epoch_flips.png")
    plot_latent_weights(job.load(latent), root / "weights.png")


def is_reported(job: Any) -> bool:
    """Whether a finished run left its report, with the licence that is asked for now."""
    results = job.run.results()
    return results is not None and results["arguments"].get("license") == job.arguments.run.license


def collect(job: Job) -> dict[str, Any]:
    """The results of a run whose stages are complete."""
    records = job.run.records()
    folders = {stage: job.run.folder(stage) for stage in records} | {"teacher": job.teacher_folder}
    if "not_packed" in records["packed"]:
        del folders["packed"]
    sizes = {stage: model_bytes(folder) for stage, folder in folders.items()}
    results = {
        "task": job.task.name,
        "scores": {**early_scores(records), **records["packed"]["scores"]},
        "bytes": sizes,
        **packed_results(records["packed"], sizes),
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "oscillation": oscillation(read_json(job.run.folder("latent") / STATE_FILE)["log_history"]),
        "steps": {stage: record["steps"] for stage, record in records.items() if "steps" in record},
        "examples": {name: len(split) for name, split in job.data.items()},
        "data_digest": job.digest(job.data),
        "config": read_json(job.run.folder(final_stage(records["packed"])) / "config.json")["quantization_config"],
        "augmentation": records["latent"].get("augmentation"),
        "seed": job.arguments.run.seed,
        "processes": job.process.num_processes,
        "command": command(job),
        "arguments": job.arguments.to_dict(),
        "versions": installed_versions(*job.libraries),
        "hardware": hardware(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    rescored = "teacher" in records["packed"]["scores"]  # by other options than its runs, whose weights are gone
    if "run_scores" in records["teacher"] and not rescored:
        results["teacher_run_scores"] = records["teacher"]["run_scores"]
    if "adapter" in records:
        results["adapter"] = {name: records["adapter"][name] for name in ("rank", "parameters")}
    if "embeddings_per_second" in records["packed"]:
        results["embeddings_per_second"] = records["packed"]["embeddings_per_second"]
    results["scores"].update(job.score_baselines())
    return results


def packed_results(record: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """What there is to know of the packed model, or why there is none."""
    if "not_packed" in record:
        return {"not_packed": record["not_packed"]}
    difference = record["max_logit_difference"]
    return {
        "ratio": sizes["teacher"] / sizes["packed"],
        "max_logit_difference": difference,
        "size": record["size"],
    }


def early_scores(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The scores of the stages that were scored when they were made."""
    return {stage: record["scores"] for stage, record in records.items() if stage != "packed" and "scores" in record}


def oscillation(log_history: list[dict[str, float]]) -> dict[str, float]:
    """How often signs changed over the training, and what was left of loss and flips in its last tenth."""
    logs = [log for log in log_history if "flip_ratio" in log]
    steps = [log["step"] - before for log, before in zip(logs, [0, *(log["step"] for log in logs)], strict=False)]
    late = [log for log in logs if log["step"] > 0.9 * logs[-1]["step"]]
    return {
        "flips_per_weight": sum(log["flip_ratio"] * count for log, count in zip(logs, steps, strict=True)),
        "flip_backs_per_weight": sum(log["flip_back_ratio"] * count for log, count in zip(logs, steps, strict=True)),
        "late_flip_ratio": sum(log["flip_ratio"] for log in late) / len(late),
        "late_loss": sum(log["loss"] for log in late) / len(late),
    }


def command(job: Job) -> str:
    """The command that made the results, as it would be typed in a checkout."""
    start = ["python"] if job.process.num_processes == 1 else launcher(job.process)
    return shlex.join([*start, job.script, *job.arguments.argv])


def model_bytes(folder: Path) -> int:
    """Bytes of the weights of a saved model."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def installed_versions(*libraries: ModuleType) -> dict[str, str | None]:
    """Versions of everything a result may depend on."""
    modules = (torch, transformers, accelerate, datasets, rebnn_hf, *libraries)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit this file belongs to, with `-dirty` for uncommitted changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def hardware() -> dict[str, Any]:
    """What it ran on."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if device and device.type == "cuda" else device and device.type,
    }


def _cpu_name() -> str:
    """The processor's name: Linux has it in /proc only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_summary(results: dict[str, Any]) -> None:
    """Prints the scores and sizes of the models, and the time each stage took."""
    print("\n" + summary(results))
    seconds = "  ".join(f"{stage} {value:.0f} s" for stage, value in results["seconds"].items())
    print(f"\nwall time: {seconds}  (together {sum(results['seconds'].values()):.0f} s)")
    if "not_packed" not in results:
        print(f"outputs of packed and latent model differ by at most {results['max_logit_difference']:.2g}")
    if "embeddings_per_second" in results:
        rates = ", ".join(f"{model} {rate:.0f}" for model, rate in results["embeddings_per_second"].items())
        print(f"embeddings per second, side by side: {rates}")


def summary(results: dict[str, Any]) -> str:
    """The table and, where there are any, what there is to know of its adapter and its average of teachers."""
    parts = [summary_table(results)]
    if "not_packed" in results:
        parts.append(f"There is no packed model: {results['not_packed']}")
    if "adapter" in results:
        rank, parameters = results["adapter"]["rank"], results["adapter"]["parameters"]
        size = results["bytes"]["adapter"] / MEGABYTE
        parts.append(f"The adapter is LoRA of rank {rank}: {parameters:,} trained parameters, {size:.2f} MB.")
    runs = results.get("teacher_run_scores")
    if runs is not None:
        scores = (f"{metric} {', '.join(f'{run[metric]:.4f}' for run in runs)}" for metric in runs[0])
        parts.append(f"The teacher is the average of {len(runs)} fine-tunings: {'; '.join(scores)}.")
    return "\n\n".join(parts)


def summary_table(results: dict[str, Any]) -> str:
    """The table of models by metrics and size, as Markdown."""
    scores, sizes = results["scores"], results["bytes"]
    metrics = list(scores[final_stage(results)])
    rows = [["model", *metrics, "MB on disk", "smaller by"]]
    for model in (name for name in ("bag_of_words", *sizes) if name in scores):
        name, size = model, sizes.get(model)
        if model == "adapter":  # it answers together with its base
            name, size = "packed + adapter", sizes["packed"] + size
        sized = [f"{size / MEGABYTE:.2f}", f"{sizes['teacher'] / size:.1f}x"] if size else ["", ""]
        rows.append([name, *(f"{scores[model][metric]:.4f}" for metric in metrics), *sized])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
    return "\n".join(lines)


# The model card


def card(job: Job, results: dict[str, Any]) -> ModelCard:
    """The card of the packed folder: what the model is, what was measured, how to load it."""
    task = job.task
    return model_card(
        job.auto_model.from_pretrained(job.run.folder("packed")),
        title=job.title,
        about=job.about,
        usage=job.usage,
        eval_results=eval_results(job, results["scores"]["packed"]),
        measured=measured(results),
        command=results["command"],
        tags=["binary-neural-network"],
        base_model=job.origin,
        base_model_relation="quantized" if job.origin else None,
        license=job.arguments.run.license,
        datasets=[task.hub_dataset] if task.hub_dataset else None,
        language=task.language,
        library_name=job.library_name,
        metrics=list(task.metrics),
        model_name=job.model_name,
        pipeline_tag=job.pipeline_tag,
    )


def measured(results: dict[str, Any]) -> str:
    """The scores in words: of what, on what, by what."""
    hardware, versions = results["hardware"], results["versions"]
    return f"""{summary(results)}

On the validation split ({results["examples"]["validation"]} examples), from one run with seed {results["seed"]}. The
packed model was scored after reloading this folder; its outputs differ from those of the trained (latent) model by at
most {results["max_logit_difference"]:.1g}. It ran on {hardware["accelerator"] or hardware["cpu"]} with torch
{versions["torch"]}, transformers {versions["transformers"]} and rebnn_hf {versions["rebnn_hf"]}."""


def adapter_card(job: Job, results: dict[str, Any]) -> ModelCard:
    """The card of the adapter's folder; under which name its base will be published, nobody knows yet."""
    metadata = ModelCardData(library_name="peft", license=job.arguments.run.license, tags=["lora", "rebnn"])
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# An adapter for {job.model_name}

Trained on the packed 1-bit model with the data, losses and teacher it was distilled with. The bits are unchanged: the
adapter belongs beside them, and is not to be merged.

```python
import rebnn_hf
from peft import PeftModel
from transformers import {job.auto_model.__name__}

model = {job.auto_model.__name__}.from_pretrained("path/to/packed")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

## Measured

{summary(results)}

On the validation split ({results["examples"]["validation"]} examples), from one run with seed {results["seed"]}, made
by

```
{results["command"]}
```
""")


def eval_results(job: Job, scores: dict[str, float]) -> list[EvalResult]:
    """Scores in the form of the Hub."""
    task, results = job.task, []
    for name, value in scores.items():
        metric, mismatched, _ = name.partition("_mismatched")
        results.append(
            EvalResult(
                task_type=job.pipeline_tag,
                dataset_type=task.hub_dataset or task.name,
                dataset_name=task.title,
                dataset_config=task.hub_config,
                dataset_split=f"validation{mismatched}",
                metric_type=metric,
                metric_value=round(value, 4),
            )
        )
    return results
