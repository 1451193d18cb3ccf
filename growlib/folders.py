"""Where a checkpoint lies: find its folder, check it before anything is loaded, write one as a whole or not at all."""

import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from growlib.errors import GrowError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf",
           "*.distcp")  # fmt: skip
METADATA = ".metadata"  # of a folder of torch.distributed.checkpoint
REQUEST = ".request"  # in an unfinished folder: what it is for
_active: set[Path] = set()  # the hidden folders that this process writes
FLOATS = {"F64", "F32", "F16", "BF16"}


def folder_of(source: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: the one that is named, or the snapshot of a hub id, which is fetched or cached.

    Args:
        weights: a snapshot without them will do where it is False.

    Raises:
        GrowError: there is no such folder and no such repository.
    """
    asked = f"reading the checkpoint {str(source)!r}"
    folder = Path(source)
    if folder.is_dir():
        return folder
    valid = "a folder written by save_pretrained, or a hub id"
    if folder.exists() or folder.is_absolute() or len(folder.parts) > 2 or isinstance(source, Path):
        raise GrowError(asked, "it is a file" if folder.exists() else "there is no such folder", valid)
    others = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(source, ignore_patterns=[*others, *([] if weights else ["*.safetensors"])]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        wrong = f"there is no such folder, and no hub repository of this name is within reach ({type(error).__name__})"
        raise GrowError(asked, wrong, valid) from error


def read_json(asked: str, path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises GrowError for anything else."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for somebody who writes
        raise GrowError(asked, f"{path.name} is no file but a pipe, a device or a folder", "a JSON object")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GrowError(asked, f"{path.name} is not a valid JSON file ({error})", "a JSON object") from error
    if not isinstance(content, dict):
        raise GrowError(asked, f"{path.name} holds a {type(content).__name__}", "a JSON object")
    return content


def check_config(asked: str, folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises GrowError for what is no checkpoint of a model, and says what it is."""
    if (folder / "config.json").is_file():
        config = read_json(asked, folder / "config.json")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method", "a method") if isinstance(quantised, dict) else quantised
            valid = "the dequantised model: load it, call model.dequantize(), and save it"
            raise GrowError(asked, f"it is quantised with {method}", valid)
        return config
    if (folder / "adapter_config.json").is_file():
        base = read_json(asked, folder / "adapter_config.json").get("base_model_name_or_path")
        valid = "the merged model: PeftModel.from_pretrained(...).merge_and_unload(), saved"
        raise GrowError(asked, f"it is a PEFT adapter of {base!r}, not a model", valid)
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    wrong = "there is no config.json" + (f"; its subfolders {', '.join(inside)} have one" if inside else "")
    raise GrowError(asked, wrong, "a folder written by save_pretrained")


def tensors_in(asked: str, folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Each stored tensor: its file, dtype and shape, from the headers alone.

    Raises:
        GrowError: there are no safetensors weights, the index names something else than files of the folder or does
            not fit them, or a header is broken.
    """
    mapped: dict[str, str] | None = None
    if (folder / SINGLE).is_file():
        names = {SINGLE}
    elif (folder / INDEX).is_file():
        mapped = _weight_map(asked, folder)
        names = set(mapped.values())
    else:
        raise _no_weights(asked, folder)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise GrowError(asked, f"its shard {name} is missing", "every file that the index names")
        try:
            with safe_open(folder / name, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  no mapping
                found |= {k: (folder / name, s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise GrowError(asked, f"{name} is no whole safetensors file ({error})", "a whole checkpoint") from error
    if lost := [key for key, name in (mapped or {}).items() if found.get(key, ("",))[0] != folder / name]:
        raise GrowError(asked, f"{INDEX} names a file for {lost[0]} that does not hold it", "a whole checkpoint")
    return found


def _weight_map(asked: str, folder: Path) -> dict[str, str]:
    mapped = read_json(asked, folder / INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise GrowError(asked, f"{INDEX} has no weight_map", "tensor names and the files that hold them")
    for key, name in mapped.items():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            valid = "plain names of .safetensors files in the same folder"
            raise GrowError(asked, f"{INDEX} names {name!r} for {key}", valid)
    return mapped


def _no_weights(asked: str, folder: Path) -> GrowError:
    valid = f"weights in safetensors (save_pretrained writes {SINGLE}, or shards with {INDEX})"
    for kind, patterns in (
        ("pickled", WEIGHTS[1:5]),
        ("of another format", WEIGHTS[5:]),
        ("of other names", WEIGHTS[:1]),
    ):
        if files := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            return GrowError(asked, f"its weights are {kind} ({', '.join(files)})", valid)
    return GrowError(asked, "there are no weights", valid)


@contextmanager
def new_folder(path: str | Path, room: int = 0, request: str = "") -> Iterator[Path]:
    """A folder that exists as a whole or not at all: written beside its place, then renamed.

    What an interrupted call left beside the place is removed. Files get the modes that the umask asks for.

    Args:
        room: bytes that will be written, for which there must be room.
        request: what is asked for. What an interrupted call with the same request left is kept, and gone on with.

    Raises:
        GrowError: something stands at `path`, it cannot be written to, or the disk is full, before or in between.
    """
    path = Path(path)
    asked, valid = f"writing {str(path)!r}", "a new folder, where there is room and the right to write"
    if os.path.lexists(path):
        raise GrowError(asked, "it exists already", "a path where nothing stands")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-{os.getpid()}-", suffix=".growlib", dir=path.parent))
        for left in path.parent.glob(f".{glob.escape(path.name)}-*.growlib"):
            if left != temporary and not _is_running(left):
                if request and _text(left / REQUEST) == request and not any(temporary.iterdir()):
                    left.replace(temporary)  # of two calls that try, one has it
                shutil.rmtree(left, ignore_errors=True)
        if request:
            (temporary / REQUEST).write_text(request, encoding="utf-8")
    except OSError as error:
        raise GrowError(asked, f"it cannot be written ({error.strerror or error})", valid) from error
    try:
        _active.add(temporary)
        free = shutil.disk_usage(temporary).free
        room -= sum(file.stat().st_size for file in temporary.iterdir() if file.is_file())
        if free < room:
            wrong = f"it takes {room / 1e9:.3g} GB, and {free / 1e9:.3g} GB of the disk are free"
            raise GrowError(asked, wrong, valid)
        yield temporary
        (temporary / REQUEST).unlink(missing_ok=True)
        _as_the_umask_says(temporary)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        wrong = (
            "it exists by now: another call was first" if os.path.lexists(path) else f"it cannot be written ({error})"
        )
        raise GrowError(asked, wrong, valid) from error
    finally:
        _active.discard(temporary)
        if not (request and isinstance(sys.exc_info()[1], KeyboardInterrupt)):
            shutil.rmtree(temporary, ignore_errors=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _is_running(left: Path) -> bool:
    """Whether the process that writes a hidden folder is still there, and still at it."""
    number = left.name.removesuffix(".growlib").split("-")[-2]
    if number == str(os.getpid()):
        return left in _active
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _as_the_umask_says(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
