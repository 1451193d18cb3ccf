"""drop-upcycling: experts that are copies of a dense layer, a share r of whose units starts anew in each of them.

    S_e subset of {1 .. f}, |S_e| = r f, drawn for each expert;  the weights of the units in S_e ~ N(mean, std of those
    weights), in the gate, the up and the down projection

Width and depth grow as under `lossless`. Not exact: that is the point, experts of a copy are slow to differ.
Source: Drop-Upcycling (Nakamura et al., ICLR 2025, arXiv 2502.19261), r = 0.5.
"""

import numpy as np
import torch
from torch import Tensor

from growlib.free_values import FreeValues
from growlib.papers import Paper

PAPER = Paper(
    "Drop-Upcycling",
    "Nakamura et al.",
    "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization",
    "ICLR",
    2025,
    "2502.19261",
)

RATIO = 0.5


def resets(experts: int, units: int, seed: int, name: str, ratio: float = RATIO) -> Tensor:
    """Which units of each expert start anew: bool [experts, units], `ratio` of each row."""
    words = FreeValues(seed, name).words(np.arange(experts), 0, units)
    ranks = words.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return torch.from_numpy(ranks < round(ratio * units))
