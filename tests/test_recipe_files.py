"""What the files of the recipes may import, and how long they may be."""

import ast
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


def imported(path: Path) -> set[str]:
    """The first names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0], *(name.name for name in node.names)}
    return found


def test_no_recipe_is_imported_by_another_and_none_by_the_library():
    scripts = {path.stem for path in RECIPES.glob("*.py")}
    files = list(RECIPES.rglob("*.py"))
    assert len(scripts) >= 9
    assert len(files) >= 25
    assert {path.name: imported(path) & scripts for path in files if imported(path) & scripts} == {}
    library = list((RECIPES.parent / "growlib").rglob("*.py"))
    assert len(library) >= 50
    outside = scripts | {"base", "recipes"}
    assert {path.name: imported(path) & outside for path in library if imported(path) & outside} == {}


def test_recipes_stay_short():
    for path in RECIPES.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)
