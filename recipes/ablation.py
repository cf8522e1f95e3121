"""Which method is best under one budget: a grid of methods, tasks and seeds over `glue.py`, as tables with spreads.

    python recipes/ablation.py --tasks sst2 mrpc --methods bit bibert rebnn-bit-w1a1 --seeds 1 2 3 --baseline bit \\
        --data_dir glue --teachers runs --budget sst2=1000 mrpc=300 --output_dir runs/grid -- --bf16
    python recipes/ablation.py --tasks sst2 --teacher runs/sst2/teacher --methods bwn learned-scale rebnn decoupled \\
        --data_dir glue --output_dir runs/rules -- --max_steps 300

A method is a preset, a weight rule, or PRESET+RULE (in bash, `bit+{bwn,rebnn}` is a row of them). Everything behind
`--` goes to each run of `glue.py`. All runs of a task start from one teacher, and a seed fixes the order of the data:
methods of one seed see the same batches, and their differences are paired.

Interrupted, the same command continues: finished runs are kept. A run that fails does not stop the others; the tables
then say what is missing, and the exit code is 1. Writes `ablation.csv` (a line each run), `ablation.md`,
`ablation_scores.png` and `ablation_flips.png`. Of a finished run the weights are deleted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ablation_methods import METHODS, RULES, method_name
from ablation_plots import plot_flips, plot_scores
from ablation_runs import Launcher, Run, RunFailedError, Teacher, visible_gpus
from ablation_tables import Row, row_of, summary, task_table, write_csv
from glue_arguments import parse_glue_arguments
from glue_tasks import TASKS

OWN = {"task", "data_dir", "train_file", "validation_file", "test_file", "teacher", "preset", "seed", "output_dir"}
"""Options of `glue.py` that the grid gives itself."""


def main(argv: list[str] | None = None) -> None:
    """Runs the grid and writes what it found."""
    argv = sys.argv[1:] if argv is None else argv
    check_launch()
    arguments, rest = parse_arguments(argv)
    launcher = Launcher(arguments.processes, arguments.jobs, visible_gpus())
    teachers = plan_teachers(arguments, rest)
    runs = plan_runs(arguments, rest, teachers)
    check_runs(runs)
    failures = make_teachers(launcher, teachers.values())
    runs = [run for run in runs if f"{run.task}/teacher" not in failures]
    rows, failed = make_runs(launcher, runs, arguments.keep_models)
    failures |= failed
    if rows:
        write_report(arguments, argv, rows, [run for run in runs if run.name not in failures], failures)
    if failures:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise SystemExit(f"\nfailed; the same command tries again:\n{lines}")


def check_launch() -> None:
    """Refuses to be one of several processes, each of which would run the whole grid in the same folders.

    Raises:
        SystemExit: Then.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise SystemExit(
            f"{processes} processes were started, and each would run this grid: start it with `python` alone. "
            f"--processes {processes} gives each of its runs {processes} processes."
        )


# The command line


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the grid, and those for each run."""
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    known = ", ".join(name for name in METHODS if "+" not in name)
    add("--methods", nargs="+", default=list(RULES), metavar="METHOD", help=f"{known}, or PRESET+RULE; default: rules")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    add("--baseline", help="method that paired differences are taken from; default: the first of --methods")
    add("--data_dir", help="folder with the GLUE files; without it they come from the Hub")
    add("--teacher", help="fine-tuned float model, for a single task")
    add(
        "--teachers",
        help="folder with one in TASK or TASK/teacher (as glue.py has it); missing ones are fine-tuned",
    )
    add("--budget", nargs="+", default=[], metavar="TASK=STEPS", help="steps by task; overrides --max_steps behind --")
    add("--output_dir", required=True, help="of the grid; teachers go to its folder teachers without --teachers")
    add("--jobs", type=int, default=1, help="runs at the same time, one thread each if more than one, GPUs in turn")
    add("--processes", type=int, default=1, help="of each run, by accelerate launch if more than one")
    add("--keep_models", action="store_true", help="do not delete the weights of finished runs")
    arguments = parser.parse_args(own)
    try:
        check_arguments(arguments, rest)
    except ValueError as error:
        parser.error(str(error))
    return arguments, rest


def check_arguments(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Completes the options.

    Raises:
        ValueError: If they are wrong or contradict each other.
    """
    for name in ("tasks", "methods", "seeds"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))  # twice the same counts once
    for method in arguments.methods:
        method_name(method)
    arguments.baseline = arguments.baseline or arguments.methods[0]
    if arguments.baseline not in arguments.methods:
        raise ValueError(f"--baseline {arguments.baseline} is not among the methods: {', '.join(arguments.methods)}")
    if arguments.teacher and arguments.teachers:
        raise ValueError("--teacher and --teachers exclude each other")
    if arguments.teacher and len(arguments.tasks) > 1:
        raise ValueError("--teacher is for a single task: pass --teachers FOLDER, with one teacher for each task")
    if min(arguments.jobs, arguments.processes) < 1:
        raise ValueError("--jobs and --processes are at least 1")
    if arguments.jobs > 1 and arguments.processes > 1:
        raise ValueError("--jobs and --processes would share out the same GPUs twice: leave one of them at 1")
    arguments.budget = dict(map(partial(read_budget, arguments.tasks), arguments.budget))
    check_rest(rest, arguments.methods)


def read_budget(tasks: Sequence[str], text: str) -> tuple[str, int]:
    """Task and steps of `TASK=STEPS`.

    Raises:
        ValueError: If it is something else.
    """
    task, _, steps = text.partition("=")
    if task not in tasks or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"--budget {text}: expected TASK=STEPS with a task among {', '.join(tasks)} and steps above 0")
    return task, int(steps)


def check_rest(rest: Iterable[str], methods: Iterable[str]) -> None:
    """Refuses options behind `--` that would make runs of the grid equal to each other, or to lie elsewhere.

    Raises:
        ValueError: With the first of them.
    """
    varied = {name for method in methods for name in METHODS[method].options()}
    for word in rest:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in OWN:
            raise ValueError(f"--{name} behind `--`: the grid sets it itself for each run")
        if word.startswith("--") and name in varied:
            raise ValueError(f"--{name} behind `--`: it is what the methods of this grid differ in")


# The plan


def plan_teachers(arguments: argparse.Namespace, rest: list[str]) -> dict[str, Teacher]:
    """The teachers by task that the grid may have to fine-tune; none with `--teacher`."""
    if arguments.teacher:
        return {}
    root = Path(arguments.teachers or Path(arguments.output_dir) / "teachers")
    return {
        task: Teacher(task, root / task, (*data_options(arguments, task), *rest, "--output_dir", str(root / task)))
        for task in arguments.tasks
    }


def plan_runs(arguments: argparse.Namespace, rest: list[str], teachers: Mapping[str, Teacher]) -> list[Run]:
    """The points of the grid, seed by seed: an interrupted grid then has comparable runs of all methods."""
    runs = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            teacher = str(teachers[task].path) if task in teachers else arguments.teacher
            steps = ["--max_steps", str(arguments.budget[task])] if task in arguments.budget else []
            shared = [*data_options(arguments, task), "--teacher", teacher, "--seed", str(seed), *rest, *steps]
            for method in arguments.methods:
                options = (*shared, *METHODS[method].argv())
                runs.append(Run(task, method, seed, Path(arguments.output_dir), options))
    return runs


def data_options(arguments: argparse.Namespace, task: str) -> list[str]:
    """What is learned, for `glue.py`."""
    return ["--task", task, *(["--data_dir", arguments.data_dir] if arguments.data_dir else [])]


def check_runs(runs: Iterable[Run]) -> None:
    """Refuses what `glue.py` would refuse, before the first run and not at the last.

    Raises:
        SystemExit: With the reason.
    """
    for run in runs:
        parse_glue_arguments(run.argv)


# The work


def make_teachers(launcher: Launcher, teachers: Iterable[Teacher]) -> dict[str, str]:
    """Fine-tunes the teachers that are missing; returns which failed, and why."""
    outcomes = launcher.attempt(lambda teacher: teacher.ensure(launcher), teachers)
    return {f"{teacher.task}/teacher": str(failure) for teacher, failure in outcomes if failure}


def make_runs(launcher: Launcher, runs: Iterable[Run], keep_models: bool) -> tuple[list[Row], dict[str, str]]:
    """Finishes the runs; returns their rows, and which failed and why."""
    rows, failures = [], {}
    for run, outcome in launcher.attempt(lambda run: run.finish(launcher, keep_models), runs):
        if isinstance(outcome, RunFailedError):
            failures[run.name] = str(outcome)
            print(f"{run.name:<36} FAILED: {outcome}", flush=True)
            continue
        row = row_of(run.task, run.method, run.seed, outcome)
        rows.append(row)
        print(f"{run.name:<36} score {row.score:.4f}  flips per weight {row.flips:.3f}", flush=True)
    return rows, failures


# The report


def write_report(
    arguments: argparse.Namespace,
    argv: Sequence[str],
    rows: Sequence[Row],
    runs: Iterable[Run],
    failures: Mapping[str, str],
) -> None:
    """Writes the files of the grid from the rows of its finished `runs`, and prints the tables."""
    folder, tasks, methods = Path(arguments.output_dir), arguments.tasks, arguments.methods
    write_csv(folder / "ablation.csv", rows)
    histories: dict[tuple[str, str], list] = {}
    for run in runs:
        histories.setdefault((run.task, run.method), []).append(run.log_history())
    plot_scores(folder / "ablation_scores.png", rows, tasks, methods)
    plot_flips(folder / "ablation_flips.png", histories, tasks, methods)
    text = report(rows, tasks, methods, arguments.baseline, argv, failures)
    (folder / "ablation.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


def report(
    rows: Sequence[Row],
    tasks: Sequence[str],
    methods: Sequence[str],
    baseline: str,
    argv: Sequence[str],
    failures: Mapping[str, str],
) -> str:
    """The text of `ablation.md`."""
    missing = [f"**Missing, because it failed: {', '.join(failures)}.**"] if failures else []
    parts = [
        "# Grid of methods, tasks and seeds",
        f"```bash\n{shlex.join(['python', 'recipes/ablation.py', *argv])}\n```",
        *missing,
        f"{scored(rows)}, mean ± standard deviation over seeds. Differences are taken "
        "seed by seed, those of the training loss only between methods that are distilled by the same losses. Measured "
        f"on: {'; '.join(sorted({row.hardware for row in rows}))}.",
        "## All tasks",
        summary(rows, tasks, methods, baseline),
        "The average is that over the tasks, taken for each seed; its share is that of the teachers' average.",
        "![scores by method and task](ablation_scores.png)",
        "![weights that flip in a step, by method and task](ablation_flips.png)",
    ]
    for task in tasks:
        here = [row for row in rows if row.task == task]
        if here:
            parts += [f"## {task}", task_table(here, task, methods, baseline), describe(here)]
    return "\n\n".join(parts)


def scored(rows: Sequence[Row]) -> str:
    """Whose scores the tables hold."""
    latent = sorted({row.method for row in rows if row.scored == "latent"})
    unpacked = f" (of the latent ones for {', '.join(latent)}, whose signs have three values)" if latent else ""
    return f"Scores of the packed students{unpacked} at the last step"


def describe(rows: Sequence[Row]) -> str:
    """What the runs of a task have in common; steps that differ between methods show."""
    steps = ", ".join(str(count) for count in sorted({row.steps for row in rows}))
    metric = rows[0].metric.replace("_", " ")
    return f"Score: {metric}; float teacher {rows[0].teacher:.4f}; steps of each run: {steps}."


if __name__ == "__main__":
    main()
