"""A student that begins as an earlier one: the encoder of a latent model under the head of the teacher."""

from __future__ import annotations

import torch
from recipe_job import Job, load_pretrained, refuse_own_folder, with_dropout
from transformers import AutoTokenizer, PreTrainedModel

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.config import config_of

ACTIVATIONS = ("activation", "activation_bits", "attention", "ffn_activation")
MEANING = ("model_type", "num_attention_heads", "hidden_act", "activation")
"""What makes equal tensors of two encoders mean different things; architectures name their function differently."""


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
        SystemExit: If there is none, or its encoder is not whole.
    """
    config = with_dropout(folder, job.arguments.student.dropout)
    for name in ("id2label", "label2id", "problem_type"):
        setattr(config, name, getattr(teacher.config, name))
    try:
        model, loading = job.load(folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True)
    except ValueError as error:
        raise SystemExit(f"--student {folder} cannot be used: {error}") from None
    found = config_of(model)
    if found is None or found.state != "latent":
        kind = "a float model" if found is None else f"a {found.state} one"
        raise SystemExit(
            f"--student {folder} is {kind}, but distillation goes on from a latent model: pass the folder `latent` of "
            "an earlier run."
        )
    bad = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    bad = sorted(name for name in bad if not is_of_head(name, model))
    if bad:
        raise SystemExit(f"--student {folder} lacks {', '.join(bad[:3])}, or has another shape of it: make it anew.")
    return model


def is_of_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the task of a model: all do but the encoder's, and the pooler's does too."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:  # an embedder, all of which is encoder
        return name.startswith("pooler.")
    return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")


def head(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model that belong to its task."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_of_head(name, model)}


def check_student(job: Job, folder: str, teacher: PreTrainedModel, method: ReBNNConfig) -> None:
    """Refuses an encoder that does not fit under the head of a teacher, which may be on the meta device.

    Raises:
        SystemExit: With what does not fit.
    """
    refuse_own_folder(job.run, "--student", folder)
    student = load_latent(job, folder, teacher)
    misfit = misfit_of_methods(config_of(student), method) or misfit_of_encoders(student, teacher)
    if misfit is None and job.tokenizer is not None:
        vocabulary = load_pretrained(AutoTokenizer.from_pretrained, folder).get_vocab()
        if vocabulary != job.tokenizer.get_vocab():
            misfit = "its tokenizer has another vocabulary than that of this run"
    if misfit is not None:
        raise SystemExit(f"--student {folder}: {misfit}; pass a latent model of the same kind as the teacher.")


def misfit_of_methods(earlier: ReBNNConfig, method: ReBNNConfig) -> str | None:
    """Why a method cannot go on from the student of another one; None if it can."""
    if any((earlier.pooler, earlier.head, method.pooler, method.head)):
        return "a 1-bit pooler or head (--pooler, --head) is the earlier task's, and cannot be taken over"
    conflict = rebnn_hf.stage_conflict(earlier, method)
    return None if conflict is None else f"taken as a stage before this run's: {conflict.rstrip('.')}"


def misfit_of_encoders(student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """What differs between the encoder of a latent model and that of a float one; None if nothing does."""
    for name in MEANING:
        mine, theirs = (getattr(model.config, name, None) for model in (student, teacher))
        if mine != theirs:
            return f"its {name} is {mine}, that of the teacher {theirs}"
    found, wanted = shapes(student), shapes(teacher)
    for name, shape in wanted.items():
        if found.get(name) != shape:
            return f"its {name} is {found.get(name, 'not there')}, that of the teacher {shape}"
    return None


def shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    """The shapes of the tensors of an encoder by their names."""
    return {name: list(t.shape) for name, t in model.state_dict().items() if not is_of_head(name, model)}
