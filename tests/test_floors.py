"""The layering of the package, read from its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rebnn_hf"
FLOORS = {
    "architecture": 0,
    "distillation": 0,
    "functional": 0,
    "packing": 0,
    "presets": 0,
    "activations": 1,
    "binarizers": 2,
    "config": 2,
    "attention": 3,
    "layers": 3,
    "flops": 4,
    "insertion": 4,
    "targets": 4,
    "patching": 5,
    "plotting": 5,
    "projections": 5,
    "report": 5,
    "resilience": 5,
    "integrations.transformers": 6,
    "trainer": 6,
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def internal_imports(name, path):
    depth = name.count(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != depth + 1:
                pytest.fail(f"{name}: import from outside the package's root: {ast.unparse(node)}")
            yield from [node.module] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("name, path", list(modules()), ids=[name for name, _ in modules()])
def test_imports_go_down(name, path):
    assert name in FLOORS, f"{name} has no floor yet: give it one here and in CONTRIBUTING.md"
    for imported in internal_imports(name, path):
        assert FLOORS[imported] < FLOORS[name], f"{name} imports {imported}"


def test_layers_do_not_know_transformers():
    text = "".join((PACKAGE / f"{name}.py").read_text() for name in ("functional", "activations", "packing", "layers"))
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
