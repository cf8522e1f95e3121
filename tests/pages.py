"""README and the pages of docs, and what of them can be run: Python code, and commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))}

FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def text(page: str) -> str:
    """What is in the page of that file name."""
    return PAGES[page].read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return [code for language, code in FENCED.findall(text(page)) if language == "python"]


def run_page(page: str, names: dict) -> dict:
    """Runs the Python code of a page, all of its blocks as one program that is given `names`; what it leaves."""
    exec(compile("\n".join(python_blocks(page)), page, "exec"), names)
    return names


def commands(page: str) -> Iterator[list[str]]:
    """The words of the commands of a page: all of its shell blocks, and inline code of several words."""
    lines = []
    for language, code in FENCED.findall(text(page)):
        if language == "bash":
            lines += code.replace("\\\n", " ").splitlines()
    lines += [code for code in INLINE.findall(FENCED.sub("", text(page))) if " " in code and not code.startswith("-")]
    for line in lines:
        for command in re.split(r"&&|;", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # inline code that is no command
                continue
            if words:
                yield words
