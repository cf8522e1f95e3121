"""From a float encoder to a packed 1-bit one that answers questions: SQuAD v1.1, or files of your own in its form.

    accelerate launch recipes/squad.py                                          # BERT-base, data from the Hub
    accelerate launch recipes/squad.py --train_file train-v1.1.json --validation_file dev-v1.1.json \\
        --model_name_or_path FOLDER

Stages: fine-tune the float teacher, binarize a copy of it and distil the teacher into it, pack it into bits, reload the
packed folder and evaluate that, write `results.json`, `predictions.json` in the form of SQuAD, a model card and plots
of oscillation and weights. Interrupted, the same command continues where it stopped; stages that are complete are not
repeated.
"""

from __future__ import annotations

from recipe_job import prepare
from recipe_stages import check_architecture, run_stages
from squad_arguments import parse_squad_arguments
from squad_job import SquadJob


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    arguments = parse_squad_arguments(argv)
    if arguments.augmentation.augment:
        raise SystemExit(
            "--augment replaces words of classified sentences; in question answering the answers would move."
        )
    run_stages(prepare(arguments, SquadJob, check_architecture))


if __name__ == "__main__":
    main()
