"""The house: no circle of imports, no module that hides behind a public function, data below what decides."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import growlib

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "growlib").rglob("*.py")
}

NEUTRAL = {"growlib.errors", "growlib.folders"}  # belong to no half


def imported(name, path, files):
    """The modules that a file imports, inside functions and for types too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base


def graph(files):
    """module -> modules that it imports; the public face, which imports everything on first use, is left out."""
    inside = {name: {n for n in imported(name, path, files) if n in files} for name, path in files.items()}
    return {name: uses - {name, "growlib"} for name, uses in inside.items() if name != "growlib"}


def circle(uses):
    """A path through the graph that comes back to where it began; empty where there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        found = next((c for other in sorted(uses[name]) if (c := visit(other))), [])
        path.pop()
        done.add(name)
        return found

    return next((c for name in sorted(uses) if (c := visit(name))), [])


def test_no_circle_of_imports():
    assert len(FILES) > 60
    assert not circle(graph(FILES))


@pytest.mark.parametrize("hidden", ["import a.one", "def f():\n    from a import one", "from . import one"])
def test_a_circle_is_seen(hidden, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("from a.two import x\n")
    (tmp_path / "a" / "two.py").write_text(f"from typing import TYPE_CHECKING\n{hidden}\n")
    files = {"a.one": tmp_path / "a" / "one.py", "a.two": tmp_path / "a" / "two.py"}
    assert circle(graph(files)) == ["a.one", "a.two", "a.one"]


def reached(name, uses):
    """Everything that a module imports, through others too."""
    known, new = set(), {name}
    while new:
        known |= new
        new = set().union(*(uses[one] for one in new)) - known
    return known - {name}


def test_the_frozen_data_knows_nothing_of_what_decides_or_applies():
    deciding = {"planner", "operators", "inference", "growth", "upcycling", "checkpoint", "reasons", "contract"}
    applying = {"apply", "training", "learning", "verification", "costs", "cards", "cli", "commands"}
    for data in ("growth_plan", "maps", "layouts", "architectures.schema"):
        below = {name.removeprefix("growlib.").split(".")[0] for name in reached(f"growlib.{data}", graph(FILES))}
        assert not below & (deciding | applying), data


def test_the_two_halves_do_not_import_each_other():
    """Recipes and the command line join them."""
    for name, uses in graph(FILES).items():
        of_ki = {used.startswith("growlib.ki") for used in uses - NEUTRAL}
        assert name == "growlib.commands" or name in NEUTRAL or of_ki <= {name.startswith("growlib.ki")}, name
    assert all(reached(name, graph(FILES)) <= NEUTRAL for name in NEUTRAL)


def modules(package):
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


def test_no_public_function_has_the_name_of_a_module():
    everywhere = {name.split(".")[-1] for name in FILES}
    public = {name for name in growlib.__all__ if not inspect.ismodule(getattr(growlib, name))}
    assert not public & everywhere
    assert not set(growlib.ki.__all__) & modules(growlib.ki)
    for name in modules(growlib):  # `import growlib.operators.lossless as x` gives the module
        assert inspect.ismodule(importlib.import_module(f"growlib.{name}"))
        assert inspect.ismodule(getattr(growlib, name))


def test_the_public_face_is_seen_by_people_and_by_type_checkers():
    assert dir(growlib) == sorted(growlib.__all__)
    typed = next(node for node in ast.walk(ast.parse(FILES["growlib"].read_text())) if isinstance(node, ast.If))
    names = {alias.name for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(growlib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'expnd'"):
        growlib.expnd  # noqa: B018


def test_importing_growlib_imports_nothing_heavy():
    code = (
        "import sys, growlib, growlib.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_file_and_no_function_is_long():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                told = ast.get_docstring(node, clean=False) or ""
                assert node.end_lineno - node.lineno - told.count("\n") < 60, f"{name}.{node.name}"
