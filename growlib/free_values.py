"""Free values from counters: a value depends on the seed, a name, and its row and column alone.

    word(row, w) = mix(w, key(seed, name, row)),   32 bits, of which each half is one of 65,536 quantiles of the normal

So any block of a tensor can be drawn by itself, and no order, number of threads or cut changes a bit. The arithmetic
is on 32-bit integers, seven passes for two values over a buffer that stays in the cache; a table does the rest, in the
precision that is asked for. The quantiles' variance is 1, their kurtosis 2.999, the largest 4.32.

Source: the mixer is Chris Wellons' "lowbias32" (nullprogram.com, 2018), keyed between its rounds; the rows' keys are
SplitMix64's (Steele et al., OOPSLA 2014).
"""

import hashlib
from functools import cache, lru_cache

import numpy as np
import torch

BITS = 16  # of one value
TILE = 1 << 16  # words of a buffer: 256 KB
KEPT = 1 << 15  # premixed words that are kept; those beyond are made anew
_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


class FreeValues:
    """The free values of one name under one seed: endless rows of endless columns."""

    def __init__(self, seed: int, name: str) -> None:
        self._start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")

    def words(self, rows: np.ndarray, first: int, last: int) -> np.ndarray:
        """Random words of some rows, columns `first` to `last`: uint32 [R, last - first]. Not for large blocks."""
        made = np.empty((len(rows), last - first), "<u4")
        _mix(_premixed(first, last), *self._keys(rows), made, np.empty_like(made))
        return made

    def normals(self, rows: np.ndarray, first: int, last: int, table: np.ndarray | None = None) -> np.ndarray:
        """Normal values of some rows, columns `first` to `last`: [R, last - first], float32.

        Args:
            rows: int64 [R], in any order.
            table: what stands for each of the 65,536 quantiles, such as `scaled(0.02)`; the result has its dtype.
        """
        table = quantiles() if table is None else table
        out = np.empty((len(rows), last - first), table.dtype)
        low, high = first // 2, -(-last // 2)  # two values to a word
        across = min(max(high - low, 1), TILE)
        down = max(TILE // across, 1)
        mixed, spare = (np.empty(down * across, "<u4") for _ in range(2))
        keys = self._keys(rows)
        for start in range(low, high, across):
            stop = min(start + across, high)
            premixed, width = _premixed(start, stop), stop - start
            begin, end = max(2 * start, first), min(2 * stop, last)
            for top in range(0, len(rows), down):
                key, odd = (part[top : top + down] for part in keys)
                made, rest = (buffer[: len(key) * width].reshape(len(key), width) for buffer in (mixed, spare))
                _mix(premixed, key, odd, made, rest)
                picked = made.view("<u2")[:, begin - 2 * start : end - 2 * start]
                into = out[top : top + down, begin - first : end - first]
                np.take(table, picked, out=into, mode="clip")  # no index is beyond; "raise" would copy
        return out

    def _keys(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two words for each row, the second odd: uint32 [R, 1]."""
        state = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self._start)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
        return state.astype(np.uint32)[:, None], (state >> np.uint64(32)).astype(np.uint32)[:, None] | np.uint32(1)


def _mix(premixed: np.ndarray, key: np.ndarray, odd: np.ndarray, made: np.ndarray, rest: np.ndarray) -> None:
    """One word for each row and premixed word, into `made`; `rest` is a buffer of the same shape."""
    np.bitwise_xor(premixed, key, out=made)
    np.multiply(made, odd, out=made)
    np.right_shift(made, np.uint32(15), out=rest)
    np.bitwise_xor(made, rest, out=made)
    np.multiply(made, _SECOND, out=made)
    np.right_shift(made, np.uint32(16), out=rest)
    np.bitwise_xor(made, rest, out=made)


def _premixed(first: int, last: int) -> np.ndarray:
    """The words `first` to `last` through the mixer once, without a key: uint32 [last - first]."""
    return _kept()[first:last] if last <= KEPT else _once(np.arange(first, last, dtype=np.uint32))


@cache
def _kept() -> np.ndarray:
    return _once(np.arange(KEPT, dtype=np.uint32))


def _once(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint32(16))) * _FIRST
    words = (words ^ (words >> np.uint32(15))) * _SECOND
    return words ^ (words >> np.uint32(16))


@cache
def quantiles() -> np.ndarray:
    """The middles of 65,536 equally likely pieces of the normal, scaled to a variance of 1: float32, ascending."""
    lower = torch.special.ndtri((torch.arange(1 << (BITS - 1), dtype=torch.float64) + 0.5) / (1 << BITS)).numpy()
    both = np.concatenate([lower, -lower[::-1]])
    return (both / np.sqrt((both**2).mean())).astype(np.float32)


@lru_cache(16)
def scaled(width: float, dtype: torch.dtype) -> np.ndarray:
    """The quantiles of a normal that is `width` wide, in a dtype."""
    return (torch.from_numpy(quantiles()).to(dtype) * width).numpy()


def normal(seed: int, name: str, rows: int, columns: int) -> torch.Tensor:
    """The first rows and columns of a name's normal values: float32 [rows, columns]."""
    return torch.from_numpy(FreeValues(seed, name).normals(np.arange(rows), 0, columns))
