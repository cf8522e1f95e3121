"""Which weight rule is best under one budget: a grid of rules and seeds over `glue.py`, as a table with its spread.

    python recipes/ablation.py --task sst2 --data_dir glue --teacher runs/sst2/teacher --seeds 1 2 3 \\
        --output_dir runs/ablation-sst2 -- --max_steps 300 --batch_size 64 --bf16

Everything behind `--` goes to `glue.py` in each run. All runs start from the same teacher; a seed fixes the order of
the data, so that the rules of one seed see the same batches and differences are paired. Interrupted, the same command
continues: finished runs are kept. Writes `ablation.csv`, `ablation.md` and `ablation.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from glue_tasks import get_task

RULES: dict[str, dict[str, str]] = {
    "bwn": {"weight_scale": "mean_abs", "balance_rule": "none"},
    "learned scale": {"balance_rule": "none"},
    "const 2e-4": {"balance_rule": "const"},
    "max gradient": {"balance_rule": "maxgrad"},
    "rebnn": {"balance_rule": "flip_maxgrad"},
    "decoupled": {"balance_rule": "flip_maxgrad", "balance_form": "decoupled"},
}
"""Options of `glue.py` behind each name in the table."""


def main(argv: list[str] | None = None) -> None:
    """Runs the grid and writes the table."""
    arguments, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    grid = [(rule, seed) for seed in arguments.seeds for rule in arguments.rules]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = []
        for row in pool.map(lambda point: run(*point, arguments, rest, folder), grid):
            print("{rule:>14}  seed {seed}  score {score:.4f}  flips per weight {flips:.3f}".format(**row), flush=True)
            rows.append(row)
    write_csv(folder / "ablation.csv", rows)
    table = markdown(rows, arguments.rules, arguments.baseline)
    (folder / "ablation.md").write_text(table + "\n", encoding="utf-8")
    plot(folder / "ablation.png", rows, arguments.rules)
    print(table)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the grid, and those for each run."""
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="a GLUE task or demo")
    parser.add_argument("--data_dir", help="folder with the GLUE files")
    parser.add_argument("--teacher", required=True, help="fine-tuned float model, shared by all runs")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES), metavar="RULE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--baseline", default="learned scale", help="rule that paired differences are taken from")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each if more than one")
    arguments = parser.parse_args(own)
    if arguments.baseline not in arguments.rules:
        parser.error(f"--baseline {arguments.baseline!r} is not among the rules: {', '.join(arguments.rules)}")
    return arguments, rest


def run(
    rule: str, seed: int, arguments: argparse.Namespace, rest: list[str], folder: Path
) -> dict[str, float | int | str]:
    """One run of `glue.py`, unless it is already done; its row of the table."""
    name = f"{rule.replace(' ', '-')}-{seed}"
    command = [sys.executable, str(Path(__file__).with_name("glue.py")), "--task", arguments.task]
    command += ["--teacher", arguments.teacher, "--seed", str(seed), "--output_dir", str(folder / name)]
    command += ["--data_dir", arguments.data_dir] if arguments.data_dir else []
    command += [part for option, value in RULES[rule].items() for part in (f"--{option}", value)]
    environment = dict(os.environ)
    if arguments.jobs > 1:
        environment["OMP_NUM_THREADS"] = "1"
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        finished = subprocess.run([*command, *rest], stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if finished.returncode:
        raise SystemExit(f"run {name} failed with exit code {finished.returncode}; see {log.name}")
    results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
    return row_of(rule, seed, results, get_task(arguments.task).main_metric)


def row_of(rule: str, seed: int, results: dict[str, Any], metric: str) -> dict[str, float | int | str]:
    """What the table keeps of a run."""
    return {
        "rule": rule,
        "seed": seed,
        "score": results["scores"]["packed"][metric],
        "teacher": results["scores"]["teacher"][metric],
        "flips": results["oscillation"]["flips_per_weight"],
        "late_flips": results["oscillation"]["late_flip_ratio"],
        "flip_backs": results["oscillation"]["flip_backs_per_weight"],
        "loss": results["oscillation"]["late_loss"],
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict], rules: list[str], baseline: str) -> str:
    """Mean ± standard deviation over seeds, and the paired difference from the baseline."""
    lines = [
        f"| rule | score | minus {baseline}, paired | loss, last tenth | minus {baseline}, paired "
        "| sign changes per weight | per step, last tenth | there and back per weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = {row["seed"]: row for row in rows if row["rule"] == baseline}
    for rule in rules:
        mine = [row for row in rows if row["rule"] == rule]
        cells = [rule]
        for column in ("score", "loss"):
            differences = [row[column] - reference[row["seed"]][column] for row in mine]
            cells += [spread([row[column] for row in mine], ".4f"), spread(differences, "+.4f")]
        for column, form in (("flips", ".3f"), ("late_flips", ".1e"), ("flip_backs", ".4f")):
            cells.append(spread([row[column] for row in mine], form))
        lines.append("| " + " | ".join(cells) + " |")
    seeds = len(reference)
    lines.append("")
    lines.append(f"{seeds} seeds, mean ± standard deviation; teacher {rows[0]['teacher']:.4f}.")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """`mean ± standard deviation`; the mean alone of a single value."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def plot(path: Path, rows: list[dict], rules: list[str]) -> None:
    """Score of every run by rule, and score against sign changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_rule, by_flips = figure.subplots(1, 2, sharey=True)
    for index, rule in enumerate(rules):
        mine = [row for row in rows if row["rule"] == rule]
        scores = [row["score"] for row in mine]
        by_rule.plot([index] * len(scores), scores, "o", alpha=0.7)
        by_rule.hlines(statistics.mean(scores), index - 0.3, index + 0.3, color="black")
        by_flips.plot([row["flips"] for row in mine], scores, "o", label=rule, alpha=0.7)
    by_rule.axhline(rows[0]["teacher"], linestyle=":", color="grey")
    by_rule.set(ylabel="score of the packed student", title="each dot a seed; dotted: the float teacher")
    by_rule.set_xticks(range(len(rules)), rules, rotation=20)
    by_flips.set(xlabel="sign changes per weight over the run", xscale="log")
    by_flips.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
