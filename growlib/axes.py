"""The map of one axis, and its algebra.

An axis of size n that grows to N has two matrices: E (N x n) says what the tensors that write the axis put
on it, C (n x N) what the tensors that read it take from it. Growth preserves the function when C E = I.
Both have at most one entry per new index, so a map is an index list and scales, never a dense matrix.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis grows from `old` to `len(source)` entries.

    With `i = source[j]` the new entry j is a copy of the old entry i: `E[j, i] = write`, `C[i, j] = read[j]`,
    and a norm over the axis multiplies its weight by `gain`, so that `write * gain * sum(read) = 1` over the
    copies of i. Where `source[j] = -1` the entry is new: `new_writes` and `new_reads` say what it holds.

    A value is *free* where the other side of the axis is zero. Free values are drawn around the source's mean
    along the axis, `spread` times the source's standard deviation wide. *Faint* ones are drawn around zero: too small
    to be seen by a norm over the axis, large enough to learn from.
    """

    old: int
    source: np.ndarray  # int64 [N]
    read: np.ndarray  # float64 [N]
    write: float = 1.0
    gain: float = 1.0
    tied_gain: float = 1.0  # one more factor on the norm before a head that is tied to the embedding
    new_writes: Literal["zero", "mean", "free", "faint"] = "free"
    new_reads: Literal["zero", "free"] = "zero"
    new_shift: Literal["zero", "mean"] = "zero"  # what a norm's bias holds on new entries
    new_scale: Literal["free", "zero"] = "free"  # what a norm's weight holds on new entries
    spread: float = 1.0
    copy_noise: float = 0.5  # noise on the readers of an entry's m copies, in standard deviations / m; it cancels
    write_noise: float = 0.0  # noise on what the copies after the first write, in standard deviations; it does not
    from_next: bool = False  # the copies after the first write what the next layer writes
    blocks: bool = False  # copy k is read by copy k of an axis with as many copies, and by no other
    inexact: str = ""  # why this map cannot preserve the function; empty where it does

    @property
    def new(self) -> int:
        return len(self.source)

    @property
    def is_identity(self) -> bool:
        return self.new == self.old and self.write == 1.0 and bool((self.source == np.arange(self.old)).all())

    def copies(self) -> np.ndarray:
        """How often each old entry stands in the new axis: int64 [n]."""
        return np.bincount(self.source[self.source >= 0], minlength=self.old)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisMap) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, object]:
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class LayerMap:
    """Which source layer each target layer copies, and which target layers start as the identity."""

    old: int
    source: tuple[int, ...]
    identity: tuple[bool, ...]
    inexact: str = ""
    share: tuple[float, ...] = ()  # of the layer after `source` in each target layer; empty: none
    noise: float = 0.0  # on the copies of a layer after its first, in standard deviations of each tensor


def tile(old: int, new: int) -> np.ndarray:
    """Old indices over and over, [0 .. old-1, 0 .. old-1, ...], cut at `new`."""
    return np.arange(new) % old


def split_evenly(old: int, source: np.ndarray) -> np.ndarray:
    """Reader weights that give each of the m copies of an entry 1/m."""
    copies = np.bincount(source[source >= 0], minlength=old)
    return np.where(source >= 0, 1.0 / np.maximum(copies, 1)[source], 0.0)


def copy_numbers(source: np.ndarray) -> np.ndarray:
    """How many copies of the same old entry stand before each entry: int64 [N], 0 on new entries."""
    order = np.argsort(source, kind="stable")
    numbers = np.empty(len(source), dtype=np.int64)
    numbers[order] = np.arange(len(source)) - np.searchsorted(source[order], source[order])
    return np.where(source >= 0, numbers, 0)


def own_blocks(axes: Sequence[tuple[str, str]], maps: Mapping[str, AxisMap]) -> Iterator[tuple[int, int, int]]:
    """For the (axis, side) of a tensor's dimensions: which write and which read copies of their own, and how many."""
    for d, (written, side) in enumerate(axes):
        for e, (read, other) in enumerate(axes):
            if (side, other) == ("write", "read") and written in maps and read in maps:
                copies = maps[written].copies().max()
                if maps[written].blocks and maps[read].blocks and maps[read].copies().max() == copies > 1:
                    yield d, e, int(copies)


def repeated(old: int, source: tuple[int, ...], noise: float = 0.0) -> LayerMap:
    """Layers that all act, some more than once."""
    changed = source != tuple(range(old))
    inexact = f"{old} -> {len(source)} layers: a copied layer acts again" if changed else ""
    return LayerMap(old, source, (False,) * len(source), inexact, noise=noise)


def after_each(old: int, extra: Sequence[int]) -> LayerMap:
    """Each layer l followed by `extra[l]` copies of it that start as the identity."""
    source = tuple(layer for layer in range(old) for _ in range(1 + extra[layer]))
    return LayerMap(old, source, tuple(t > 0 and source[t] == source[t - 1] for t in range(len(source))))


def shuffled_copies(old: int, new: int, rng: np.random.Generator) -> np.ndarray:
    """Old indices in their place, then in random orders, each whole before the next begins: int64 [N]."""
    rounds = [np.arange(old), *(rng.permutation(old) for _ in range(new // old))]
    return np.concatenate(rounds)[:new]


def chance(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one axis, or of all axes of one size: the same for a seed and a name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
