"""How the files of the knowledge half depend on each other."""

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import growlib
import growlib.ki

ROOT = Path(growlib.__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "growlib" / "ki").rglob("*.py"))
}


def imports(name, tree):
    """The modules of the half that a file imports, also in functions and for types."""
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, name
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & set(MODULES) - {name}


def test_no_file_imports_in_a_circle():
    graph = {name: imports(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 60
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order[-1] == "growlib.ki"
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter({**graph, "growlib.ki.treatments": {"growlib.ki.trainer"}}).prepare()


def test_no_module_has_the_name_of_a_public_function():
    functions = {name for of in (growlib, growlib.ki) for name in of.__all__ if inspect.isroutine(getattr(of, name))}
    assert {"expand", "verify", "mixture", "ki_loss"} <= functions
    assert not functions & {name.rsplit(".", 1)[-1] for name in MODULES}
