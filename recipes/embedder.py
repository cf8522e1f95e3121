"""From a float sentence embedder to a packed 1-bit one that `SentenceTransformer(folder)` loads.

    accelerate launch recipes/embedder.py                                       # all-MiniLM-L6-v2, sentences of STS-B
    accelerate launch recipes/embedder.py --data_dir glue --teacher FOLDER --tasks stsb sst2 mrpc
    accelerate launch recipes/embedder.py --train_file sentences.txt --preset rebnn-bit-w1a1

Stages: score the float teacher, binarize a copy of its transformer and distil the teacher into it (from sentences
alone: no labels are read), pack it into bits, reload the packed folder and score that on the pairs of STS-B, write
`results.json`, a model card and plots of oscillation and weights. Interrupted, the same command continues where it
stopped; stages that are complete are not repeated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from augmentation import check_augmentation, student_tokens
from embedder_arguments import parse_embedder_arguments
from embedder_job import EmbedderJob
from embedder_training import EmbedderTrainer
from recipe_arguments import Distillation
from recipe_job import prepare
from recipe_packing import NOT_PACKED, check_equal, largest_difference
from recipe_report import report
from recipe_stages import check_architecture
from recipe_student import build_student, load_teacher, student_arguments, student_rates
from recipe_training import train_logged, trained_record, trainer_inputs
from sentence_transformers import SentenceTransformer
from transformers import set_seed

import rebnn_hf
from rebnn_hf.kernels import use_backend


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    run_stages(prepare(parse_embedder_arguments(argv), EmbedderJob, check_architecture, check_augmentation))


def run_stages(job: EmbedderJob) -> None:
    """Runs what is left to do."""
    job.stage("teacher", score_teacher)
    for stage in job.arguments.distillations():
        job.stage(stage.name, partial(distil_student, stage=stage))
    job.stage("packed", pack_student)
    report(job)
    PartialState().destroy_process_group()


def score_teacher(job: EmbedderJob) -> dict[str, Any]:
    """Scores the float embedder."""
    return {"scores": job.score(job.load_embedder(job.teacher_folder))}


def distil_student(job: EmbedderJob, stage: Distillation) -> dict[str, Any]:
    """Binarizes a copy of the teacher's transformer, or the one of the stage before, and trains it to follow it."""
    train_dataset, record = student_tokens(job)
    set_seed(job.arguments.run.seed)
    trainer = EmbedderTrainer(
        model=build_student(job, stage),
        teacher=load_teacher(job, stage),
        args=student_arguments(job, stage, stage.name, **student_rates(job), logits_weight=0.0, label_weight=0.0),
        pooling=job.pooling(),
        embedding_weight=job.arguments.student.embedding_weight,
        **(trainer_inputs(job) | {"train_dataset": train_dataset}),
    )
    trained = train_logged(job, trainer, stage.name)
    save(job, job.embedder(job.auto_model.from_pretrained(trained.checkpoint)), stage.name)
    return record | trained_record([trained])


def pack_student(job: EmbedderJob) -> dict[str, Any]:
    """Packs the student, reloads it as a user would, and compares the two."""
    dtype = job.arguments.packed_dtype()
    student = job.load_embedder(job.run.folder("latent"))
    transformer = student[0].auto_model
    scores = {"latent": job.score(student)}
    if transformer.config.quantization_config.ties == "released":
        return {"scores": scores, "not_packed": NOT_PACKED}
    with use_backend("reference"):  # the engine rounds elsewhere, which few-bit activations may turn into other codes
        latent = job.validate(student)
        rebnn_hf.pack(transformer)
        check_equal(latent, job.validate(student), torch.float32)
    rebnn_hf.pack(transformer, dtype)
    for behind in list(student)[1:]:
        behind.to(dtype)
    save(job, student, "packed")
    packed = job.load_embedder(job.run.folder("packed"))
    embeddings = job.validate(packed)
    check_equal(job.validate(student), embeddings, torch.float32)
    summary = rebnn_hf.summary(packed[0].auto_model)
    return {
        "scores": scores | {"packed": job.score(packed)},
        "max_logit_difference": largest_difference(latent, embeddings),
        "embeddings_per_second": job.speed({"teacher": job.load_embedder(job.teacher_folder), "packed": packed}),
        "size": summary.totals,
        "layers": str(summary),
    }


def save(job: EmbedderJob, embedder: SentenceTransformer, stage: str) -> None:
    """Leaves the embedder in the stage's folder."""
    if job.process.is_main_process:
        embedder.save_pretrained(str(job.run.folder(stage)), create_model_card=False)
    job.process.wait_for_everyone()


if __name__ == "__main__":
    main()
