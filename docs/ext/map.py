"""docs/map.md: what each file is for, by its own first line, each file below those that it uses.

    python docs/ext/map.py docs/map.md

A new file needs nothing but a first line; a test compares the page with what this command writes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"growlib": ROOT, "recipes": ROOT / "recipes", "docs/ext": ROOT / "docs/ext"}  # where imports begin
KINDS = (".py", ".toml", ".sh")
HEAD = """# The files

Written by `python docs/ext/map.py docs/map.md` from the first line of each file. Do not edit it.

## How data flows

Data flows one way. The two halves do not import each other; recipes and the command line join them.

```text
weights                                      knowledge

checkpoint     checkpoint/                   teacher     ki/teacher.py
    ↓                                            ↓
architecture   architectures/, inference/    targets     ki/targets.py, ki/cache/
    ↓                                            ↓
operator       operators/                    loss        ki/loss.py, ki/linear.py
    ↓                                            ↓
plan           planner.py, growth_plan.py    trainer     ki/trainer.py
    ↓
apply          apply.py
    ↓
checkpoint     checkpoint/
```

## What each file is for

No files import each other in a circle. In each folder a file uses only files above it.

"""


def first_line(path: Path) -> str:
    """What a file says that it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        return line.removeprefix(f"{path.stem.replace('_', '-')}: ")
    comment = takewhile(lambda line: line.startswith("#"), text.removeprefix("#!/usr/bin/env bash\n").splitlines())
    return re.split(r"(?<=[.?]) ", " ".join(line.lstrip("# ") for line in comment))[0]


def in_order(paths: list[Path], prefix: str) -> Iterator[Path]:
    """The files of one folder, each after those that it imports, else by name. `prefix`: of its modules' names."""
    files = {prefix + path.stem: path for path in paths}
    uses = TopologicalSorter({name: files.keys() & imported(path) - {name} for name, path in files.items()})
    uses.prepare()
    ready: list[str] = []
    while uses.is_active():
        ready = sorted([*ready, *uses.get_ready()])
        yield files[ready[0]]
        uses.done(ready.pop(0))


def imported(path: Path) -> set[str]:
    """All that a file may import: modules, and names in them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if path.suffix == ".py" else "")):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def tree(folder: Path, root: Path, depth: int = 0) -> Iterator[str]:
    """A folder as a list: its files, then its folders."""
    files = {path.name: path for path in folder.iterdir() if path.suffix in KINDS}
    name, about = str(folder.relative_to(ROOT)) if not depth else folder.name, files.pop("__init__.py", None)
    yield f"{'    ' * depth}- **{name}/** {first_line(about) if about else ''}".rstrip()
    prefix = "".join(f"{part}." for part in folder.relative_to(root).parts)
    for path in in_order(list(files.values()), prefix):
        yield f"{'    ' * (depth + 1)}- `{path.name}` {first_line(path)}".rstrip()
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))):
        yield from tree(below, root, depth + 1)


def page() -> str:
    """docs/map.md."""
    return HEAD + "\n".join(line for folder, root in FOLDERS.items() for line in tree(ROOT / folder, root)) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
