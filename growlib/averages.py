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


def mean_along(values: Tensor, dim: int) -> Tensor:
    """The mean along one dimension, which stays with a length of 1, in the dtype of the values."""
    total = np.add.reduce(values.detach().to("cpu", torch.float64).numpy(), axis=dim, keepdims=True)
    return torch.from_numpy(total / values.shape[dim]).to(values)
