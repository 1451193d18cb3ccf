"""sparkling: copies, with readers scaled so that the RMS of what they compute stays.

    new rows (fan-out)  copies, not scaled;    norm weights  copies, not scaled
    new columns (fan-in, n -> N, both sides copied)
        all weights x sqrt(n / (3 N - 2 n)) for N <= 2 n,    x n / N beyond;    at N = 2 n both are 1/2

A term and its copy add up to twice the term, four times its variance: the first formula keeps the variance of a sum of
n - r single and r doubled terms, r = N - n. Where copies are whole this is the function-preserving 1/m. The other half
of the method, the reset of the new entries' optimizer state and their own learning rate, belongs to the training
afterwards (see the card). Heads, which the paper does not grow, take the same scale; head_dim and vocabulary the
map of `copies`.

Source: SPARKLING (ICML 2026, arXiv 2602.02472).
"""

from dataclasses import replace

import numpy as np

from growlib.architectures.schema import RESIDUAL, Axis, Sizes
from growlib.maps import AxisMap, tile
from growlib.operators import copies
from growlib.papers import Paper

PAPER = Paper("SPARKLING", "", "SPARKLING", "ICML", 2026, "2602.02472")


def scale(n: int, N: int) -> float:
    """What multiplies every reader of an axis that grows from n to N."""
    return (n / (3 * N - 2 * n)) ** 0.5 if 2 * n >= N else n / N


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Exact at whole multiples; between them only the RMS stays."""
    n, N = old[name], new[name]
    if axis.role in RESIDUAL:
        axis_map = AxisMap(n, tile(n, N), np.ones(N), tied_gain=scale(n, N) if axis.role != "unscaled" else 1.0)
    elif axis.role in ("elementwise", "query_heads"):
        axis_map = copies.width(name, axis, old, new, seed)
    else:
        return copies.width(name, axis, old, new, seed)
    read = np.full(N, scale(n, N))
    whole = np.allclose(np.bincount(axis_map.source, weights=read, minlength=n), 1.0)
    wrong = f"{axis.size} {n} -> {N} is not a whole multiple: one scale for all readers keeps their RMS alone"
    return replace(axis_map, read=read, copy_noise=0.0, inexact=axis_map.inexact or ("" if whole else wrong))
