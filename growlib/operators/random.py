"""random: the source in one corner, random values everywhere else. The control for all other widths.

    W' = [[W, R], [R, R]],    R ~ N(mean(W), var(W)),    norms: their mean weight, bias 0

The source has no share in what the new entries compute and no protection from it: what is better than this inherits
more than one corner. Rotary key dimensions move to places of their frequency; queries keep the scale of their scores.
"""

from dataclasses import replace

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap
from growlib.operators import composable, copies


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Never exact, save for new ids (of tokens, positions), which nothing old reads."""
    if new[name] == old[name] or axis.role == "lookup":
        return replace(copies.width(name, axis, old, new, seed), spread=1.0)
    if axis.role == "query_heads":
        axis_map = composable.beside(name, axis, old, new)
    elif axis.role != "key_heads" and axis.role.endswith(("query", "key")):
        axis_map = copies.width(name, axis, old, new, seed)
    else:
        axis_map = copies.append(name, axis, old, new)
    wrong = f"{axis.size} {old[name]} -> {new[name]}: the new entries are random, and read"
    return replace(axis_map, new_writes="free", new_reads="free", inexact=wrong)
