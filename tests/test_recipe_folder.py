"""The output folder of a run: what is dropped, what is kept, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from recipe_folder import STAGES, RunFolder, read_json, write_json


def test_json_is_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a" / "file.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "file.json", {"a": object()})
    assert read_json(tmp_path / "a" / "file.json") == {"a": 1}
    assert read_json(tmp_path / "missing.json") is None


def settings(**changes: object) -> dict[str, dict]:
    return {stage: {"x": 1, "y": None} | ({"x": changes[stage]} if stage in changes else {}) for stage in STAGES}


def test_dropping_a_stage_drops_those_after_it(tmp_path):
    run = RunFolder(tmp_path)
    run.begin(settings())
    for stage in STAGES:
        run.folder(stage).mkdir()
        run.complete(stage, {"stage": stage})
    write_json(run.results_file, {})
    run.check(settings(), overwrite=False)
    with pytest.raises(SystemExit, match="x: 1 -> 2"):
        run.check(settings(latent=2), overwrite=False)
    run.check(settings(latent=2), overwrite=True)
    run.begin(settings(latent=2))
    assert run.record("teacher") == {"stage": "teacher"} and run.folder("teacher").exists()
    assert run.record("latent") is None and run.record("packed") is None and run.results() is None
    assert not run.folder("latent").exists() and not run.folder("packed").exists()


def test_folder_without_work_takes_any_settings(tmp_path):
    run = RunFolder(tmp_path)
    run.begin(settings())
    run.check(settings(teacher=2), overwrite=False)


def test_folder_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "latent").mkdir()
    with pytest.raises(SystemExit, match=r"settings\.json is missing"):
        RunFolder(tmp_path).check(settings(), overwrite=False)
