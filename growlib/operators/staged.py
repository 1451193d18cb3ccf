"""staged: copies side by side that do not see each other, a block diagonal.

    W' = [[W, 0], [0, W]],    b' = [b, b],    embeddings and norms [x, x],    the norm before a tied head / 2

Any whole number of copies instead of 2. A tensor whose two sides have different numbers of copies (a head, or an FFN
that grows alone) reads each copy with weight 1/m, which computes the same.

New layers: identity blocks between the old ones. The paper zeroes their norms; growlib their output projections, since
a gated FFN under a zero norm has no gradient.

Source: Staged Training (Shen et al., ICML 2022, arXiv 2203.06211).
"""

from dataclasses import replace

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap
from growlib.operators import copies, hypercloning
from growlib.papers import Paper

PAPER = Paper(
    "Staged Training", "Shen et al.", "Staged Training for Transformer Language Models", "ICML", 2022, "2203.06211"
)

depth = copies.depth


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Whole multiples only; head_dim takes the map of `copies`."""
    axis_map = copies.width(name, axis, old, new, seed)
    if axis.role not in hypercloning.CLONED:
        return axis_map
    hypercloning.whole_copies("staged", axis, axis_map)
    return replace(axis_map, blocks=True, copy_noise=0.0)
