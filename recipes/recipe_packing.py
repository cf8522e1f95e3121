"""The stage that packs the student into bits, reloads it as a user would, and compares the two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from recipe_job import Job, Logits
from recipe_training import save
from transformers import PreTrainedModel

import rebnn_hf
from rebnn_hf.kernels import use_backend

NOT_PACKED = "ties='released' has sign(0) = 0, a third value that does not fit into a bit."


def pack_student(job: Job) -> dict[str, Any]:
    """Packs the student, reloads it as a user would, and compares the two."""
    folder, dtype = job.run.folder("packed"), job.arguments.packed_dtype()
    student = job.load(job.run.folder("latent"))
    if student.config.quantization_config.ties == "released":
        return score_unpacked(job, student)
    with use_backend("reference"):  # the engine rounds elsewhere, which few-bit activations may turn into other codes
        latent_logits = job.validate(student)
        check_equal(latent_logits, job.validate(rebnn_hf.pack(student)), torch.float32)
    save(job, rebnn_hf.pack(student, dtype), "packed")
    packed = job.auto_model.from_pretrained(folder)
    packed_logits = job.validate(packed)
    if student.config.quantization_config.activation == "none":
        check_equal(latent_logits, packed_logits, dtype)
    elif dtype == torch.float32:
        with use_backend("reference"):
            check_equal(latent_logits, job.validate(packed), dtype)
    job.submit(packed, packed_logits)
    return {
        "scores": {**teacher_scores(job), "latent": job.score(latent_logits), "packed": job.score(packed_logits)},
        "max_logit_difference": largest_difference(latent_logits, packed_logits),
        "size": rebnn_hf.summary(packed).totals,
    }


def score_unpacked(job: Job, student: PreTrainedModel) -> dict[str, Any]:
    """Scores the latent model, whose signs have three values and fit into no bits: to compare it with what others did.

    The released codes report such models too.
    """
    logits = job.validate(student)
    job.submit(student, logits)
    return {"scores": {**teacher_scores(job), "latent": job.score(logits)}, "not_packed": NOT_PACKED}


def teacher_scores(job: Job) -> dict[str, dict[str, float]]:
    """New scores of the teacher where its own stage scored it by other options; nothing where those are good."""
    if job.run.record("teacher").get("scoring", {}) == job.arguments.data.scoring():
        return {}
    return {"teacher": job.score(job.validate(job.load(job.teacher_folder)))}


def largest_difference(latent: Logits, packed: Logits) -> float:
    """Largest difference between the logits of two models."""
    return max(float(np.abs(latent[name] - packed[name]).max()) for name in latent)


def check_equal(latent: Logits, packed: Logits, dtype: torch.dtype) -> None:
    """Refuses a packed model whose logits differ from the latent one's.

    Raises:
        RuntimeError: If it is by more than rounding in `dtype` can explain.
    """
    difference = largest_difference(latent, packed)
    largest = max(float(np.abs(logits).max()) for logits in latent.values())
    if not difference <= math.sqrt(torch.finfo(dtype).eps) * max(1.0, largest):
        raise RuntimeError(
            f"the packed model does not answer like the trained one: logits of up to {largest:.3g} differ by "
            f"{difference:.3g}, which is more than rounding in {dtype}. Nothing is reported."
        )
