"""Results on disk: each stands there as a whole or not at all, under a key of what decided it."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growlib import GrowError


def key_of(*parts: Any) -> str:
    """A short hash of plain data. Equal settings have equal keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_of_folder(folder: Path) -> str:
    """A short hash of the files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def open_folder(folder: Path) -> None:
    """Make a folder of results, and try it: results come late.

    Raises:
        GrowError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        wrong = f"nothing can be written there ({error.strerror})"
        raise GrowError(f"--out {folder}", wrong, "a folder, or a path where nothing stands") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it does not exist.

    Raises:
        GrowError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise GrowError(
            f"reading {path}", f"it is not JSON ({error})", "a file of this recipe; or delete it"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write plain data, indented."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder as a whole: `fill` writes into one beside its place, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        if not path.exists():  # or else another process has written the same meanwhile
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
