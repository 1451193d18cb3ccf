"""The map of one axis, and its algebra.

An axis of size n that grows to N has two matrices: E (N x n) says what the tensors that write the axis put
on it, C (n x N) what the tensors that read it take from it. Growth preserves the function when C E = I.
Both have at most one entry per new index, so a map is an index list and scales, never a dense matrix.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Side = Literal["read", "write", "scale", "shift"]  # a map's inputs, its outputs, a norm's weight, a norm's bias
Fill = Literal["zero", "mean", "free", "faint"]


class Filling(NamedTuple):
    """What a new entry holds: whether it is drawn from the seed, and its sign in the table of a plan."""

    drawn: bool
    sign: str


FILLINGS: dict[Fill, Filling] = {
    "zero": Filling(False, "·"),
    "mean": Filling(False, "▒"),  # of the old entries along the axis
    "free": Filling(True, "░"),  # around that mean, as wide as the source's values
    "faint": Filling(True, "░"),  # around zero: too small to be seen by a norm, large enough to learn from
}


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis grows from `old` to `len(source)` entries.

    With `i = source[j]` the new entry j is a copy of the old entry i: `E[j, i] = write`, `C[i, j] = read[j]`,
    and a norm over the axis multiplies its weight by `gain`, so that `write * gain * sum(read) = 1` over the
    copies of i. Where `source[j] = -1` the entry is new: `read[j]` is 0, and `new_writes`, `new_reads`, `new_scale` and
    `new_shift` say what its writers, its readers, and the weight and the bias of a norm hold (see `FILLINGS`).
    Values are drawn `spread` times the source's standard deviation wide.
    """

    old: int
    source: np.ndarray  # int64 [N]
    read: np.ndarray  # float64 [N]
    write: float = 1.0
    gain: float = 1.0
    tied_gain: float = 1.0  # one more factor on the norm before a head that is tied to the embedding
    new_writes: Fill = "free"
    new_reads: Fill = "zero"
    new_scale: Fill = "mean"
    new_gain: float = 1.0  # one more factor on a norm's weight on new entries, which no old entry sees
    new_shift: Fill = "zero"
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
        same = self.new == self.old and bool((self.source == np.arange(self.old)).all())
        return same and self.write == self.gain == 1.0 and bool((self.read == 1.0).all())

    def fill(self, side: Side) -> Fill:
        """What a new entry holds on one side of a tensor."""
        return {"read": self.new_reads, "write": self.new_writes, "scale": self.new_scale, "shift": self.new_shift}[
            side
        ]

    def copies(self) -> np.ndarray:
        """How often each old entry stands in the new axis: int64 [n]."""
        return np.bincount(self.source[self.source >= 0], minlength=self.old)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisMap) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The map as plain data; `from_dict` is the inverse."""
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AxisMap":
        arrays = {"source": np.array(data["source"], np.int64), "read": np.array(data["read"], np.float64)}
        return cls(**{**data, **arrays})


@dataclass(frozen=True)
class LayerMap:
    """Which source layer each target layer copies, and which target layers start as the identity."""

    old: int
    source: tuple[int, ...]
    identity: tuple[bool, ...]
    inexact: str = ""
    share: tuple[float, ...] = ()  # of the layer after `source` in each target layer; empty: none
    noise: float = 0.0  # on the copies of a layer after its first, in standard deviations of each tensor

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerMap":
        """The map from plain data, such as `dataclasses.asdict` gives."""
        lists = {key: tuple(data[key]) for key in ("source", "identity", "share")}
        return cls(**{**data, **lists})


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
