"""The files of a cache: a header and safetensors shards, each there as a whole or not at all.

    header.json               what the targets are of, and the format of their records
    shard-00000.safetensors   digests [E, 16] uint8, starts [E + 1] int64, checksums [E] uint32,
                              teacher_ce [E] float32 (the teacher's CE at τ = 1, summed over its known labels),
                              known [E] int32 (how many labels are among its token ids), records [N, R] uint8
    head.safetensors          the teacher's head, where the records are its hidden states: see heads.py

Shapes: E examples of a shard, N their counted positions, R bytes of a record.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.folders import read_json
from growlib.ki.cache.examples import DIGEST_BYTES
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.states import DTYPES, StateFormat
from growlib.ki.sources import short
from growlib.ki.tasks import AUTO_CLASSES, Task

FORMAT = 4
HEADER = "header.json"
INDEX = {"digests": "u1", "starts": "i8", "checksums": "u4", "teacher_ce": "f4", "known": "i4"}


@dataclass(frozen=True)
class Header:
    """Everything that a cache's bytes depend on.

    Attributes:
        format: of the files.
        dtype: what the weights were cast to, such as "bfloat16"; None: not at all.
        teacher: class and hash of the weights.
        tokenizer: hash of the (token, id) pairs; None where no tokenizer was given.
        task: of the teacher.
        vocab, top_k, samples, temperature: see `RecordFormat`; 0, 0 and 1 where the records are hidden states.
        seed: of the draws.
        examples: their number, in `shards` files of `shard_examples`.
        dataset: hash of up to 256 examples, evenly spread.
        batch_size: of the teacher's forward passes.
        held_out_ce: the teacher's mean CE on held-out text, where it was measured.
        hidden_size, hidden_dtype: see `StateFormat`; None where the records are probabilities.
        head: hash of the teacher's head, which goes with hidden states.
    """

    format: int
    dtype: str | None
    teacher: str
    tokenizer: str | None
    task: Task
    vocab: int
    top_k: int
    samples: int
    temperature: float
    seed: int
    examples: int
    dataset: str
    shard_examples: int
    batch_size: int
    held_out_ce: float | None
    hidden_size: int | None = None
    hidden_dtype: str | None = None
    head: str | None = None

    @property
    def store(self) -> str:
        """What the records are: "probabilities" or "hidden" states."""
        return "probabilities" if self.head is None else "hidden"

    @property
    def record_format(self) -> RecordFormat | StateFormat:
        if self.head is None or self.hidden_size is None or self.hidden_dtype is None:
            return RecordFormat(self.vocab, self.top_k, self.samples, self.temperature)
        return StateFormat(self.vocab, self.hidden_size, self.hidden_dtype)

    @property
    def shards(self) -> int:
        return -(-self.examples // self.shard_examples)

    @property
    def key(self) -> str:
        """Written into every shard, so that none of another cache is read."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def difference(self, other: "Header") -> str | None:
        """What differs from another header, in words; None where nothing does."""
        if self.store != other.store:
            return f"store={other.store!r} and not {self.store!r}"
        words = {
            "format": "another format of the files",
            "teacher": "another teacher (the hash of its weights differs)",
            "tokenizer": "another tokenizer",
            "examples": f"a dataset of {other.examples} examples and not of {self.examples}",
            "dataset": "other examples, or the same in another order",
            "head": "another head of the teacher (weight, bias, scale or soft-cap)",
        }
        for field in dataclasses.fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                return words.get(field.name, f"{field.name} = {others!r} and not {mine!r}")
        return None


def _whole(least: int, most: int = 1 << 62) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_dtype(value: Any) -> bool:
    return _text(value) and isinstance(dtype := getattr(torch, value, None), torch.dtype) and dtype.is_floating_point


# What each field of a header is; None where that is allowed too.
FIELDS: dict[str, tuple[Callable[[Any], bool], bool]] = {
    "format": (_whole(FORMAT, FORMAT), False),
    "dtype": (_is_dtype, True),
    "teacher": (_text, False),
    "tokenizer": (_text, True),
    "task": (lambda value: _text(value) and value in AUTO_CLASSES, False),
    "vocab": (_whole(1), False),
    "top_k": (_whole(0), False),
    "samples": (_whole(0), False),
    "temperature": (_finite, False),
    "seed": (_whole(-(1 << 63), (1 << 63) - 1), False),
    "examples": (_whole(1), False),
    "dataset": (_text, False),
    "shard_examples": (_whole(1), False),
    "batch_size": (_whole(1), False),
    "held_out_ce": (_finite, True),
    "hidden_size": (_whole(1), True),
    "hidden_dtype": (lambda value: _text(value) and value in DTYPES, True),
    "head": (_text, True),
}


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def not_written(folder: Path, error: Exception) -> GrowError:
    """What to raise where the disk refuses."""
    valid = "a folder with room, which no other call writes to; finished shards are kept, and the same call continues"
    return GrowError(f"caching a teacher in {str(folder)!r}", f"a file cannot be written ({error})", valid)


def check_place(folder: Path) -> None:
    """Raise GrowError where no cache can be written, before any work: it is no folder, or cannot be written to."""
    asked, valid = f"caching a teacher in {str(folder)!r}", "a new folder, or that of an interrupted call"
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise GrowError(asked, "it exists and is no folder", valid)
        with suppress(FileNotFoundError):  # a name may be too long, or below a file
            os.lstat(folder)
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with TemporaryFile(dir=nearest):  # rights alone do not tell: a file system may refuse
            pass
    except (OSError, ValueError) as error:  # such as a name that is too long
        if isinstance(error, GrowError):
            raise
        raise GrowError(asked, f"it cannot be written to ({error})", valid) from error


def check_room(folder: Path, needed: float) -> None:
    """Raise GrowError where a disk has less room than a cache is going to take, which is estimated: within a tenth."""
    free = shutil.disk_usage(folder).free
    if free < 0.9 * needed:
        wrong = f"it takes about {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB of the disk are free"
        valid = "more room, or fewer bytes of a position: a smaller top_k and samples, or hidden states in 16 bits"
        raise GrowError(f"caching a teacher in {str(folder)!r}", wrong, valid)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this lasts, no other call writes to a folder; GrowError for the second. A lock ends with its process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            valid = "another folder, or the same call when the other one has ended"
            raise GrowError(f"caching a teacher in {str(folder)!r}", "another call writes to it now", valid) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path for a file's content, which is renamed when it is whole: no part of it is seen, even after a power cut."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says, whatever writes the content
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if not (isinstance(error, FileNotFoundError) and path.exists()):
            raise not_written(path.parent, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_header(folder: Path, header: Header) -> None:
    """Write header.json."""
    text = json.dumps({**dataclasses.asdict(header), "key": header.key}, indent=1)
    with written(folder / HEADER) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_header(folder: Path) -> Header:
    """Read header.json; raises GrowError where it is not there, damaged, or of another format."""
    asked = f"reading the teacher's cache {str(folder)!r}"
    valid = "a folder that growlib.cache_teacher wrote"
    fields = read_json(asked, folder / HEADER)
    if fields.get("format") != FORMAT:
        wrong = f"{HEADER} is not of format {FORMAT}, the only one that this version of growlib reads"
        raise GrowError(asked, wrong, f"{valid} in this version; write the cache again, into a new folder")
    key = fields.pop("key", None)
    if odd := sorted(fields.keys() ^ FIELDS.keys()):
        raise GrowError(asked, f"{HEADER} is damaged: its fields are others ({short(odd)})", valid)
    for name, (fits, may_lack) in FIELDS.items():
        if not (fits(fields[name]) or (may_lack and fields[name] is None)):
            raise GrowError(asked, f"{HEADER} is damaged: {name} is {short(fields[name])}", valid)
    header = Header(**fields)
    header.record_format  # noqa: B018  raises GrowError for settings that no cache has
    if header.key != key:
        raise GrowError(asked, f"{HEADER} was changed: its own hash does not match", valid)
    return header


class StoredExample(NamedTuple):
    """What a shard holds of an example: see the top of this file; records [n, R]."""

    digest: bytes
    teacher_ce: float
    known: int
    records: np.ndarray


def write_shard(path: Path, key: str, examples: list[StoredExample]) -> None:
    """Write a shard."""
    index: dict[str, np.ndarray] = {
        "digests": np.frombuffer(b"".join(x.digest for x in examples), np.uint8).reshape(-1, DIGEST_BYTES),
        "starts": np.cumsum([0, *(len(x.records) for x in examples)]).astype(np.int64),
        "checksums": np.array([zlib.crc32(x.records.data) for x in examples], np.uint32),
        "teacher_ce": np.array([x.teacher_ce for x in examples], np.float32),
        "known": np.array([x.known for x in examples], np.int32),
    }
    records = np.concatenate([x.records for x in examples])
    with written(path) as temporary:
        # One value: safetensors writes several in an order that changes from call to call.
        metadata = {"cache": f"{key} {path.stem} {_checksum(index)}"}
        save_file({**index, "records": records}, temporary, metadata)


def _checksum(index: dict[str, np.ndarray]) -> str:
    value = 0
    for name in INDEX:
        value = zlib.crc32(np.ascontiguousarray(index[name]).data, value)
    return f"{value:08x}"


class Shard:
    """A shard, memory-mapped; raises GrowError where it is missing, damaged, or of another cache or place."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        asked = f"reading the teacher's cache {str(path.parent)!r}"
        valid = "the same growlib.cache_teacher call again; it writes missing shards (delete a damaged one first)"
        if not path.is_file():
            raise GrowError(asked, f"{path.name} of {header.shards} shards is missing", valid)
        try:
            with safe_open(path, framework="pt") as file:  # torch maps it and, unlike numpy, keeps no descriptor
                key, name, checksum = (file.metadata() or {})["cache"].split(" ")
                arrays = {name: file.get_tensor(name).numpy() for name in (*INDEX, "records")}
        except (OSError, RuntimeError) as error:
            wrong = f"{path.name} cannot be opened ({error})"
            raise GrowError(asked, wrong, "the right to read it, and fewer files open") from error
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise GrowError(asked, f"{path.name} is damaged ({error})", valid) from error
        if (key, name) != (header.key, path.stem):
            raise GrowError(asked, f"{path.name} is of another cache, or another of its shards", valid)
        if not all(x.ndim for x in arrays.values()):
            raise GrowError(asked, f"{path.name} is damaged: a part of it is one number", valid)
        examples, positions = len(arrays["digests"]), len(arrays["records"])
        shapes = dict.fromkeys(INDEX, (examples,)) | {"digests": (examples, DIGEST_BYTES), "starts": (examples + 1,)}
        expected = {name: (INDEX[name], shape) for name, shape in shapes.items()}
        expected["records"] = ("u1", (positions, header.record_format.bytes_per_position))
        if {name: (x.dtype, x.shape) for name, x in arrays.items()} != expected or checksum != _checksum(arrays):
            raise GrowError(asked, f"{path.name} is damaged: its index does not match its checksum", valid)
        starts = arrays["starts"]
        if starts[0] != 0 or starts[-1] != positions or (np.diff(starts) < 0).any() or not examples:
            raise GrowError(asked, f"{path.name} is damaged: its examples do not fill it", valid)
        self.digests, self.starts, self.checksums, self.teacher_ce, self.known = (arrays[name] for name in INDEX)
        self.records = arrays["records"]

    def example(self, number: int) -> np.ndarray:
        """The records of an example, [n, R]; raises GrowError where they are not what was written."""
        records = self.records[self.starts[number] : self.starts[number + 1]]
        if zlib.crc32(records.data) != self.checksums[number]:
            wrong = "its bytes do not match their checksum: the file was damaged after it was written"
            valid = "a whole shard: delete this one, and the same growlib.cache_teacher call writes it again"
            raise GrowError(f"reading example {number} of {self.path}", wrong, valid)
        return records


def weights_hash(model: nn.Module) -> str:
    """Of the class, and of every tensor's name, dtype, shape and bytes; tied tensors once."""
    name = type(model).__name__
    return f"{name} {tensors_hash(name, [*model.named_parameters(), *model.named_buffers()])}"


def tensors_hash(first: str, named: Iterable[tuple[str, Tensor]]) -> str:
    """Of a text, and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(first.encode(), digest_size=16)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its (token, id) pairs."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return hashlib.blake2b(pairs.encode(), digest_size=16).hexdigest()
