"""Reads command lines of the recipes as the recipes themselves do, without running anything."""

import sys
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from pages import PAGES, commands

RECIPES = Path(__file__).parents[1] / "recipes"
PLACEHOLDERS = {"S": "1"}
"""Words that stand for a value, where the value has a type."""


def recipe_commands() -> list[tuple[str, str, list[str]]]:
    """Page, recipe and arguments of every command of README and docs that runs a recipe."""
    found = []
    for page in PAGES:
        for words in commands(page):
            script, arguments = run_by(words)
            if script.startswith("recipes/"):
                arguments = [PLACEHOLDERS.get(word, word) for word in arguments if word != "..."]
                found.append((page, Path(script).stem, arguments))
    return found


def run_by(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command runs and its arguments; the script is empty where it runs none.

    What `accelerate launch` is given has to be known to it.
    """
    while words and "=" in words[0]:  # environment variables
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program == "accelerate" and words[1:2] == ["launch"] and len(words) > 2:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if program in ("python", "python3") and len(words) > 1:
        return words[1], words[2:]
    return (words[0], words[1:]) if words and words[0].startswith("recipes/") else ("", [])


# How each recipe reads its command line


def ablation(argv: list[str]) -> None:
    """The options of the grid, and those of each of its runs."""
    import ablation

    arguments, rest = ablation.parse_arguments(argv)
    ablation.check_runs(ablation.plan_runs(arguments, rest, ablation.plan_teachers(arguments, rest)))


def demo(argv: list[str]) -> None:
    import demo

    demo.parse_arguments(argv)


def detection(argv: list[str]) -> None:
    from detection_arguments import parse_detection_arguments

    parse_detection_arguments(argv)


def embedder(argv: list[str]) -> None:
    from embedder_arguments import parse_embedder_arguments

    parse_embedder_arguments(argv)


def glue(argv: list[str]) -> None:
    from glue_arguments import parse_glue_arguments

    parse_glue_arguments(argv)


def image_classification(argv: list[str]) -> None:
    from image_arguments import parse_image_arguments

    parse_image_arguments(argv)


def squad(argv: list[str]) -> None:
    from squad_arguments import parse_squad_arguments

    parse_squad_arguments(argv)


PARSERS: dict[str, Callable[[list[str]], None]] = {
    parse.__name__: parse for parse in (ablation, demo, detection, embedder, glue, image_classification, squad)
}


def read(recipe: str, arguments: list[str]) -> None:
    """Has a recipe read its command line.

    Raises:
        SystemExit: it refuses it, with the reason on standard error.
    """
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    PARSERS[recipe](arguments)
