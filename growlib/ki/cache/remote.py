"""A cache on object storage (`s3://`, `gs://`, `hf://`, ...): its files are fetched once and kept on this machine."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from huggingface_hub import constants

from growlib.errors import GrowError
from growlib.ki.cache.shards import HEADER
from growlib.ki.sources import first_line

KEPT = Path(constants.HF_HOME) / "growlib"  # the machine's folder for what is fetched


def is_remote(path: Any) -> bool:
    """Whether a path names a place elsewhere."""
    return isinstance(path, str) and "://" in path


def files_at(url: str) -> dict[str, int]:
    """The names of the files in a folder elsewhere, and their bytes; empty where there is none.

    Raises:
        GrowError: nothing on this machine speaks the protocol, or the place is out of reach.
    """
    asked = f"reading the teacher's cache {url!r}"
    try:
        system, root = fsspec.core.url_to_fs(url)
        listed = system.ls(root, detail=True) if system.isdir(root) else []
    except (ImportError, ValueError) as error:
        raise GrowError(
            asked, first_line(error), "a protocol of fsspec that is installed, such as s3fs for s3://"
        ) from error
    except Exception as error:  # whatever a storage's own library raises
        wrong = f"it is out of reach ({type(error).__name__}: {first_line(error)})"
        raise GrowError(asked, wrong, "a place that this machine can read") from error
    return {os.path.basename(one["name"]): one["size"] for one in listed if one["type"] == "file"}


def fetched(url: str) -> Path:
    """A folder of this machine with the files of a folder elsewhere; those that are here already are not fetched again.

    Several processes of a machine share it; one of them fetches. Raises GrowError as `files_at`.
    """
    listed = files_at(url)
    if not listed:
        wrong = "there is no folder with files"
        raise GrowError(f"reading the teacher's cache {url!r}", wrong, "a folder that growlib.cache_teacher wrote")
    system, root = fsspec.core.url_to_fs(url)
    header = _fetch(url, HEADER, lambda: system.cat_file(f"{root.rstrip('/')}/{HEADER}")) if HEADER in listed else b""
    # Caches of other teachers or data may have the same sizes, and not the same header.
    folder = KEPT / hashlib.blake2b(f"{url} {sorted(listed.items())} ".encode() + header, digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for name, size in listed.items():
            here = folder / name
            if here.is_file() and here.stat().st_size == size:
                continue
            part = folder / f".{name}.part"
            _fetch(url, name, partial(system.get_file, f"{root.rstrip('/')}/{name}", str(part)))
            os.replace(part, here)
    return folder


def _fetch(url: str, name: str, fetch: Callable[[], Any]) -> Any:
    """What the fetch of a file gives; GrowError where it fails."""
    try:
        return fetch()
    except Exception as error:  # whatever a storage's own library raises
        wrong = f"{name} cannot be fetched ({type(error).__name__}: {first_line(error)})"
        valid = "a place that this machine can read; what is fetched is kept, and the same call continues"
        raise GrowError(f"reading the teacher's cache {url!r}", wrong, valid) from error
