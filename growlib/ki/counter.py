"""Random numbers that depend on counters alone: the same whatever the batch, the order or the number of processes."""

import torch
from torch import Tensor


def uniforms(seed: int, keys: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), [N, count] in float64, from keys [N] int64.

    Each is SplitMix64 (Steele, Lea and Flood 2014) of (seed, key, stream, column).
    """
    state = _mix(
        keys.long() + _mix(torch.tensor(seed, device=keys.device)) + _signed(stream * 0x9E3779B97F4A7C15 % (1 << 64))
    )
    columns = torch.arange(1, count + 1, device=keys.device)
    return (_mix(state[:, None] + columns * _signed(0xD1B54A32D192ED03)) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap as unsigned ones do."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(word: int) -> int:
    """The same 64 bits read as int64."""
    return word - (1 << 64) if word >= 1 << 63 else word
