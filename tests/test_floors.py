"""The layering of the package, read from its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rebnn_hf"
FLOORS = {
    "architecture": 0,
    "auto_classes": 0,
    "checkpoints": 0,
    "distillation": 0,
    "functional": 0,
    "inputs": 0,
    "notebook": 0,
    "packing": 0,
    "presets": 0,
    "shards": 0,
    "timing": 0,
    "activations": 1,
    "hub": 1,
    "kernels": 1,
    "loading": 1,
    "binarizers": 2,
    "config": 2,
    "epochs": 2,
    "passes": 2,
    "attention": 3,
    "states": 3,
    "convolutions": 4,
    "layers": 5,
    "flops": 6,
    "fusion": 6,
    "insertion": 6,
    "targets": 6,
    "benchmark": 7,
    "patching": 7,
    "plotting": 7,
    "projections": 7,
    "report": 7,
    "resilience": 7,
    "soundness": 7,
    "card": 8,
    "verification": 7,
    "cli": 8,
    "comparison": 8,
    "int8": 8,
    "integrations": 8,
    "saving": 8,
    "vision": 8,
    "training_arguments": 8,
    "trainer": 9,
}

INSIDE = {
    "cli": ["output", "fields", "files", "info", "bench", "binarize", "pack", "unpack", "verify"],
    "vision": ["blocks", "backbone", "checkpoints", "reactnet", "resnet", "detection"],
}
"""Files of folders in which files import each other: only those before them."""


def modules():
    """Names and files, a folder's `__init__` by the name of the folder; the root's may import all."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name != "__init__":
            yield name.removesuffix(".__init__"), path


def internal_imports(name, path):
    """Names of imported modules, `kernels.cpu`; of what is imported from a module, the module."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > len(package) + 1:
                pytest.fail(f"{name}: import from outside the package: {ast.unparse(node)}")
            start = package[: len(package) + 1 - node.level]
            modules = [node.module] if node.module else [a.name for a in node.names if not a.name.startswith("__")]
            yield from (".".join([*start, module]) for module in modules)


def unit(name):
    """What has a floor: a file of the package, or a folder as a whole."""
    return name.partition(".")[0]


def before(name):
    """What a file may import from its own folder: `__init__` all, others what INSIDE says."""
    folder, _, file = name.partition(".")
    if not file:
        return {imported for imported, _ in modules() if imported.startswith(f"{folder}.")}
    order = INSIDE.get(folder, [file])
    return {f"{folder}.{earlier}" for earlier in order[: order.index(file)]}


@pytest.mark.parametrize("name, path", list(modules()), ids=[name for name, _ in modules()])
def test_imports_go_down(name, path):
    assert unit(name) in FLOORS, f"{name} has no floor yet: give it one here and in CONTRIBUTING.md"
    for imported in internal_imports(name, path):
        if unit(imported) == unit(name):
            assert imported != unit(name) and imported in before(name), f"{name} imports {imported}, its neighbour"
        else:
            assert FLOORS[unit(imported)] < FLOORS[unit(name)], f"{name} imports {imported}"


def test_layers_do_not_know_transformers():
    names = ("functional", "activations", "packing", "states", "convolutions", "layers")
    text = "".join((PACKAGE / f"{name}.py").read_text() for name in names)
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text.replace("from __future__ import annotations", "")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "transformers" not in imported and "torch" in imported


def test_import_registers_the_format_and_nothing_heavier():
    code = (
        "import sys, rebnn_hf\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "assert 'rebnn' in table\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(loaded & {'matplotlib', 'datasets', 'evaluate', 'peft', 'timm', 'sklearn'}))\n"
        "print('rebnn_hf.trainer' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr


def test_public_names_exist():
    import rebnn_hf

    for name in rebnn_hf.__all__:
        assert getattr(rebnn_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'binarise'"):
        _ = rebnn_hf.binarise
