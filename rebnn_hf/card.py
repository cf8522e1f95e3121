"""The model card of a 1-bit model: what is 1-bit in it, how large it is, what was measured and how, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from .auto_classes import auto_classes
from .patching import HUB_TAGS, saved_config
from .report import summary

ABOUT = {
    "packed": "Made with rebnn_hf: the weights of the layers listed below are stored as one bit each, with one scale "
    "per row.",
    "latent": "In training with rebnn_hf: the layers listed below compute with the signs of their weights, which are "
    "still stored as floats. `rebnn_hf.pack(model)` makes them one bit each.",
}
NEEDS = "It needs `pip install rebnn_hf`. Without the import transformers stops with an error that says so."


def model_card(
    model: PreTrainedModel,
    repo_id: str = "path/to/this/folder",
    *,
    title: str | None = None,
    about: str | None = None,
    usage: str | None = None,
    eval_results: Sequence[EvalResult] = (),
    measured: str | None = None,
    command: str | None = None,
    tags: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """A model card with everything that can be said of a model without asking its author, and what the author adds.

    The number of parameters that the Hub shows beside a card is too small for packed models, since it counts bytes of
    eight weights; the card states the true one.

    Args:
        model: latent or packed.
        repo_id: under which it will be loaded, `user/model`.
        title: heading; default: the last part of `repo_id`.
        about: first paragraph, in Markdown; default: one that says what rebnn_hf did.
        usage: Python code that loads and uses the model, without `import rebnn_hf`; default: its Auto class, behind the
            import of the module that defines the architecture if that is one of this package.
        eval_results: scores, for readers and for the Hub's `model-index`.
        measured: Markdown in place of the table of `eval_results`.
        command: what measured the scores, as one types it; required with them.
        tags: beside `rebnn` and `1-bit`.
        **metadata: more fields of the front matter, e.g. `license="apache-2.0"`, `language="en"`,
            `base_model="user/teacher"`, `base_model_relation="quantized"`, `datasets=["nyu-mll/glue"]`.

    Returns:
        The card: `.save("packed/README.md")` or `.push_to_hub("user/model")`.

    Raises:
        TypeError: not a transformers model.
        ValueError: a float model; scores without the command that measured them, or a command without scores.

    Example:
        >>> card = rebnn_hf.model_card(model, "user/model", base_model="user/teacher", license="mit")
        >>> model.push_to_hub("user/model")
        >>> card.push_to_hub("user/model")
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model_card() expects a transformers PreTrainedModel, got {type(model).__name__}.")
    if saved_config(model) is None:
        raise ValueError("model_card() describes 1-bit models, got a float one; binarize() it first.")
    if bool(eval_results or measured) != bool(command):
        raise ValueError(
            "scores and the command that measured them belong together: pass eval_results (or measured) and command."
        )
    title = title or repo_id.rpartition("/")[2]
    fields = {
        "library_name": "rebnn_hf" if _is_own(model) else "transformers",
        "pipeline_tag": _pipeline_tag(model),
        "metrics": list(dict.fromkeys(result.metric_type for result in eval_results)) or None,
        "model_name": title if eval_results else None,
        "tags": list(dict.fromkeys([*HUB_TAGS, *tags])),
    } | metadata
    data = ModelCardData(eval_results=list(eval_results) or None, **fields)
    sections = [
        f"# {title}\n\n{about or ABOUT[saved_config(model).state]}",
        use_section(model, repo_id, usage),
        bits_section(model),
    ]
    if command:
        sections.append(f"## Measured\n\n{measured or _table(eval_results)}\n\nMeasured by\n\n```\n{command}\n```")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def complete_card(file: str | Path, model: PreTrainedModel, repo_id: str) -> None:
    """Add to a card that something else wrote, and that describes a training, how to load and what is 1-bit."""
    card = ModelCard.load(file)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *HUB_TAGS]))
    about = f"## 1-bit weights\n\n{ABOUT[saved_config(model).state]}"
    card.text = "\n\n".join([card.text.rstrip(), about, use_section(model, repo_id), bits_section(model)]) + "\n"
    card.save(file)


def use_section(model: PreTrainedModel, repo_id: str, usage: str | None = None) -> str:
    """How to load the model."""
    code = f"import rebnn_hf  # lets transformers read 1-bit checkpoints\n{usage or _usage(model, repo_id)}"
    return f"## Use\n\n```python\n{code}\n```\n\n{NEEDS}"


def bits_section(model: PreTrainedModel) -> str:
    """What is 1-bit, what is not and why, and the size."""
    contents = summary(model)
    section = f"## What is 1-bit\n\n```\n{contents}\n```"
    if saved_config(model).state == "packed":
        section += (
            f"\n\nThis is a model of {contents.totals['parameters']:,} parameters: the Hub counts the elements of the "
            "file, in which a byte holds eight 1-bit weights, and therefore shows fewer."
        )
    return section


def _usage(model: PreTrainedModel, repo_id: str) -> str:
    """Code that loads the model."""
    name = next(iter(auto_classes(type(model), model.config)), type(model).__name__)
    architecture = f"import {type(model).__module__}  # the architecture\n" if _is_own(model) else ""
    return f'{architecture}from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo_id}")'


def _is_own(model: PreTrainedModel) -> bool:
    """Whether the architecture is one of this package: transformers alone, and its pipelines, do not know it."""
    return type(model).__module__.startswith(f"{__package__}.")


def _pipeline_tag(model: PreTrainedModel) -> str | None:
    """The task that the Hub and `transformers.pipeline` know a class by; None if it is for none."""
    for task, classes in TASK_MAPPING.items():
        names = [name for entry in classes.values() for name in ([entry] if isinstance(entry, str) else entry)]
        if type(model).__name__ in names:
            return task
    return None


def _table(results: Sequence[EvalResult]) -> str:
    """Scores as a table in Markdown."""
    rows = [(r.dataset_name, r.dataset_split or "", r.metric_name or r.metric_type, r.metric_value) for r in results]
    lines = [("data", "split", "metric", "value"), ("---", "---", "---", "---:"), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
