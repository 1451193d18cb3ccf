"""Folders of torch.distributed.checkpoint, read and written by one process: no process group is needed.

Such a folder holds `.metadata`, a pickle that says which values there are and in which file each part of them lies, and
files such as `__0_0.distcp`. torch unpickles both without a limit. Here `.metadata` may name nothing but the classes
that torch itself writes there, and values are what `torch.load(weights_only=True)` reads.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from growlib.errors import GrowError
from growlib.folders import METADATA

_METADATA_OF_TORCH = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_METADATA_OF_TORCH, name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"), ("collections", "OrderedDict"),
}  # fmt: skip


def read_tree(asked: str, folder: Path) -> dict[str, Any]:
    """All that a folder holds, nested as it was saved: dicts, lists, whole tensors in memory, numbers and texts.

    Raises:
        GrowError: a file is missing or broken, or holds other objects than these.
    """
    reader = _Reader(folder)
    try:
        metadata = reader.read_metadata()
        flat = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in metadata.state_dict_metadata.items()
        }
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _alone():
            dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
        return _nested(flat, metadata.planner_data or {})
    except (Exception, dcp.CheckpointException) as error:  # whatever a broken file makes torch raise
        wrong = f"{folder.name} is no whole folder of torch.distributed.checkpoint ({_cause(error)})"
        raise GrowError(asked, wrong, f"{METADATA} and all files that it names, as torch wrote them") from error


def write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write such a folder: each tensor as one part, which processes split when they read it. Raises OSError."""
    folder.mkdir(exist_ok=True)
    try:
        with _alone():
            dcp.save(dict(tree), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    except dcp.CheckpointException as error:  # no Exception
        raise OSError(_cause(error)) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that there is one process: that is what is asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: BaseException) -> str:
    """What went wrong first, in one line."""
    if isinstance(error, dcp.CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA} holds a {type(metadata).__name__}")
        for name in {str(info.relative_path) for info in (metadata.storage_data or {}).values()}:
            if Path(name).name != name or not (Path(self.path) / name).is_file():
                raise FileNotFoundError(f"{METADATA} names {name}, which is no file beside it")
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which torch does not write there")


class _Inner(dict):
    """A dict or a list of the tree; a value that is a dict is none."""


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    tree = _Inner()
    for name, value in flat.items():
        *outer, last = paths.get(name, (name,))
        at = tree
        for key in outer:
            at = at.setdefault(key, _Inner())
        at[last] = value
    return dict(_with_lists(tree))


def _with_lists(node: Any) -> Any:
    """Keys that are numbers are places in a list: torch makes all keys of a dict texts."""
    if not isinstance(node, _Inner):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_with_lists(node[key]) for key in sorted(node)]
    return {key: _with_lists(value) for key, value in node.items()}
