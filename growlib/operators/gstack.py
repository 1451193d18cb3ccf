"""gstack: the whole stack g times, L' = g L; G_direct of the paper, which advises g = 4.

    W'_t = W_(t mod L),    t = 0 .. g L - 1

Source: Du et al., "Stacking Your Transformers" (NeurIPS 2024, arXiv 2405.15319).
"""

from growlib.errors import GrowError
from growlib.maps import LayerMap
from growlib.operators import stack
from growlib.papers import Paper

PAPER = Paper(
    "G_stack",
    "Du et al.",
    "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
    "NeurIPS",
    2024,
    "2405.15319",
)


def depth(old: int, new: int) -> LayerMap:
    """A whole growth factor only; `stack` takes any depth."""
    if new % old:
        valid = f"{new // old * old} or {new // old * old + old} layers, or method 'stack'"
        raise GrowError(f"growing {old} layers to {new} with method 'gstack'", f"{new} is not g times {old}", valid)
    return stack.depth(old, new)
