"""lemon: lossless expansion with unequal splits among the readers of copies.

    residual stream  [x, .., x, mean(x)_r] under LayerNorm, [x, .., x, 0_r] under RMSNorm (q copies, r entries over)
    norm weight      sqrt(q n / N) g, bias 0 and any weight on the rest
    units, heads     circular: [h, .., h, h_1 .. h_r]
    readers of k copies, sum W_i = W:   "comp"        [W - sum C_i, C_2 .. C_k], C random and small
                                        "projection"  W_i = R_i - (sum R - W) / k, R random
    new layers       identity blocks, behind each of the last L' - L layers

Instead of rescaling the norm's eps by q n / N, growlib divides what is written by sqrt(q n / N): the same function.
The paper's code draws R and C with the large model's initialisation; here they have the reader's own deviation, times
`noise / k`. Its new layers mix their neighbours' weights under the zeroed writers; here they copy the layer before.

Source: LEMON (Wang et al., ICLR 2024, arXiv 2310.07999).
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap, LayerMap, after_each, copy_numbers
from growlib.operators import copies


def width(
    name: str,
    axis: Axis,
    old: Sizes,
    new: Sizes,
    seed: int,
    *,
    split: Literal["comp", "projection"] = "comp",
    noise: float = 0.3,
) -> AxisMap:
    """ "comp" is the paper's for BERT, "projection" for vision; `noise` in shares of the reader's deviation / k."""
    axis_map = replace(copies.width(name, axis, old, new, seed), copy_noise=noise)
    if split == "projection":
        return axis_map
    counts = axis_map.copies()[axis_map.source.clip(0)]
    first = (copy_numbers(axis_map.source) == 0) & (axis_map.source >= 0)
    return replace(axis_map, read=np.where(first, axis_map.read * counts, np.where(counts > 1, 0.0, axis_map.read)))


def depth(old: int, new: int) -> LayerMap:
    """The first layers stay single, the last ones get the new blocks; above 2 L every layer has its share."""
    each, rest = divmod(new - old, old)
    return after_each(old, [each + (layer >= old - rest) for layer in range(old)])
