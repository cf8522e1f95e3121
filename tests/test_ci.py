"""The workflows run what they are said to run, and a release can be published."""

import re

from project import ROOT, commands, jobs, machines, pyproject

CHECK = ".ci/check_wheel.py"


def test_a_release_waits_for_everything_that_is_built():
    release = jobs("wheels")
    publish = release.pop("publish")
    assert set(publish["needs"]) == set(release)
    names = []
    for job in release.values():
        (upload,) = (step["with"] for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
        names += [upload["name"].replace("${{ matrix.os }}", machine) for machine in machines(job)]
    assert len(set(names)) == len(names) == 5, "artifacts of one name are refused"


def test_cibuildwheel_runs_only_where_the_library_is_built():
    """It refuses wheels without one, which are for any platform; on Windows the library is not built."""
    for job in jobs("wheels").values():
        uses = " ".join(step.get("uses", "") for step in job["steps"])
        on_windows = any("windows" in machine for machine in machines(job))
        assert not ("cibuildwheel" in uses and on_windows)


def test_every_wheel_is_asked_for_its_library():
    assert pyproject()["tool"]["cibuildwheel"]["test-command"] == f"python {{project}}/{CHECK} cpu"
    windows = commands(jobs("wheels")["windows"])
    assert windows.index("-m build --wheel") < windows.index("pip install dist/") < windows.index(f"{CHECK} reference")
    assert commands(jobs("tests")["wheel"]) == ".ci/wheel"
    script = (ROOT / ".ci" / "wheel").read_text(encoding="utf-8")
    built, without_compiler = script.split("CC=/bin/false", 1)
    assert "-m build" in built and f"{CHECK} cpu" in without_compiler and f"{CHECK} reference" in without_compiler


def test_every_tox_environment_is_run():
    tests = jobs("tests")
    run = {entry["environment"] for entry in tests["supported"]["strategy"]["matrix"]["include"]}
    for job in tests.values():
        for names in re.findall(r"tox -e ([\w,]+)", commands(job)):
            run.update(names.split(","))
    assert run == set(pyproject()["tool"]["tox"]["env_list"])


def test_image_models_are_tested_on_new_releases_of_timm():
    vision = pyproject()["tool"]["tox"]["env"]["vision"]
    assert "tests/vision" in vision["commands"][0] and "detection" in vision["extras"] and "deps" not in vision


def test_what_users_see_is_type_checked_in_full():
    """Errors that follow from how torch types its modules are passed over inside the package alone."""
    settings = pyproject()["tool"]["mypy"]
    assert "disable_error_code" not in settings and settings["warn_unused_ignores"]
    assert [override["module"] for override in settings["overrides"]] == ["rebnn_hf.*"]
    *_, typed_usage = pyproject()["tool"]["tox"]["env"]["types"]["commands"]
    assert {"--strict", "tests/typed_usage.py"} <= set(typed_usage)
