"""solar: two copies of the stack that overlap, the last m layers of the first and the first m of the second dropped.

    [1 .. L - m, m + 1 .. L],    L' = 2 (L - m)

Any list of source layers in its place is what merge tools call a passthrough merge:
`Method(depth=partial(solar.depth, layers=(0, 1, 2, 1, 2, 3)))`.

Source: SOLAR 10.7B (Kim et al. 2023, arXiv 2312.15166), depth up-scaling with L = 32, m = 8, L' = 48.
"""

from collections.abc import Sequence

from growlib.errors import GrowError
from growlib.maps import LayerMap, repeated
from growlib.papers import Paper

PAPER = Paper(
    "SOLAR",
    "Kim et al.",
    "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
    "",
    2023,
    "2312.15166",
)


def depth(old: int, new: int, *, layers: Sequence[int] = ()) -> LayerMap:
    """An odd L' gives the first copy one layer more. `layers`: the source of each target layer instead."""
    asked = f"growing {old} layers to {new} with method 'solar'"
    if layers:
        if len(layers) != new or not all(0 <= layer < old for layer in layers):
            raise GrowError(asked, f"layers={tuple(layers)}", f"{new} layers between 0 and {old - 1}")
        return repeated(old, tuple(layers))
    if new > 2 * old:
        wrong = "two copies of the stack have too few layers"
        raise GrowError(asked, wrong, f"up to {2 * old} layers, a list of source layers, or method 'stack'")
    first = (new + 1) // 2
    return repeated(old, (*range(first), *range(old - new + first, old)))
