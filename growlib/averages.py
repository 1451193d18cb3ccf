"""Means and deviations of large tensors: in float64, in a fixed order, so that no number of threads changes a bit."""

from math import sqrt

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # values at once, 512 KB in float64


def deviation(values: Tensor) -> float:
    """The standard deviation of all values; 0.0 exactly where they are all the same."""
    flat = values.detach().reshape(-1)
    if not flat.numel():
        return 0.0
    first, total, squares = flat[0].item(), 0.0, 0.0
    for chunk in flat.split(CHUNK):
        away = (chunk.to("cpu", torch.float64) - first).numpy()
        total += float(np.add.reduce(away))
        squares += float(np.add.reduce(np.square(away, out=away)))
    count = flat.numel()
    return sqrt(max(squares / count - (total / count) ** 2, 0.0))


def mean_along(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The mean along one dimension, which stays with a length of 1, in a dtype; by default that of the values."""
    values = values.detach()
    width = values[0].numel() if dim == 0 and len(values) else 0
    rows = max(CHUNK // width, 1) if width > 1 else len(values)  # a single column is added pairwise: not in pieces
    first, *chunks = values.to("cpu").split(rows) if dim == 0 else (values.to("cpu"),)
    total = np.add.reduce(first.double().numpy(), axis=dim, keepdims=True)
    for chunk in chunks:  # the sum so far is the first that is added
        total = np.add.reduce(np.concatenate([total, chunk.double().numpy()]), axis=dim, keepdims=True)
    mean = torch.from_numpy(total / values.shape[dim])
    return mean.to(device=values.device, dtype=dtype or values.dtype)
