"""From a checkpoint on disk to a larger one on disk, tensor by tensor: no model is in memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from growlib import upcycling
from growlib.apply import grow_tensor
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.companions import copy_companions
from growlib.checkpoint.conversions import Stored, Unstreamable, Written, stored_in
from growlib.checkpoint.loading import dtype_of, logger
from growlib.checkpoint.model_card import CARD, model_card
from growlib.checkpoint.shards import Shard, bytes_in, shards_of, write_index, write_shards
from growlib.config import Target
from growlib.costs import bytes_of
from growlib.errors import GrowError
from growlib.folders import REQUEST, folder_of, new_folder
from growlib.growth import expand, settled
from growlib.growth_plan import GrowthPlan
from growlib.operators import Method
from growlib.recycling import Recycled

LARGEST = "5GB"  # of one file
THREADS = 4  # that make tensors, at most
VERSION = 2  # of what is written: another one does not go on with an older one's files

Check = Callable[[Path], str]  # of a finished folder, before it gets its name: what it measured
Progress = Callable[[int, int], object]  # is told how many bytes are written, and of how many


def expand_checkpoint(
    src: str | Path,
    dst: str | Path,
    target_config: Target | GrowthPlan,
    method: str | Method = "lossless",
    *,
    seed: int = 0,
    exact: bool | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = LARGEST,
) -> GrowthPlan:
    """Grow a checkpoint on disk into a larger one on disk, without a model in memory.

    `from_pretrained(dst)` gives what `expand(src, ...)` gives, bit for bit. The source's files are mapped into memory
    and read as they are needed, tensors are made one at a time; beyond that it takes the memory of a few tensors, and
    no more than of two files. Beside the weights `dst` gets the config, all companion files of the source (tokenizer,
    processor), a model card and the plan (`growlib.json`).

    `dst` appears as a whole or not at all. After an interruption the same call goes on at the file where it was.

    Args:
        src: a folder or a hub id.
        dst: a folder that does not exist.
        target_config, method, seed, exact, dtype: as for `expand`.
        max_shard_size: of a file, in bytes or such as "5GB".

    Returns:
        The plan that was carried out.

    Raises:
        GrowError: as `expand`; where something stands at `dst`; and where the disk has no room, before anything is
            written where that can be known.
    """
    return write_grown(src, dst, target_config, method, seed, exact, dtype, max_shard_size)


def write_grown(
    src: str | Path,
    dst: str | Path,
    target_config: Target | GrowthPlan,
    method: str | Method = "lossless",
    seed: int = 0,
    exact: bool | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = LARGEST,
    check: Check | None = None,
    progress: Progress = lambda done, total: None,
) -> GrowthPlan:
    """The same, with a check before the folder gets its name, and with a progress bar."""
    largest, wanted = bytes_in(max_shard_size), dtype_of(dtype)
    folder = folder_of(src)
    growth = settled(*checkpoint.describe(folder), target_config, method, seed, exact)
    wanted = wanted or dtype_of(growth.dtype)
    try:
        job: _Job | None = _job(f"reading the checkpoint {str(src)!r}", folder, growth, wanted, largest)
    except Unstreamable as reason:
        logger.warning("%s goes through a model in memory: %s", src, reason)
        job = None

    def write(new: Path) -> None:
        _remove_unfinished(new, {shard.file for shard in job.shards} if job else set())
        if job:
            _write(new, job, Grown(growth, job.source, bool(exact)), progress)
        else:
            grown = expand(folder, growth, growth.method, seed=growth.seed, exact=exact or False, dtype=wanted)
            grown.save_pretrained(new, max_shard_size=largest)

    room = sum(shard.size for shard in job.shards) if job else bytes_of(growth, wanted)
    write_folder(src, dst, growth, write, check, room, _request(folder, growth, job))
    return growth


def write_folder(
    src: str | Path,
    dst: str | Path,
    growth: GrowthPlan,
    write: Callable[[Path], None],
    check: Check | None = None,
    room: int = 0,
    request: str = "",
) -> None:
    """The folder of a grown checkpoint, as a whole or not at all: its weights, and all that stands beside them.

    Args:
        write: writes the weights and the config.
        room, request: as for `new_folder`.
    """
    folder = folder_of(src)
    with new_folder(dst, room, request) as new:
        write(new)
        growth.save(new)
        copy_companions(folder, new, {growth.old_sizes["hidden"]: growth.new_sizes["hidden"]})
        measured = check(new) if check else ""
        (new / CARD).write_text(model_card(src, folder, growth, measured), encoding="utf-8")


@dataclass(frozen=True)
class _Job:
    """What is read, what is written, and in which files."""

    source: Stored
    target: Written
    shards: Sequence[Shard]


def _job(asked: str, folder: Path, growth: GrowthPlan, dtype: torch.dtype | None, largest: int) -> _Job:
    """Raises GrowError for a broken checkpoint, Unstreamable for one that only a model in memory can read."""
    stored = stored_in(asked, folder)
    source, config = stored.model, stored.model.config
    grown_class = checkpoint.class_like(type(source), config.model_type, growth.config)
    with torch.device("meta"):
        grown = checkpoint.empty_model(source, growth.config, dtype or source.dtype, grown_class)
    target = Written(grown)
    tensors = {name: tensor for group in target.groups for name, tensor in group.stored.items()}
    return _Job(stored, target, shards_of(tensors, largest))


def _request(folder: Path, growth: GrowthPlan, job: _Job | None) -> str:
    """What tells one job from another; empty for one that begins anew after an interruption."""
    if job is None:
        return ""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors"))
    shards = {shard.file: [(n, str(t.dtype), *t.shape) for n, t in shard.tensors.items()] for shard in job.shards}
    asked = json.dumps([VERSION, str(folder.resolve()), files, growth.to_dict(), shards])
    return hashlib.sha256(asked.encode()).hexdigest()


def _remove_unfinished(folder: Path, finished: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished | {REQUEST}:
            path.unlink()


def _write(folder: Path, job: _Job, grown: Mapping[str, Tensor], progress: Progress) -> None:
    target, groups = job.target, {tuple(group.stored): group for group in job.target.groups}

    def make(names: tuple[str, ...]) -> Mapping[str, Tensor]:
        parameters = {name: grown[target.source_of(name)].to(target.dtypes[name]) for name in groups[names].names}
        return target.stored(parameters)

    total, done = sum(shard.size for shard in job.shards), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    threads = min(os.cpu_count() or 1, THREADS)
    write_shards(folder, job.shards, list(groups), make, threads=threads, progress=tell)
    write_index(folder, job.shards)
    target.write_config(folder)


class Grown(Mapping[str, Tensor]):
    """The tensors of the grown model. Each is made when it is asked for."""

    def __init__(self, growth: GrowthPlan, tensors: Mapping[str, Tensor], finite: bool) -> None:
        self._growth, self._tensors, self._finite, self._memory = growth, tensors, finite, Recycled()
        self._made = {made.name: made for made in growth.tensors}
        self._experts = {made.name: made for made in growth.mixture.tensors} if growth.mixture else {}

    def __getitem__(self, name: str) -> Tensor:
        if self._growth.mixture and name in self._experts:
            like = self._read(self._growth.tensors[0].source).new_empty(0)
            return upcycling.mixed(self._growth.mixture, self._experts[name], self, like)
        made = self._made[name]
        source = self._read(made.source) if made.source else torch.zeros(made.old_shape)
        following, weigher = (self._read(name) if name else None for name in (made.following, made.weigher))
        return grow_tensor(made, source, self._growth, following, weigher, self._memory.empty)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made | self._experts)

    def __len__(self) -> int:
        return len(self._made | self._experts)

    def _read(self, name: str | None) -> Tensor:
        tensor = self._tensors[str(name)]
        if self._finite and not all(part.isfinite().all() for part in tensor.reshape(-1).split(1 << 20)):
            wrong = f"its {name} holds values that are not finite"
            raise GrowError(f"growing a {self._growth.model_class} with exact=True", wrong, "a source of finite values")
        return tensor
