"""The grid of methods, tasks and seeds: its tables by hand, what it starts and keeps, and a real grid."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import ablation
import ablation_runs
from ablation_methods import METHODS, RULES
from ablation_plots import mean_curve, plot_flips, plot_scores
from ablation_runs import Launcher, Teacher
from ablation_tables import NOTHING, Row, row_of, spread, summary, task_table
from glue_arguments import parse_glue_arguments

from rebnn_hf.presets import CONFIGS

ROOT = Path(__file__).parents[1]


def row(task, method, seed, score, teacher=0.9, flips=0.2, loss=None):
    return Row(
        task=task,
        method=method,
        seed=seed,
        metric="accuracy",
        scored="packed",
        score=score,
        teacher=teacher,
        loss=2 - score if loss is None else loss,
        flips=flips,
        late_flips=1e-4,
        flip_backs=0.01,
        steps=300,
        seconds=60.0,
        hardware="abacus",
    )


def cells(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of their line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_task_has_means_spreads_and_paired_differences():
    rows = [row("sst2", "bwn", 1, 0.80), row("sst2", "bwn", 2, 0.84, flips=0.3)]
    rows += [row("sst2", "rebnn", 2, 0.87), row("sst2", "rebnn", 1, 0.82)]
    table = cells(task_table(rows, "sst2", ["bwn", "rebnn"], "bwn"))
    assert table["bwn"] == [
        *("0.8200 ± 0.0283", NOTHING, "1.1800 ± 0.0283", NOTHING, "0.250 ± 0.071", NOTHING),
        *("1.0e-04 ± 0.0e+00", "0.0100 ± 0.0000", "2"),
    ]
    # Paired: .02 and .03, although the scores themselves spread by .035.
    assert table["rebnn"][:6] == [
        *("0.8450 ± 0.0354", "+0.0250 ± 0.0071", "1.1550 ± 0.0354", "-0.0250 ± 0.0071"),
        *("0.200 ± 0.000", "-0.050 ± 0.071"),
    ]


TWO_TASKS = [
    *(row("sst2", "bwn", seed, score, 0.90) for seed, score in ((1, 0.80), (2, 0.84))),
    *(row("mrpc", "bwn", seed, score, 0.70) for seed, score in ((1, 0.60), (2, 0.64))),
    *(row("sst2", "rebnn", seed, score, 0.90) for seed, score in ((1, 0.86), (2, 0.84))),
    *(row("mrpc", "rebnn", seed, score, 0.70) for seed, score in ((1, 0.62), (2, 0.68))),
]


def test_the_summary_averages_over_tasks_before_seeds():
    table = cells(summary(TWO_TASKS, ["sst2", "mrpc"], ["bwn", "rebnn"], "bwn"))
    assert table["method"] == ["sst2", "mrpc", "average", "minus bwn, paired", "of the teacher", "seeds"]
    assert table["float teacher"] == ["0.9000", "0.7000", "0.8000", "", "100.0 %", ""]
    # Averages by seed: .70 and .74, of .80: 87.5 % and 92.5 %.
    assert table["bwn"] == [*("0.8200 ± 0.0283", "0.6200 ± 0.0283", "0.7200 ± 0.0283", NOTHING, "90.0 ± 3.5 %", "2")]
    # .74 and .76: .04 and .02 more. The tasks spread by .014 and .042, their average by .014 only.
    assert table["rebnn"] == [
        *("0.8500 ± 0.0141", "0.6500 ± 0.0424", "0.7500 ± 0.0141", "+0.0300 ± 0.0141", "93.8 ± 1.8 %", "2")
    ]


def test_a_missing_run_leaves_out_its_seed_only_where_it_is_needed():
    rows = [one for one in TWO_TASKS if (one.task, one.method, one.seed) != ("mrpc", "rebnn", 1)]
    table = cells(summary(rows, ["sst2", "mrpc"], ["bwn", "rebnn"], "bwn"))
    assert table["bwn"][2] == "0.7200 ± 0.0283"
    assert table["rebnn"] == ["0.8500 ± 0.0141", "0.6800", "0.7600", "+0.0200", "95.0 %", "1"]
    assert cells(task_table(rows, "mrpc", ["bwn", "rebnn"], "bwn"))["rebnn"][:2] == ["0.6800", "+0.0400"]
    rows = [one for one in TWO_TASKS if (one.task, one.method, one.seed) != ("mrpc", "bwn", 1)]
    assert cells(summary(rows, ["sst2", "mrpc"], ["bwn", "rebnn"], "bwn"))["rebnn"][2:4] == [
        "0.7500 ± 0.0141",
        "+0.0200",
    ]
    assert cells(task_table(rows, "mrpc", ["bwn", "rebnn"], "bwn"))["rebnn"][:2] == ["0.6500 ± 0.0424", "+0.0400"]
    rows = [one for one in rows if one.task == "sst2"]
    table = cells(summary(rows, ["sst2", "mrpc"], ["bwn"], "bwn"))
    assert table["float teacher"] == ["0.9000", NOTHING, NOTHING, "", NOTHING, ""]
    assert table["bwn"] == ["0.8200 ± 0.0283", NOTHING, NOTHING, NOTHING, NOTHING, "0"]


def test_a_teacher_that_learned_nothing_has_no_shares():
    rows = [row("cola", "bwn", seed, 0.0, teacher=0.0) for seed in (1, 2)]
    assert cells(summary(rows, ["cola"], ["bwn"], "bwn"))["bwn"][3] == NOTHING


def test_losses_of_another_kind_are_not_compared():
    rows = [row("sst2", method, 1, 0.8, loss=2.0) for method in ("bit", "bit+rebnn", "bibert")]
    table = cells(task_table(rows, "sst2", ["bit", "bit+rebnn", "bibert"], "bit"))
    assert table["bit+rebnn"][2:4] == ["2.0000", "+0.0000"] and table["bibert"][2:4] == ["2.0000", NOTHING]


def test_spread():
    assert spread([1, 2, 3], ".1f") == "2.0 ± 1.0" and spread([-1, -3], "+.1f", " %") == "-2.0 ± 1.4 %"
    assert spread([0.5], "+.2f") == "+0.50" and spread([], ".2f") == NOTHING


RESULTS = {
    "scores": {"teacher": {"f1": 0.95, "accuracy": 0.9}, "packed": {"f1": 0.85, "accuracy": 0.8}},
    "oscillation": {"late_loss": 1.5, "flips_per_weight": 0.2, "late_flip_ratio": 1e-4, "flip_backs_per_weight": 0.01},
    "steps": {"teacher": 500, "stage-1": 10, "latent": 20},
    "seconds": {"teacher": 1.0, "stage-1": 2.0, "latent": 3.0, "packed": 4.0},
    "hardware": {"cpu": "abacus", "threads": 1, "accelerator": None},
}


def test_the_row_of_a_run():
    found = row_of("mrpc", "bit", 7, RESULTS)
    assert (found.metric, found.score, found.teacher, found.steps, found.seconds) == ("accuracy", 0.8, 0.9, 30, 10.0)
    assert (found.loss, found.flips, found.late_flips, found.flip_backs) == (1.5, 0.2, 1e-4, 0.01)
    assert found.scored == "packed"


def test_a_run_that_packs_nothing_counts_with_its_latent_model():
    scores = {"teacher": {"accuracy": 0.9}, "latent": {"accuracy": 0.7}}
    found = row_of("sst2", "bit-released", 7, {**RESULTS, "scores": scores, "not_packed": "why"})
    assert (found.scored, found.score) == ("latent", 0.7)
    rows = [row("sst2", "bit", 1, 0.8), replace(found, seed=1)]
    text = ablation.report(rows, ["sst2"], ["bit", "bit-released"], "bit", ["--tasks", "sst2"], {})
    assert "of the latent ones for bit-released, whose signs have three values" in text
    assert cells(text)["bit-released"][1] == "-0.1000" and "latent ones" not in ablation.scored(rows[:1])


# --------------------------------------------------------------------------------------------------------------- plots


def test_curves_are_means_at_the_steps_all_seeds_logged():
    logs = [
        [{"step": 1, "flip_ratio": 0.1}, {"step": 10, "flip_ratio": 0.3}, {"step": 20, "train_runtime": 5.0}],
        [{"step": 1, "flip_ratio": 0.3}, {"step": 10, "flip_ratio": 0.4}, {"step": 20, "flip_ratio": 0.5}],
    ]
    steps, ratios = mean_curve(logs)
    assert steps == [1, 10] and ratios == pytest.approx([0.2, 0.35])
    assert mean_curve([]) == ([], [])


def test_plots_of_an_incomplete_grid(tmp_path):
    tasks, methods = ["sst2", "mrpc", "rte", "cola", "qnli"], ["bwn", "rebnn", "bit"]
    plot_scores(tmp_path / "scores.png", TWO_TASKS, tasks, methods)
    frozen = [{"step": step, "flip_ratio": 0.0} for step in (1, 2)]
    plot_flips(tmp_path / "flips.png", {("sst2", "bwn"): [frozen]}, tasks, methods)
    for name in ("scores.png", "flips.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


# ----------------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_of_glue_py_and_a_rule_decides_over_its_preset(name):
    method = METHODS[name]
    binary = parse_glue_arguments(method.argv()).binary
    config, rule = binary.config(), RULES.get(method.rule, {})
    assert binary.preset == method.preset
    expected = {**CONFIGS.get(method.preset, {}), **{key: str(value) for key, value in rule.items()}}
    expected |= {"balance_value": 2e-4} if method.rule == "const-2e-4" else {}
    assert {key: getattr(config, key) for key in expected} == expected
    assert set(rule) >= {"weight_scale", "balance_rule"} or not rule, "else the preset would show through"


GRID = ["--tasks", "sst2", "mrpc", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", "sst3"], "invalid choice: 'sst3'"),
        (["--methods", "median"], "unknown method 'median': expected a preset (rebnn-w1a32, "),
        (["--methods", "bwn+bit"], "unknown method 'bwn+bit'"),
        (["--methods", "bwn", "--baseline", "bit"], "--baseline bit is not among the methods: bwn"),
        (["--teacher", "t"], "--teacher is for a single task"),
        (["--teacher", "t", "--teachers", "f"], "exclude each other"),
        (["--budget", "rte=3"], "--budget rte=3: expected TASK=STEPS with a task among sst2, mrpc"),
        (["--budget", "sst2"], "--budget sst2: expected TASK=STEPS"),
        (["--budget", "sst2=0"], "steps above 0"),
        (["--jobs", "2", "--processes", "2"], "leave one of them at 1"),
        (["--jobs", "0"], "at least 1"),
        (["--", "--seed", "3"], "--seed behind `--`: the grid sets it itself"),
        (["--", "--output-dir=x"], "--output_dir behind `--`"),
        (["--", "--preset", "bit"], "--preset behind `--`"),
        (["--methods", "bit+decoupled", "--", "--balance_form", "gradient"], "it is what the methods of this grid"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        ablation.parse_arguments([*GRID, *options])
    assert error.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--", "--max_setps", "3"], "unrecognized arguments: --max_setps"),
        (
            ["--methods", "bit", "--", "--attention", "bool", "--activation_bits", "8"],
            "attention='bool' goes with 1-bit",
        ),
        (["--methods", "bit", "bit-released", "--", "--lora"], "--lora does nothing without a packed model"),
    ],
)
def test_what_glue_py_would_refuse_is_refused_before_anything_starts(options, complaint, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        ablation.main(["--tasks", "sst2", "--output_dir", str(tmp_path / "out"), *options])
    assert complaint in f"{error.value} {capsys.readouterr().err}" and not (tmp_path / "out").exists()


def plan(*options):
    arguments, rest = ablation.parse_arguments([*GRID, "--seeds", "1", "2", *options])
    teachers = ablation.plan_teachers(arguments, rest)
    return teachers, ablation.plan_runs(arguments, rest, teachers)


def test_runs_of_a_seed_differ_in_nothing_but_their_method():
    _, runs = plan("--methods", "bwn", "bit+rebnn", "bit", "--data_dir", "glue", "--", "--bf16")
    names = ["bwn-1", "bit+rebnn-1", "bit-1"]
    assert [run.name for run in runs[:6]] == [f"{task}/{name}" for task in ("sst2", "mrpc") for name in names]
    assert [run.seed for run in runs] == [1] * 6 + [2] * 6
    shared = ["--task", "mrpc", "--data_dir", "glue", "--teacher", "out/teachers/mrpc/teacher", "--seed", "1", "--bf16"]
    own = {"bwn": ["--weight_scale", "mean_abs", "--balance_rule", "none"], "bit": ["--preset", "bit"]}
    own["bit+rebnn"] = ["--preset", "bit", "--weight_scale", "learned", "--balance_rule", "flip_maxgrad"]
    for run in runs[3:6]:
        assert run.argv == [*shared, *own[run.method], "--output_dir", f"out/{run.name}"]


def test_budgets_are_by_task_and_go_over_the_common_one():
    _, runs = plan("--methods", "bit", "--budget", "mrpc=150", "--", "--max_steps", "300")
    steps = {(run.task, run.seed): parse_glue_arguments(run.argv).student.max_steps for run in runs}
    assert steps == {("sst2", 1): 300, ("mrpc", 1): 150, ("sst2", 2): 300, ("mrpc", 2): 150}


def test_one_teacher_for_a_single_task():
    arguments, rest = ablation.parse_arguments(["--tasks", "sst2", "--output_dir", "out", "--teacher", "org/model"])
    assert ablation.plan_teachers(arguments, rest) == {} and arguments.methods == list(RULES)
    runs = ablation.plan_runs(arguments, rest, {})
    assert {parse_glue_arguments(run.argv).teacher.teacher for run in runs} == {"org/model"} and len(runs) == 18


def test_a_teacher_exists_once_it_is_complete(tmp_path):
    ready, stage = (Teacher(name, tmp_path / name, ()) for name in ("ready", "stage"))
    assert not ready.exists() and ready.path == tmp_path / "ready" / "teacher"
    touch(tmp_path / "ready" / "config.json")
    assert ready.exists() and ready.path == tmp_path / "ready"
    touch(tmp_path / "stage" / "teacher" / "config.json")
    assert stage.exists(), "somebody's model, in no run of glue.py"
    touch(tmp_path / "stage" / "settings.json")
    assert not stage.exists(), "glue.py was interrupted before it had completed the stage"
    touch(tmp_path / "stage" / "stages" / "teacher.json")
    assert stage.exists() and stage.path == tmp_path / "stage" / "teacher"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


# ---------------------------------------------------------------------------------- what is started, by quick stand-ins

STAND_IN = """
import json, shlex, sys
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
print("started", *sys.argv[1:])
assert not (folder.with_name(folder.name + ".broken")).exists(), "no luck"
(folder / "latent").mkdir(parents=True, exist_ok=True)
for name in ("config.json", "model.safetensors"):
    (folder / "latent" / name).touch()
history = [{"step": 1, "flip_ratio": 0.1}]
(folder / "latent" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
results = json.loads(RESULTS)
results["scores"]["packed"]["accuracy"] = round(0.8 + seed / 100, 2)
results["command"] = shlex.join(["python", "recipes/glue.py", *sys.argv[1:]])
(folder / "results.json").write_text(json.dumps(results))
"""
TEACHER_STAND_IN = """
import sys
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
assert not (folder.with_name(folder.name + ".broken")).exists(), "no luck"
(folder / "teacher").mkdir(parents=True)
(folder / "teacher" / "config.json").touch()
print("started", *sys.argv[1:])
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Runs a grid over stand-ins for the recipes that only leave behind what recipes leave."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "glue.py").write_text(f"RESULTS = {json.dumps(RESULTS)!r}\n{STAND_IN}")
    (scripts / "ablation_teacher.py").write_text(TEACHER_STAND_IN)
    monkeypatch.setattr(ablation_runs, "RECIPES", scripts)
    options = ["--tasks", "sst2", "mrpc", "--methods", "bwn", "bit", "--seeds", "1", "2", "--output_dir"]
    return lambda *more: ablation.main([*options, str(tmp_path / "out"), *more])


def started(folder: Path) -> dict[str, int]:
    """How often each run was started."""
    counts = {}
    for log in folder.rglob("*.log"):
        counts[str(log.relative_to(folder).with_suffix(""))] = log.read_text().count("started")
    return {name: count for name, count in counts.items() if count}


RUNS = [f"{task}/{method}-{seed}" for task in ("sst2", "mrpc") for method in ("bwn", "bit") for seed in (1, 2)]


def test_a_finished_grid_starts_nothing_again_although_its_models_are_gone(grid, tmp_path, capsys):
    grid("--", "--bf16")
    out = tmp_path / "out"
    everything = dict.fromkeys([*RUNS, "teachers/sst2", "teachers/mrpc"], 1)
    assert started(out) == everything
    assert not list(out.rglob("*.safetensors")) and (out / "sst2/bwn-1/latent/config.json").exists()
    with (out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {(r["seed"], r["score"]) for r in rows} == {("1", "0.81"), ("2", "0.82")}
    text = (out / "ablation.md").read_text()
    assert text in capsys.readouterr().out and "Missing" not in text and "## mrpc" in text
    grid("--jobs", "2", "--", "--bf16")
    assert started(out) == everything
    (out / "mrpc/bit-2/results.json").unlink()
    grid("--", "--bf16")
    assert started(out) == everything | {"mrpc/bit-2": 2}


def test_another_command_is_left_to_glue_py_to_judge(grid, tmp_path):
    grid()
    grid("--budget", "sst2=5")
    assert started(tmp_path / "out") == {
        **dict.fromkeys([*RUNS, "teachers/sst2", "teachers/mrpc"], 1),
        **{name: 2 for name in RUNS if name.startswith("sst2")},
    }


def test_models_are_kept_on_request(grid, tmp_path):
    grid("--keep_models")
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 8


def test_a_failed_run_is_named_and_the_others_go_on(grid, tmp_path):
    out = tmp_path / "out"
    touch(out / "sst2" / "bit-1.broken")
    with pytest.raises(SystemExit) as error:
        grid("--jobs", "2")
    assert f"sst2/bit-1: exit code 1, see {out / 'sst2' / 'bit-1.log'}" in str(error.value)
    assert "no luck" in (out / "sst2" / "bit-1.log").read_text()
    assert {name for name in RUNS if (out / name / "results.json").exists()} == {*RUNS} - {"sst2/bit-1"}
    text = (out / "ablation.md").read_text()
    assert "**Missing, because it failed: sst2/bit-1.**" in text
    assert cells(text)["bit"][-1] == "2", "the last table is MRPC's, which is complete"
    (out / "sst2" / "bit-1.broken").unlink()
    grid()
    assert "Missing" not in (out / "ablation.md").read_text()
    assert {name: count for name, count in started(out).items() if count > 1} == {"sst2/bit-1": 2}


def test_runs_without_their_teacher_are_not_started(grid, tmp_path):
    out = tmp_path / "out"
    touch(out / "teachers" / "mrpc.broken")
    with pytest.raises(SystemExit, match=r"mrpc/teacher: exit code 1, see .*teachers/mrpc\.log"):
        grid()
    assert set(started(out)) == {"teachers/sst2", *(name for name in RUNS if name.startswith("sst2"))}
    assert cells((out / "ablation.md").read_text())["float teacher"][:3] == ["0.9000", NOTHING, NOTHING]


def test_teachers_that_exist_are_taken_as_they_are(grid, tmp_path):
    touch(tmp_path / "teachers" / "sst2" / "config.json")
    grid("--teachers", str(tmp_path / "teachers"))
    assert started(tmp_path / "teachers") == {"mrpc": 1}
    for task, folder in (("sst2", "sst2"), ("mrpc", "mrpc/teacher")):
        log = (tmp_path / "out" / task / "bit-1.log").read_text()
        assert f"--teacher {tmp_path / 'teachers' / folder} " in log


def test_runs_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_runs, "RECIPES", tmp_path)
    (tmp_path / "script.py").write_text("import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w')")
    Launcher(processes=2).start("script.py", [f"{tmp_path}/rank-"], tmp_path / "log")
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}


def test_a_launcher_of_several_processes_is_refused(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit, match=r"each would run this grid: start it with `python` alone. --processes 2 gives"
    ):
        grid()
    assert not (tmp_path / "out").exists()


ENVIRONMENT_STAND_IN = """
import json, os, sys, time
from pathlib import Path

folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / f"{name}.running").touch()
while len(list(folder.glob("*.running"))) < 2:  # until there are two at the same time
    time.sleep(0.01)
(folder / f"{name}.json").write_text(json.dumps(dict(os.environ)))
"""


def environments(launcher, folder: Path, names: str) -> list[dict[str, str]]:
    """The environments of processes that a launcher starts."""
    (folder / "script.py").write_text(ENVIRONMENT_STAND_IN)
    outcomes = launcher.attempt(lambda name: launcher.start("script.py", [str(folder), name], folder / name), names)
    assert [failure for _, failure in outcomes] == [None] * len(names)
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_runs_share_out_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_runs, "RECIPES", tmp_path)
    first, second, *_ = found = environments(Launcher(jobs=2, gpus=("3", "GPU-5e")), tmp_path, "abcd")
    assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"3", "GPU-5e"}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == {"3", "GPU-5e"}
    assert [one["OMP_NUM_THREADS"] for one in found] == ["1"] * 4


def test_more_jobs_than_gpus_take_turns_and_without_gpus_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_runs, "RECIPES", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    for gpus, seen in ((("0",), {"0"}), ((), {"7"})):
        found = environments(Launcher(jobs=2, gpus=gpus), tmp_path, "ab")
        assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == seen


def test_the_names_of_the_gpus_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablation_runs.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f")
    assert ablation_runs.visible_gpus() == ["5", "GPU-8f"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ablation_runs.visible_gpus() == []


def test_runs_do_not_take_the_launcher_of_the_grid_for_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_runs, "RECIPES", tmp_path)
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    told |= {"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    for name, value in {**told, "ACCELERATE_USE_CPU": "true", "MINE": "kept"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.running").touch()
    (tmp_path / "b.running").touch()
    (found,) = environments(Launcher(), tmp_path, "a")
    assert not told.keys() & found.keys() and found["ACCELERATE_USE_CPU"] == "true" and found["MINE"] == "kept"
    for name in told.keys() - {"OMP_NUM_THREADS"}:
        monkeypatch.delenv(name)
    (found,) = environments(Launcher(), tmp_path, "a")
    assert found["OMP_NUM_THREADS"] == "1", "somebody's own choice"


def test_all_failed(grid, tmp_path):
    for task in ("sst2", "mrpc"):
        touch(tmp_path / "out" / "teachers" / f"{task}.broken")
    with pytest.raises(SystemExit, match="sst2/teacher"):
        grid()
    assert not (tmp_path / "out" / "ablation.md").exists()


# --------------------------------------------------------------------------------------------------------- a real grid


def write_sst2(folder: Path) -> None:
    """A tiny SST-2 in GLUE's form, from the demo's sentences."""
    from glue_grammar import demo_dataset

    for split, name, count in (("train", "train.tsv", 64), ("validation", "dev.tsv", 32)):
        rows = demo_dataset()[split][:count]
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence1"], rows["label"], strict=True)]
        touch(folder / name)
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def save_teacher(folder: Path) -> None:
    from glue_grammar import build_demo_tokenizer, demo_dataset, demo_model_config
    from transformers import BertForSequenceClassification, set_seed

    tokenizer = build_demo_tokenizer(demo_dataset()["train"]["sentence1"])
    set_seed(0)
    BertForSequenceClassification(demo_model_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_grid_of_two_tasks_with_and_without_a_teacher(tmp_path, monkeypatch, capsys):
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    write_sst2(tmp_path / "glue" / "SST-2")
    save_teacher(tmp_path / "teachers" / "sst2")
    size = ["--max_train_samples", "64", "--max_eval_samples", "32", "--teacher_epochs", "1", "--logging_steps", "2"]
    options = ["--tasks", "demo", "sst2", "--methods", "bwn", "rebnn-bit-w1a1+decoupled", "--seeds", "1"]
    options += ["--teachers", str(tmp_path / "teachers"), "--data_dir", str(tmp_path / "glue")]
    options += ["--budget", "sst2=4", "demo=6", "--output_dir", str(tmp_path / "out"), "--jobs", "2", "--", *size]
    ablation.main(options)
    first = capsys.readouterr().out
    assert "demo: fine-tuning the teacher" in first and "sst2: fine-tuning" not in first
    with (tmp_path / "out" / "ablation.csv").open() as file:
        rows = {(r["task"], r["method"]): r for r in csv.DictReader(file)}
    assert {key: r["steps"] for key, r in rows.items()} == {
        ("demo", "bwn"): "6",
        ("demo", "rebnn-bit-w1a1+decoupled"): "6",
        ("sst2", "bwn"): "4",
        ("sst2", "rebnn-bit-w1a1+decoupled"): "4",
    }
    assert all(0 < float(r["flips"]) < 1 for r in rows.values())
    assert rows["sst2", "bwn"]["flips"] != rows["sst2", "rebnn-bit-w1a1+decoupled"]["flips"]
    assert len(list((tmp_path / "out").rglob("latent/trainer_state.json"))) == 4
    assert not list((tmp_path / "out").rglob("*.safetensors"))

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*/*.*")}
    ablation.main(options)
    assert capsys.readouterr().out == first.partition("\n")[2]  # all but the line about the teacher
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*/*.*")} == kept

    # Without its models a finished run is still finished for glue.py, when it is asked.
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.json")}
    ablation.main(
        [*options[: options.index("--methods") + 2], *options[options.index("--seeds") :], "--save_steps", "9"]
    )
    log = (tmp_path / "out" / "sst2" / "bwn-1.log").read_text()
    assert log.count("latent: already complete") == log.count("packed: already complete") == 1
    assert {path: path.stat().st_mtime_ns for path in results} == results


@pytest.mark.slow
def test_runs_of_two_processes_really(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    write_sst2(tmp_path / "glue" / "SST-2")
    save_teacher(tmp_path / "teacher")
    options = ["--tasks", "sst2", "--methods", "bwn", "--seeds", "1", "--data_dir", str(tmp_path / "glue")]
    options += ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out"), "--processes", "2"]
    ablation.main([*options, "--", "--max_steps", "2", "--max_train_samples", "64"])
    results = json.loads((tmp_path / "out" / "sst2" / "bwn-1" / "results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == {"latent": 2}
    assert "accelerate launch --multi_gpu --num_processes 2 recipes/glue.py --task sst2" in results["command"]
    before = (tmp_path / "out" / "sst2" / "bwn-1" / "results.json").stat().st_mtime_ns
    ablation.main([*options, "--", "--max_steps", "2", "--max_train_samples", "64"])
    assert (tmp_path / "out" / "sst2" / "bwn-1" / "results.json").stat().st_mtime_ns == before
