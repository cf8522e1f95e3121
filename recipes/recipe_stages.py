"""Runs the stages of a recipe of texts in their order; each has a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from recipe_job import Job, load_pretrained
from recipe_packing import pack_student
from recipe_report import report
from recipe_start import check_student
from recipe_student import distil_student
from recipe_teacher import fine_tune_teacher
from transformers import AutoConfig

import rebnn_hf


def run_stages(job: Job) -> None:
    """Runs what is left to do of a job of any kind."""
    with unfinished_explained(job):
        job.stage("teacher", fine_tune_teacher)
        for stage in job.arguments.distillations():
            job.stage(stage.name, partial(distil_student, stage=stage))
        job.stage("packed", pack_student)
        if job.arguments.adapter.lora is not None:
            from recipe_adapter import train_adapter  # the only stage that needs PEFT

            job.stage("adapter", train_adapter)
        report(job)
    PartialState().destroy_process_group()


@contextmanager
def unfinished_explained(job: Job) -> Iterator[None]:
    """Says in a sentence what stopped a run and how it goes on, where disk or file system refuse to take part.

    Raises:
        SystemExit: For an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{job.run.root} is unfinished: {error}. Mend that, then the same command goes on.") from error


def check_architecture(job: Job) -> None:
    """Refuses a model that cannot be binarized before the teacher is trained, not after.

    Raises:
        SystemExit: With what binarize() says.
    """
    source = job.arguments.teacher.source
    config = job.new_teacher().config if source is None else load_pretrained(AutoConfig.from_pretrained, source)
    try:
        with torch.device("meta"):
            model = job.auto_model.from_config(config)
        methods = [job.arguments.binary.config(stage.preset) for stage in job.arguments.distillations()]
        for method in methods:
            rebnn_hf.selected_modules(model, method)
    except ValueError as error:
        options = "Fields are options of the same name: --attention softmax"
        raise SystemExit(f"{source or job.task.name} cannot be binarized as asked: {error} ({options})") from None
    folder = job.arguments.student.student
    if folder is not None:
        check_student(job, folder, model, methods[0])
