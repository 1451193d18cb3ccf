"""Which entries of a grown tensor are old, copied, new or free: the walk through its layout, on marks."""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from growlib.layouts import GrownAxes, Layout, along, by_axes, grow_layout
from growlib.maps import FILLINGS, AxisMap, Side


class Origin(IntEnum):
    """What an entry of a grown tensor holds."""

    OLD = 0  # a value of the source goes on here
    COPIED = 1  # a further copy of such a value
    NEW = 2  # zero, mean or constant: the rule sets it
    FREE = 3  # the rule leaves it free: drawn from the seed


def origins(
    layout: Layout,
    old_shape: tuple[int, ...],
    new_shape: tuple[int, ...],
    growth: GrownAxes,
    *,
    is_set: bool,
    is_heir: bool,
) -> Tensor:
    """The `Origin` of each entry of a tensor: uint8 of its new shape. A uniform one takes a single byte.

    Args:
        is_set: a constant replaces the source's values.
        is_heir: the source's tensor goes on here, and not in a copy of its layer.
    """
    mark = torch.tensor(Origin.NEW if is_set else Origin.OLD if is_heir else Origin.COPIED, dtype=torch.uint8)
    axes = {axis for dim in layout for part in dim.parts for axis in part}
    if all(axis not in growth.maps or growth.maps[axis].is_identity for axis in axes):
        return mark.expand(new_shape)

    def mark_axis(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        return _mark(part, dim, growth.maps[axis], side)

    return grow_layout(mark.repeat(old_shape), layout, growth, by_axes(growth, mark_axis, unread=Origin.NEW))


def _mark(part: Tensor, dim: int, axis_map: AxisMap, side: Side) -> Tensor:
    """The marks [.., n, ..] after the growth of one axis: [.., N, ..]."""
    source = torch.from_numpy(axis_map.source)
    first = np.unique(axis_map.source, return_index=True)[1]
    further = along(torch.ones(axis_map.new, dtype=torch.bool).index_fill(0, torch.from_numpy(first), False), dim, part)
    grown = part.index_select(dim, source.clip(0))
    grown = torch.where(further, grown.clip(min=Origin.COPIED), grown)
    if side == "read":
        # Noise that cancels over the copies of an entry falls on zero rows too.
        shared = along(torch.from_numpy(axis_map.copies() > 1)[source.clip(0)], dim, part)
        grown = torch.where(shared & (grown == Origin.NEW), Origin.FREE, grown)
    drawn = Origin.FREE if FILLINGS[axis_map.fill(side)].drawn else Origin.NEW
    return torch.where(along(source < 0, dim, part), drawn, grown).to(torch.uint8)
