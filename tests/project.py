"""pyproject.toml and the workflows, as tests read them."""

import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[1]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def jobs(workflow: str) -> dict[str, dict]:
    """The jobs of a workflow by name."""
    file = ROOT / ".github" / "workflows" / f"{workflow}.yml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]


def machines(job: dict) -> list[str]:
    """What a job runs on, over its matrix."""
    return job.get("strategy", {}).get("matrix", {}).get("os", [job["runs-on"]])


def commands(job: dict) -> str:
    """What a job runs, step by step."""
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)
