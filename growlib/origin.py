"""Which entries of a grown model are old, copied, new or free: the growth loop run on marks instead of values."""

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from growlib.apply import grow_layout
from growlib.axes import AxisMap
from growlib.errors import GrowError
from growlib.families.schema import Side

if TYPE_CHECKING:
    from growlib.plan import Entry, GrowthPlan


class Origin(IntEnum):
    """What an entry of a grown tensor holds."""

    OLD = 0  # a value of the source goes on here
    COPIED = 1  # a further copy of such a value
    NEW = 2  # zero, mean or constant: the rule sets it
    FREE = 3  # the rule leaves it free: drawn from the seed


def origins(plan: "GrowthPlan") -> dict[str, Tensor]:
    """The `Origin` of each entry, by tensor: uint8 of the tensor's new shape. A uniform one takes a single byte."""
    if plan.mixture:
        wrong = "the experts of a mixture are copies of one layer"
        raise GrowError("the new parameters of a mixture", wrong, "the plan of the dense growth: its routers are new")
    heirs: dict[str | None, str] = {}  # source tensor -> the tensor that goes on with it: the first that acts
    for entry in sorted(plan.entries, key=lambda entry: (entry.constant is not None, entry.added)):
        heirs.setdefault(entry.source, entry.name)
    return {entry.name: _marks(entry, plan, heirs[entry.source] == entry.name) for entry in plan.entries}


def _marks(entry: "Entry", plan: "GrowthPlan", heir: bool) -> Tensor:
    start = Origin.OLD if heir else Origin.COPIED
    if entry.constant is not None or entry.source is None:
        start = Origin.NEW
    mark = torch.tensor(start, dtype=torch.uint8)
    axes = {axis for dim in entry.layout for part in dim.parts for axis in part}
    if all(axis not in plan.maps or plan.maps[axis].is_identity for axis in axes):
        return mark.expand(entry.new_shape)

    def mark_axis(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        return _mark(part, dim, plan.maps[axis], side)

    return grow_layout(mark.repeat(entry.old_shape), entry.layout, plan, mark_axis, unread=Origin.NEW)


def _mark(part: Tensor, dim: int, axis_map: AxisMap, side: Side) -> Tensor:
    """The marks [.., n, ..] after the growth of one axis: [.., N, ..]."""
    source = torch.from_numpy(axis_map.source)
    shape = [-1 if d == dim else 1 for d in range(part.ndim)]
    first = np.unique(axis_map.source, return_index=True)[1]
    further = torch.ones(axis_map.new, dtype=torch.bool).index_fill(0, torch.from_numpy(first), False).reshape(shape)
    grown = part.index_select(dim, source.clip(0))
    grown = torch.where(further, grown.clip(min=Origin.COPIED), grown)
    if side == "read":
        # Noise that cancels over the copies of an entry falls on zero rows too.
        shared = torch.from_numpy(axis_map.copies() > 1)[source.clip(0)].reshape(shape)
        grown = torch.where(shared & (grown == Origin.NEW), Origin.FREE, grown)
    fill = {
        "read": axis_map.new_reads,
        "write": axis_map.new_writes,
        "scale": "mean",
        "shift": axis_map.new_shift,
    }[side]
    drawn = Origin.FREE if fill in ("free", "faint") else Origin.NEW
    return torch.where((source < 0).reshape(shape), drawn, grown).to(torch.uint8)
