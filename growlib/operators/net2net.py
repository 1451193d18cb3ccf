"""net2net: Net2WiderNet, random copies of units whose readers share them.

    g(j) = j for j < n, else a random old unit;    c_j = how many j' have g(j') = g(j)
    U'_j = U_g(j) (rows that write the axis),      V'_j = V_g(j) / c_j (columns that read it)

The paper has no norm over a widened axis and no attention. growlib's nearest: heads are copied whole, in random order
within the group rules; what a norm or a dot product stands on (hidden, head_dim) takes the map of `copies`: the
function stays, which is the paper's aim. Deeper: identity blocks, as Net2DeeperNet's need an idempotent activation.

Source: Chen, Goodfellow, Shlens 2015 (arXiv 1511.05641).
"""

from dataclasses import replace

import numpy as np

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap, chance, shuffled_copies, split_evenly
from growlib.operators import copies
from growlib.papers import Paper

PAPER = Paper(
    "Net2Net", "Chen et al.", "Net2Net: Accelerating Learning via Knowledge Transfer", "ICLR", 2016, "1511.05641"
)

depth = copies.depth


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int, *, noise: float = 0.0) -> AxisMap:
    """`noise`: the paper's, on what the later copies write, in standard deviations of the tensor; not exact."""
    n, N = old[name], new[name]
    match axis.role:
        case "elementwise" | "linear":
            drawn = chance(seed, axis.size).integers(n, size=N - n)
            source = np.concatenate([np.arange(n), drawn])
            axis_map = AxisMap(n, source, split_evenly(n, source))
        case "key_heads" | "query_heads":
            axis_map = whole_heads(name, axis, old, new, seed)
        case _:
            axis_map = copies.width(name, axis, old, new, seed)
    if noise and axis.role == "elementwise" and n < N:
        axis_map = replace(axis_map, write_noise=noise, inexact=f"{axis.size} {n} -> {N}: noise on the copied units")
    return replace(axis_map, copy_noise=0.0)


def whole_heads(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Copies of KV heads, or of heads without groups, in random order; query heads follow their KV head."""
    chosen = axis.groups or name
    groups = shuffled_copies(old[chosen], new[chosen], chance(seed, chosen))
    if axis.role == "key_heads":
        return AxisMap(old[name], groups, split_evenly(old[name], groups))
    return copies.query_heads(name, axis, old, new, groups)
