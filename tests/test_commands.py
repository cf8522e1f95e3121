"""The commands that README and docs print are commands that the recipes and `rebnn` take.

Those of the detection recipe, which needs torchvision, are read in tests/vision.
"""

import shlex

import pytest
from commands import PARSERS, RECIPES, read, recipe_commands, run_by
from pages import PAGES, commands

from rebnn_hf import cli

OF_RECIPES = [found for found in recipe_commands() if found[1] != "detection"]
OF_REBNN = [words[1:] for page in PAGES for words in commands(page) if words[0] == "rebnn"]
OF_REBNN = [words for words in OF_REBNN if words == ["info"] or len(words) > 1]  # `rebnn pack` alone is a name


def shown(page, recipe, arguments):
    return f"{page}: {recipe} {shlex.join(arguments)}"


@pytest.mark.parametrize(("page", "recipe", "arguments"), OF_RECIPES, ids=[shown(*found) for found in OF_RECIPES])
def test_recipes_take_the_commands_of_the_pages(page, recipe, arguments):
    read(recipe, arguments)


def test_every_recipe_is_in_readme():
    named = {recipe for page, recipe, _ in recipe_commands() if page == "README.md"}
    scripts = {path.stem for path in RECIPES.glob("*.py") if "\ndef main(argv" in path.read_text(encoding="utf-8")}
    assert named == scripts - {"ablation_teacher"} == set(PARSERS)


@pytest.mark.parametrize("arguments", OF_REBNN, ids=map(shlex.join, OF_REBNN))
def test_rebnn_takes_the_commands_of_the_pages(arguments):
    cli.parser().parse_args(arguments)


def test_what_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        read("glue", ["--task", "sst2", "--removed_option", "1"])
    assert "--removed_option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_by(["accelerate", "launch", "--removed", "recipes/glue.py"])


def test_commands_are_found_wherever_they_stand():
    found = [(page, recipe, shlex.join(arguments)) for page, recipe, arguments in recipe_commands()]
    assert ("README.md", "glue", "--task demo") in found, "behind &&"
    assert ("README.md", "glue", "--lora") in found, "inline"
    assert ("distributed.md", "glue", "--task demo") in found, "behind an environment variable and accelerate's options"
    assert any(page == "README.md" and recipe == "ablation" and "--budget" in words for page, recipe, words in found)
