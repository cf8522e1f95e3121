"""The extras that users are told to install bring what is imported then."""

import ast
import re
import sys
from pathlib import Path

import pytest
from pages import ROOT, text
from project import pyproject

RECIPES = ROOT / "recipes"
EXTRAS = {  # of each recipe, as README names them
    "glue": ["recipes"],
    "squad": ["recipes"],
    "embedder": ["recipes"],
    "ablation": ["recipes"],
    "image_classification": ["vision", "recipes"],
    "detection": ["detection"],
    "demo": ["demo"],
}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
DISTRIBUTIONS |= {name: name.replace("_", "-") for name in ("huggingface_hub", "sentence_transformers")}
BROUGHT_ALONG = {"pillow": "matplotlib", "torchvision": "timm"}
BROUGHT_ALONG |= dict.fromkeys(("numpy", "tokenizers", "tqdm"), "transformers")
"""What comes with something else."""


def requirements(*extras):
    """Names of all that the package needs with these extras."""
    project, names = pyproject()["project"], set()
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    for requirement in wanted:
        nested = re.match(r"rebnn_hf\[(\w+)\]", requirement)
        names |= requirements(nested[1]) if nested else {re.match(r"[\w-]+", requirement)[0]}
    return names


def imports(path, seen):
    """What is imported at the head of a file, and of the recipes' files that it imports."""
    seen.add(path)
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            file = RECIPES / f"{module}.py"
            if not file.exists():
                found.add(module.partition(".")[0])
            elif file not in seen:
                found |= imports(file, seen)
    return found


@pytest.mark.parametrize("recipe", EXTRAS)
def test_a_recipe_can_be_imported_with_its_extras(recipe):
    names = imports(RECIPES / f"{recipe}.py", set()) - set(sys.stdlib_module_names) - {"rebnn_hf"}
    names = {DISTRIBUTIONS.get(name, name) for name in names}
    names = {BROUGHT_ALONG.get(name, name) for name in names}
    assert "torch" in names or recipe == "demo"
    assert names <= requirements(*EXTRAS[recipe])


def test_readme_names_the_extras():
    assert "pip install -e '.[vision,recipes]'" in text("README.md")
    for recipe in ("detection", "demo"):
        (line,) = (line for line in text("README.md").splitlines() if line.startswith(f"python recipes/{recipe}.py"))
        assert f"(extra `{EXTRAS[recipe][0]}`)" in line


def test_what_errors_advise_exists():
    sources = [*(ROOT / "rebnn_hf").rglob("*.py"), *RECIPES.glob("*.py")]
    advised = {extra for path in sources for extra in re.findall(r"rebnn_hf\[(\w+)\]", Path(path).read_text("utf-8"))}
    assert {"detection", "vision", "peft"} <= advised <= set(pyproject()["project"]["optional-dependencies"])
