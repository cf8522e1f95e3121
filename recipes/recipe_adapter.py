"""The LoRA adapter of a recipe: float corrections of low rank beside the bits of the packed model (needs PEFT)."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rebnn_hf import PackedLinear


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
