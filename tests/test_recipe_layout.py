"""What the recipes share knows none of them: a file imports only those before it, so that nothing goes in circles."""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
SHARED = [
    "recipe_task",
    "recipe_checks",
    "recipe_arguments",
    "recipe_folder",
    "recipe_job",
    "recipe_training",
    "recipe_report",
    "augmentation_candidates",
    "augmentation",
    "recipe_teacher",
    "recipe_start",
    "recipe_student",
    "recipe_packing",
    "recipe_adapter",
    "recipe_stages",
]
FILES = {path.stem for path in RECIPES.glob("*.py")}


def imported(name: str) -> set[str]:
    """The files of the recipes that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & FILES


def test_every_shared_file_has_its_place():
    assert {name for name in FILES if name.startswith(("recipe_", "augmentation"))} == set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_shared_files_import_those_before_them(name):
    assert imported(name) <= set(SHARED[: SHARED.index(name)])


def test_no_recipe_imports_the_script_of_another():
    scripts = {"detection", "embedder", "glue", "image_classification", "squad"}
    assert not [(name, script) for name in FILES for script in imported(name) & scripts]
