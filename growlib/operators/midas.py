"""midas: the middle block of the stack twice, for every block that is to be added.

    [B_1 .. B_n] -> [B_1 .. B_c, B_c, B_(c+1) .. B_n],    c = ceil(n / 2)

Source: MIDAS (Saunshi et al., NeurIPS 2024, arXiv 2409.19044), which grows by one block at each stage of training.
"""

from math import gcd

from growlib.errors import GrowError
from growlib.maps import LayerMap, repeated
from growlib.papers import Paper

PAPER = Paper(
    "MIDAS",
    "Saunshi et al.",
    "On the Inductive Bias of Stacking Towards Improving Reasoning",
    "NeurIPS",
    2024,
    "2409.19044",
)


def depth(old: int, new: int, *, block: int | None = None) -> LayerMap:
    """`block`: layers in a block; by default the largest that fills old and new layers and leaves two old blocks."""
    common = gcd(old, new)
    size = max(d for d in range(1, max(old // 2, 1) + 1) if common % d == 0) if block is None else block
    if size < 1 or old % size or new % size:
        asked, valid = f"growing {old} layers to {new} with method 'midas'", f"a divisor of {common}"
        raise GrowError(asked, f"blocks of {size} layers do not fill {old} and {new} layers", valid)
    blocks = list(range(old // size))
    while len(blocks) * size < new:
        middle = (len(blocks) + 1) // 2
        blocks.insert(middle, blocks[middle - 1])
    return repeated(old, tuple(b * size + layer for b in blocks for layer in range(size)))
