"""What stands beside a checkpoint's weights: tokenizer, processor, modules of a pipeline. It goes along."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growlib.checkpoint.loading import logger
from growlib.folders import INDEX, METADATA, WEIGHTS
from growlib.growth_plan import FILE

REWRITTEN = {"config.json", "generation_config.json", INDEX, FILE}  # by the growth itself
LARGEST = 1 << 20  # bytes of a JSON file that may describe a size


def copy_companions(source: Path, destination: Path, sizes: dict[int, int]) -> None:
    """Copy every plain file, and every subfolder, that holds no weights of the model.

    A subfolder that `modules.json` names (a sentence-transformers pipeline) goes along whole.

    Args:
        sizes: of the residual stream, old -> new: a JSON file of a module that names its dimension follows, and weights
            that read the old one are named in a warning.
    """
    modules = _modules(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in REWRITTEN:
            continue
        if path.is_file() and not _is_weights(path) and not (destination / path.name).exists():
            shutil.copyfile(path, destination / path.name)
        elif path.is_dir() and not (path / METADATA).is_file():  # torch.distributed's weights
            shutil.copytree(path, destination / path.name, ignore=None if path.name in modules else _weights_in)
    for name in sorted(modules):
        _follow(destination / name, sizes)


def _modules(source: Path) -> set[str]:
    """The subfolders that modules.json names."""
    try:
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in listed if module.get("path")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _is_weights(path: Path) -> bool:
    return any(path.match(pattern) for pattern in WEIGHTS)


def _weights_in(folder: str, names: list[str]) -> list[str]:
    """What stays behind in a subfolder: weights, hidden files, and what is no plain file."""
    paths = [Path(folder, name) for name in names]
    return [p.name for p in paths if p.name.startswith(".") or _is_weights(p) or not (p.is_file() or p.is_dir())]


def _follow(module: Path, sizes: dict[int, int]) -> None:
    """Give the dimensions in a module's JSON files their new sizes."""
    for path in sorted(module.glob("*.json")) if module.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= LARGEST else None
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and (changed := dict(_grown(content, sizes))):
            path.write_text(json.dumps(content | changed, indent=2) + "\n", encoding="utf-8")
            if any(_is_weights(file) for file in module.iterdir()):
                logger.warning("%s has weights of its own, which were made for the old width", module.name)


def _grown(content: dict[str, Any], sizes: dict[int, int]) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if type(value) is int and value in sizes and ("dim" in key or "features" in key):
            yield key, sizes[value]
