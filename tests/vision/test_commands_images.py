"""The commands of the detection recipe that README and docs print are commands that it takes."""

import shlex

import pytest
from commands import read, recipe_commands

pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("torchvision", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("datasets", reason="needs the extra rebnn_hf[recipes]")

COMMANDS = [(page, arguments) for page, recipe, arguments in recipe_commands() if recipe == "detection"]


@pytest.mark.parametrize(("page", "arguments"), COMMANDS, ids=[f"{p}: {shlex.join(a)}" for p, a in COMMANDS])
def test_the_recipe_takes_the_commands_of_the_pages(page, arguments):
    read("detection", arguments)
