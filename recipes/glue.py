"""From a float encoder to a packed 1-bit one on a GLUE task, the embedded demo or files of your own.

    python recipes/glue.py                                                      # the demo: a minute, no downloads
    accelerate launch recipes/glue.py --task sst2                               # BERT-base, data from the Hub
    accelerate launch recipes/glue.py --task rte --data_dir glue --model_name_or_path FOLDER
    python recipes/glue.py --train_file train.csv --validation_file dev.csv

Stages: fine-tune the float teacher, binarize a copy of it and distil the teacher into it, pack it into bits, reload the
packed folder and evaluate that, with `--lora` train an adapter on it, write `results.json`, a model card and plots of
oscillation and weights. Interrupted, the same command continues where it stopped; stages that are complete are not
repeated.
"""

from __future__ import annotations

from augmentation import check_augmentation
from glue_arguments import parse_glue_arguments
from glue_files import describe
from glue_job import GlueJob
from recipe_job import prepare
from recipe_stages import check_architecture, run_stages


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    job = prepare(parse_glue_arguments(argv), GlueJob, check_architecture, check_augmentation)
    if job.task.name == "custom":
        job.process.print(describe(job.task))
    run_stages(job)


if __name__ == "__main__":
    main()
