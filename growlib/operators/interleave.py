"""interleave: each layer followed by its copies, [1, 1, 2, 2, ...] (interposition).

    W'_t = W_(floor(t L / L')) + e,    e ~ N(0, (noise std(W))^2) on every copy but a layer's first

Source: Wang et al. (ICML 2026, arXiv 2510.08008), where it beats stacking on converged checkpoints; earlier Chang et
al. (ICLR 2018, arXiv 1710.10348). It is also where LiGO's code starts its depth factors ("interlace", with noise).
"""

from growlib.maps import LayerMap, repeated
from growlib.papers import Paper

PAPER = Paper("Interposition", "Wang et al.", "", "ICML", 2026, "2510.08008")


def depth(old: int, new: int, *, noise: float = 0.0) -> LayerMap:
    """Target layer t copies source layer t L // L'. Not exact: a copy acts right after its source."""
    return repeated(old, tuple(layer * old // new for layer in range(new)), noise)
