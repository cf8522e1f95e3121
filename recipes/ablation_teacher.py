"""Fine-tunes the float teacher of a GLUE task and stops there: the first stage of `glue.py`, with its options.

python recipes/ablation_teacher.py --task sst2 --output_dir FOLDER      # leaves the model in FOLDER/teacher
"""

from __future__ import annotations

from accelerate import PartialState
from glue_arguments import parse_glue_arguments
from glue_job import GlueJob
from recipe_job import prepare
from recipe_teacher import fine_tune_teacher


def main(argv: list[str] | None = None) -> None:
    """Runs the stage, unless it is complete."""
    job = prepare(parse_glue_arguments(argv), GlueJob)
    job.stage("teacher", fine_tune_teacher)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
