"""The stage of the LoRA adapter: float corrections of low rank beside the bits of the packed model (needs PEFT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from recipe_job import Job
from recipe_student import distil
from recipe_training import save, trained_record
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rebnn_hf import PackedLinear


def train_adapter(job: Job) -> dict[str, Any]:
    """Trains a LoRA adapter beside the bits, reloads both as a user would, and scores them together."""
    options, folder = job.arguments.adapter, job.run.folder("adapter")
    packed = job.run.folder("packed")

    def build() -> PreTrainedModel:
        return add_adapter(job.load(packed), options.lora, job.adapter_task)

    rates = {"learning_rate": options.lora_learning_rate, "num_train_epochs": options.lora_epochs}
    trained, record = distil(job, "adapter", job.arguments.distillations()[-1], build, **rates)
    save(job, load_adapter(job.load(packed), trained.checkpoint), "adapter")
    adapted = load_adapter(job.auto_model.from_pretrained(packed), folder)
    return {
        **record,
        **trained_record([trained]),
        "scores": job.score(job.validate(adapted)),
        "rank": options.lora,
        "parameters": count_parameters(folder),
    }


def add_adapter(packed: PreTrainedModel, rank: int, task_type: str | None) -> PeftModel:
    """The packed model with an untrained adapter on each 1-bit linear layer of the encoder; its head trains too.

    Args:
        packed: The base; it is frozen.
        rank: r; `B A` is scaled by 2, whatever the rank.
        task_type: What PEFT calls the kind of task.
    """
    layers = [name for name, module in packed.base_model.named_modules() if isinstance(module, PackedLinear)]
    beside = [name for name, child in packed.named_children() if child is not packed.base_model]
    head = [name for name in beside if any(True for _ in packed.get_submodule(name).parameters())]  # no dropout
    config = LoraConfig(task_type=task_type, target_modules=layers, modules_to_save=head, r=rank, lora_alpha=2 * rank)
    return get_peft_model(packed, config)


def load_adapter(packed: PreTrainedModel, folder: Path) -> PeftModel:
    """The packed model with a trained adapter."""
    return PeftModel.from_pretrained(packed, folder)


def count_parameters(folder: Path) -> int:
    """Numbers in a saved adapter, all of them trained; those of the head are among them."""
    return sum(tensor.numel() for tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).values())
