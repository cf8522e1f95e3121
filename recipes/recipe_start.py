"""A student that begins as an earlier one: the encoder of a latent model under the head of the teacher."""

from __future__ import annotations

from pathlib import Path

from recipe_job import Job, with_dropout
from transformers import PreTrainedModel

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.config import config_of
from rebnn_hf.layers import LATENT_TYPES

ACTIVATIONS = ("activation", "activation_bits", "attention", "ffn_activation")


def continued(job: Job, folder: str, teacher: PreTrainedModel, method: ReBNNConfig) -> PreTrainedModel:
    """The encoder of the latent model in `folder` under the head of the teacher, to train on by a method.

    What it has learned about its activations stays where the method has the same ones.
    """
    student = load_latent(job, folder, teacher)
    student.load_state_dict(student.state_dict() | head(teacher))
    earlier = config_of(student)
    same = all(getattr(earlier, name) == getattr(method, name) for name in ACTIVATIONS)
    return rebnn_hf.rebinarize(student, method, carry_activation_scales=same)


def load_latent(job: Job, folder: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """The latent model in a folder, with a head of the shape that the teacher has.

    Raises:
        SystemExit: If there is none.
    """
    config = with_dropout(folder, job.arguments.student.dropout)
    for name in ("id2label", "label2id", "problem_type"):
        setattr(config, name, getattr(teacher.config, name))
    model = job.load(folder, config=config, ignore_mismatched_sizes=True)
    found = config_of(model)
    if found is None or found.state != "latent":
        kind = "a float model" if found is None else f"a {found.state} one"
        raise SystemExit(
            f"--student {folder} is {kind}, but distillation goes on from a latent model: pass the folder `latent` of "
            "an earlier run."
        )
    return model


def head(model: PreTrainedModel) -> dict:
    """The tensors of a model that belong to its task: all but the encoder's, and the pooler's."""
    if model.base_model is model:  # an embedder
        return {}
    prefix = f"{model.base_model_prefix}."
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")
    }


def check_student(job: Job, folder: str, teacher: PreTrainedModel, method: ReBNNConfig) -> None:
    """Refuses an encoder that does not fit under the head of a teacher, which may be on the meta device.

    Raises:
        SystemExit: If its 1-bit layers are others, or of other shapes, or the method cannot go on from its own.
    """
    if Path(folder).resolve().is_relative_to(job.run.root.resolve()):
        raise SystemExit(f"--student {folder} lies in --output_dir, which may be cleared: choose another --output_dir.")
    student = load_latent(job, folder, teacher)
    conflict = rebnn_hf.stage_conflict(config_of(student), method)
    if method.pooler or method.head:
        conflict = "--pooler and --head make 1-bit what comes from the teacher: leave them out."
    found = {n: tuple(m.weight.shape) for n, m in student.named_modules() if isinstance(m, LATENT_TYPES)}
    wanted = {n: tuple(teacher.get_submodule(n).weight.shape) for n in rebnn_hf.selected_modules(teacher, method)}
    for name in sorted(wanted.keys() | found.keys()):
        if conflict is None and wanted.get(name) != found.get(name):
            conflict = (
                f"its 1-bit weight {name} is {found.get(name, 'not there')}, that of this run "
                f"{wanted.get(name, 'not there')}; begin with a student of the same architecture and 1-bit layers."
            )
    if conflict is not None:
        raise SystemExit(f"--student {folder}: {conflict}")
