r"""Ways to fill hidden entries for which no whole copy is left under a LayerNorm after the residual sum.

    PYTHONPATH=docs/results/bert python recipes/compare_methods.py --preset bert \
        --methods lossless,starts:partial,starts:fresh,random+lossless

All else is as in `lossless`, which puts the mean of the old entries there.
"""

from dataclasses import replace

from growlib import Method
from growlib.maps import AxisMap, split_evenly, tile
from growlib.operators import lossless


def partial_copies(name, axis, old, new, seed):
    """Some entries are copied once more; their readers share them (bert2BERT's FPI)."""
    axis_map = lossless.width(name, axis, old, new, seed)
    if axis.role != "post_layer_norm":
        return axis_map
    source = tile(old[name], new[name])
    return AxisMap(old[name], source, split_evenly(old[name], source), inexact="some entries are copied, others not")


def fresh_entries(name, axis, old, new, seed):
    """Fresh values that the norm sees; nothing old reads them at first."""
    axis_map = lossless.width(name, axis, old, new, seed)
    if axis.role != "post_layer_norm":
        return axis_map
    wrong = "the norm sees fresh entries"
    return replace(axis_map, gain=1.0, new_writes="free", new_scale="mean", new_reads="zero", inexact=wrong)


partial = Method("partial", width=partial_copies, depth=lossless.depth)
fresh = Method("fresh", width=fresh_entries, depth=lossless.depth)
