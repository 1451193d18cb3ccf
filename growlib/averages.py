"""Means and deviations of large tensors: in float64, in a fixed order, so that no number of threads changes a bit."""

from math import sqrt

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # values at once, 512 KB in float64
SEEN = 1 << 20  # values that a deviation is made of, at most: it is right to 0.1 %


def deviation(values: Tensor) -> float:
    """The standard deviation of all values, or of `SEEN` that lie evenly in a large tensor; 0.0 where all are equal."""
    chunks = values.detach().reshape(-1).split(CHUNK)
    found = _deviation(chunks[:: -(-len(chunks) * CHUNK // SEEN)])
    return found or _deviation(chunks)


def _deviation(chunks: tuple[Tensor, ...]) -> float:
    if not len(chunks[0]):
        return 0.0
    first, count, total, squares = chunks[0][0].item(), 0, 0.0, 0.0
    for chunk in chunks:
        away = (chunk.to("cpu", torch.float64) - first).numpy()
        count += len(away)
        total += float(np.add.reduce(away))
        squares += float(np.add.reduce(np.square(away, out=away)))
    return sqrt(max(squares / count - (total / count) ** 2, 0.0))


def mean_along(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The mean along one dimension, which stays with a length of 1, in a dtype; by default that of the values."""
    values = values.detach()
    rows = max(CHUNK // max(values[0].numel(), 1), 1) if dim == 0 and len(values) else max(len(values), 1)
    total = sum(_sum_along(chunk, dim) for chunk in values.split(rows)) if dim == 0 else _sum_along(values, dim)
    mean = torch.from_numpy(total / values.shape[dim])
    return mean.to(device=values.device, dtype=dtype or values.dtype)


def _sum_along(values: Tensor, dim: int) -> np.ndarray:
    wide = values.to("cpu", torch.promote_types(values.dtype, torch.float32))
    return np.add.reduce(wide.numpy(), axis=dim, dtype=np.float64, keepdims=True)
