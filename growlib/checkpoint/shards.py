"""Safetensors files, written tensor by tensor as they are made. What is finished of an interrupted call is kept."""

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from growlib.checkpoint.conversions import DTYPES
from growlib.errors import GrowError
from growlib.folders import INDEX, SINGLE

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
AHEAD = 1 << 29  # bytes that may wait to be written
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Group = tuple[str, ...]  # tensors that are made together


def bytes_in(size: int | str) -> int:
    """A number of bytes, or a text such as "5GB". Raises GrowError for what is none."""
    text = str(size).upper().replace(" ", "")
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    number = text.removesuffix(unit)
    if not number.replace(".", "", 1).isdecimal() or float(number) <= 0 or (not unit and "." in number):
        raise GrowError(f"max_shard_size={size!r}", "it is no size", 'a number of bytes, or such as "5GB"')
    return int(float(number) * UNITS.get(unit, 1))


@dataclass(frozen=True)
class Shard:
    """One file and what stands in it, in order."""

    file: str
    tensors: Mapping[str, Tensor]  # on the meta device

    @property
    def size(self) -> int:
        return sum(bytes_of(tensor) for tensor in self.tensors.values())

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The head of the file, and where each tensor begins; the widest numbers first, so that all are aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, at = {}, 0
        for name, tensor in sorted(self.tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            starts[name] = at
            ends = [at, at := at + bytes_of(tensor)]
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + start for name, start in starts.items()}


def bytes_of(tensor: Tensor) -> int:
    return tensor.dtype.itemsize * prod(tensor.shape)


def shards_of(tensors: Mapping[str, Tensor], largest: int) -> list[Shard]:
    """Tensors in their order, each file as full as `largest` bytes allow; a larger tensor has a file of its own."""
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + bytes_of(tensor) > largest:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += bytes_of(tensor)
    if len(files) == 1:
        return [Shard(SINGLE, files[0])]
    return [Shard(f"model-{n:05}-of-{len(files):05}.safetensors", held) for n, held in enumerate(files, 1)]


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several files; one needs none."""
    if len(shards) > 1:
        places = {name: shard.file for shard in shards for name in shard.tensors}
        total = {"total_size": sum(shard.size for shard in shards)}
        text = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    groups: Sequence[Group],
    make: Callable[[Group], Mapping[str, Tensor]],
    *,
    threads: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the files that are not there yet. A file has its name only when it is whole.

    Args:
        groups: each tensor in one of them, in the order of the shards.
        make: makes the tensors of one group; called in `threads` threads, for the next groups while one is written.
        progress: is told the number of bytes that were written.
    """
    left = [shard for shard in shards if not (folder / shard.file).exists()]
    progress(sum(shard.size for shard in shards) - sum(shard.size for shard in left))
    wanted = {name for shard in left for name in shard.tensors}
    sizes = {name: bytes_of(tensor) for shard in left for name, tensor in shard.tensors.items()}
    needed = [group for group in groups if wanted & set(group)]
    with ThreadPoolExecutor(threads) as pool:
        made = _made(pool, needed, make, sizes, threads)
        try:
            held: dict[str, Tensor] = {}
            for shard in left:
                head, starts = shard.header()
                with open(folder / f"{shard.file}.part", "wb", buffering=0) as file:
                    _write(file.fileno(), head, 0)
                    for name in shard.tensors:
                        while name not in held:
                            held |= {n: tensor for n, tensor in next(made).items() if n in wanted}
                        _write(file.fileno(), _bytes(held.pop(name)), starts[name])
                        progress(sizes[name])
                os.rename(folder / f"{shard.file}.part", folder / shard.file)
        finally:
            made.close()


def _made(
    pool: ThreadPoolExecutor,
    groups: Sequence[Group],
    make: Callable[[Group], Mapping[str, Tensor]],
    sizes: Mapping[str, int],
    threads: int,
) -> Generator[Mapping[str, Tensor]]:
    """The tensors of each group in turn; the next ones are made meanwhile, as many as threads and memory allow."""
    waiting: list[tuple[Future[Mapping[str, Tensor]], int]] = []
    following = iter(groups)
    group = next(following, None)
    try:
        while waiting or group is not None:
            while group is not None:
                size = sum(sizes.get(name, 0) for name in group)
                if waiting and (len(waiting) > threads or size + sum(other for _, other in waiting) > AHEAD):
                    break
                waiting.append((pool.submit(make, group), size))
                group = next(following, None)
            yield waiting.pop(0)[0].result()
    finally:
        for future, _ in waiting:
            future.cancel()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: int, content: bytes | memoryview, start: int) -> None:
    view, done = memoryview(content), 0
    while done < len(view):
        done += os.pwrite(file, view[done : done + (1 << 26)], start + done)
