"""stack: the layers over and over, [1 .. L, 1 .. L, ...].

Source: StackBERT (Gong et al., ICML 2019); G_stack (Du et al., NeurIPS 2024, arXiv 2405.15319) with L' = g L.
"""

from growlib.axes import LayerMap


def depth(old: int, new: int) -> LayerMap:
    """Target layer t copies source layer t mod L. Not exact: every copy acts a second time."""
    source = tuple(layer % old for layer in range(new))
    inexact = f"stacking {old} -> {new} layers applies every copied layer again"
    return LayerMap(old, source, (False,) * new, inexact if new > old else "")
