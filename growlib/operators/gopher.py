"""gopher: each new layer from the nearest old one at the same relative depth.

    W'_t = W_(round(t L / L')),    round half to even, at most L - 1

Source: Gopher (Rae et al. 2021, arXiv 2112.11446, appendix on reuse of weights); ModernBERT-large starts so from base.
The bound L - 1 is growlib's: the rounding reaches L from L' = 2 L on.
"""

from growlib.maps import LayerMap, repeated
from growlib.papers import Paper

PAPER = Paper(
    "Gopher",
    "Rae et al.",
    "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
    "",
    2021,
    "2112.11446",
)


def depth(old: int, new: int) -> LayerMap:
    """Like interleave, half a copy earlier: the first layer gets the fewest copies, the last one the most."""
    return repeated(old, tuple(min(round(layer * old / new), old - 1) for layer in range(new)))
