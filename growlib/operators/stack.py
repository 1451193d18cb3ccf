"""stack: the layers over and over, [1 .. L, 1 .. L, ...], cut at the new depth L'.

    W'_t = W_(t mod L)

Source: StackBERT (Gong et al., ICML 2019), L' = 2 L.
"""

from growlib.maps import LayerMap, repeated
from growlib.papers import Paper

PAPER = Paper("StackBERT", "Gong et al.", "Efficient Training of BERT by Progressively Stacking", "ICML", 2019)


def depth(old: int, new: int) -> LayerMap:
    """Target layer t copies source layer t mod L. Not exact: every copy acts a second time."""
    return repeated(old, tuple(layer % old for layer in range(new)))
