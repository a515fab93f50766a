"""Imports go down only, and nothing above the line knows Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "claydist"

# Lowest first: a module or package imports only from those before it; a package may import inside itself.
ABOVE_THE_LINE = (
    "errors", "spec", "specfile", "files", "storage", "schema", "comparisons", "expressions", "sketch",
    "arrays", "profile", "features",
    "values", "rows", "models", "score_table", "ranking", "metrics", "predictor", "labels", "bundle", "registry",
    "alive", "runs",
)  # fmt: skip
BELOW_THE_LINE = (
    "display", "cluster", "dataset", "collective", "training", "places", "preparation", "memory", "evaluate",
    "reporting", "assessment", "scoring", "serving", "pipeline", "plan", "quickstart", "api", "reference", "output",
    "registry_commands", "cli", "__main__",
)  # fmt: skip
ORDER = ABOVE_THE_LINE + BELOW_THE_LINE
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def unit(file: Path) -> str:
    """The module or package of the first level that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also within functions and for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_units(file: Path) -> set[str]:
    """Units of claydist that a file imports; names that are no module (`__version__`) are left out."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("claydist.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_its_place() -> None:
    assert {unit(file) for file in FILES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER)) > 30


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down(name: str) -> None:
    below = set(ORDER[: ORDER.index(name)])
    wrong = {
        str(file.relative_to(PACKAGE)): sorted(upward)
        for file in FILES
        if unit(file) == name and (upward := own_units(file) - below - {name})
    }
    assert not wrong, f"{name} imports from above itself: {wrong}"


def test_the_check_finds_imports() -> None:
    assert own_units(PACKAGE / "predictor.py") >= {"errors", "features", "models", "schema"}
    assert sum(len(own_units(file)) for file in FILES) > 100


@pytest.mark.parametrize("name", ABOVE_THE_LINE)
def test_nothing_above_the_line_imports_ray(name: str) -> None:
    for file in FILES:
        if unit(file) == name:
            assert not {i for i in imports(file) if i.split(".")[0] == "ray"}, file


def test_importing_what_is_above_the_line_leaves_ray_out() -> None:
    modules = ", ".join(f"claydist.{name}" for name in ABOVE_THE_LINE)
    code = f"import sys, {modules}, claydist; claydist.load; print(sorted(m for m in sys.modules if m[:3] == 'ray'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
