"""stack: the layers over and over, [1 .. L, 1 .. L, ...], cut at the new depth L'.

    W'_t = W_(t mod L)

Source: StackBERT (Gong et al., ICML 2019), L' = 2 L.
"""

from growlib.axes import LayerMap, repeated


def depth(old: int, new: int) -> LayerMap:
    """Target layer t copies source layer t mod L. Not exact: every copy acts a second time."""
    return repeated(old, tuple(layer % old for layer in range(new)))
