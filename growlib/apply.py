"""The loop that turns a plan and the source's tensors into the grown tensors. It knows no method, no architecture.

Each tensor grows by the one rule W' = E_out W C_in + F, where F holds values that the rule leaves free: columns
that read zeros, and noise that cancels over the copies of an entry (F E = 0), so that copies do not stay equal.
Means are the source's: what is drawn has no share in them.
"""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from growlib.averages import deviation, mean_along
from growlib.free_values import normal
from growlib.growth_plan import GrowthPlan, TensorPlan
from growlib.layouts import Part, along, by_axes, grow_layout
from growlib.maps import FILLINGS, AxisMap, Side, copy_numbers


def apply(plan: GrowthPlan, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of the grown model, in the dtype and on the device of its source."""
    for made in plan.tensors:
        source = tensors[made.source] if made.source else torch.zeros(made.old_shape)
        yield made.name, grow_tensor(made, source, plan, tensors[made.following] if made.following else None)


def grow_tensor(made: TensorPlan, source: Tensor, plan: GrowthPlan, following: Tensor | None = None) -> Tensor:
    """Grow one tensor: float32 arithmetic (float64 for float64 sources), the source's dtype.

    `following` is the same tensor of the next layer, for tensors that take from it.
    """
    if not made.layout:  # a single number
        return source.detach().clone()
    work = source.detach().to(torch.promote_types(source.dtype, torch.float32))
    later = None if following is None else following.detach().to(work)
    if later is not None and made.share:
        work = torch.lerp(work, later, made.share)
    width = deviation(work)
    if work.ndim > 1 and width == 0:
        width = plan.initializer_range  # an all-zero matrix still needs free values that differ
    offset = made.layout[0].offset

    def grow_part(values: Tensor, part: Part) -> Tensor:
        return _grow_part(values, part, plan, made.name, width)

    if made.constant is not None:
        grown = grow_layout(torch.full_like(work, made.constant), made.layout, plan, grow_part)
    else:
        grown = grow_layout(work + offset, made.layout, plan, grow_part)
        if later is not None and (taken := _from_next(made, plan, work)) is not None:
            grown = torch.where(taken, grow_layout(later + offset, made.layout, plan, grow_part), grown)
        if made.noise:
            drawn = normal(plan.seed, f"{made.name}/noise", prod(grown.shape[:-1]), grown.shape[-1])
            grown = grown + drawn.reshape(grown.shape).to(grown) * (made.noise * width)
    return (grown * made.factor - offset).to(source.dtype)


def _from_next(made: TensorPlan, plan: GrowthPlan, work: Tensor) -> Tensor | None:
    """Which entries the next layer's tensor gives: bool [new shape]; None where it gives none."""
    axes = {axis for dim in made.layout if dim.side == "write" for part in dim.parts for axis in part}
    if not any(axis in plan.maps and plan.maps[axis].from_next for axis in axes):
        return None

    def mark(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        axis_map = plan.maps[axis]
        part = part.index_select(dim, torch.from_numpy(axis_map.source.clip(0)).to(part.device))
        further = torch.from_numpy(copy_numbers(axis_map.source) > 0)
        return part | along(further, dim, part) if side == "write" and axis_map.from_next else part

    return grow_layout(torch.zeros_like(work, dtype=torch.bool), made.layout, plan, by_axes(plan, mark))


def _grow_part(values: Tensor, part: Part, plan: GrowthPlan, name: str, width: float) -> Tensor:
    """Grow the axes of one part, [n, m, ..] -> [N, M, ..]; free values are `width` wide."""
    growing, sizes = part.growing(plan.maps), list(values.shape)
    extended = {dim for dim, axis_map, side in growing if _needs_mean(axis_map, side)}
    for dim in sorted(extended):
        values = torch.cat([values, mean_along(values, dim)], dim)
    for dim, axis_map, side in growing:
        sizes[dim] = axis_map.new
        index = np.where(axis_map.source < 0, axis_map.old if dim in extended else 0, axis_map.source)
        values = values.index_select(dim, torch.from_numpy(index).to(values.device))
        values = values * along(torch.from_numpy(_scale(axis_map, side)).to(values), dim, values)
        if axis_map.fill(side) in ("zero", "faint"):
            values = torch.where(along(torch.from_numpy(axis_map.source < 0), dim, values), 0.0, values)
        extended -= {dim}
        amplitude = _amplitude(axis_map, side) * width
        if amplitude.any():
            rows, columns = prod(sizes[: part.leading]), prod(sizes[part.leading :])
            drawn = normal(plan.seed, f"{name}/{part.path}{dim}", rows, columns).reshape(sizes).to(values)
            if side == "read" and axis_map.copy_noise:
                drawn = _centred(drawn, dim, axis_map)
            drawn = drawn * along(torch.from_numpy(amplitude).to(drawn), dim, drawn)
            # What stands for a mean is not drawn.
            still = [length for d in reversed(range(len(sizes))) for length in (0, int(d in extended))]
            values = values + pad(drawn, still)
    return values


def _needs_mean(axis_map: AxisMap, side: Side) -> bool:
    return axis_map.fill(side) in ("mean", "free") and bool((axis_map.source < 0).any())


def _scale(axis_map: AxisMap, side: Side) -> np.ndarray:
    """What multiplies each entry: float64 [N]."""
    new = axis_map.source < 0
    match side:
        case "read":
            return np.where(new, 1.0, axis_map.read)
        case "write":
            return np.where(new & (axis_map.fill(side) == "free"), 1.0, axis_map.write)
        case "scale":
            return axis_map.gain * np.where(new, axis_map.new_gain, 1.0)
        case "shift":
            return np.ones(axis_map.new)


def _amplitude(axis_map: AxisMap, side: Side) -> np.ndarray:
    """How wide the values are that are added to each entry, in standard deviations of the source: float64 [N]."""
    new, copies = axis_map.source < 0, axis_map.copies()[axis_map.source.clip(0)]
    free = axis_map.spread * FILLINGS[axis_map.fill(side)].drawn
    if side == "scale":
        free *= axis_map.gain * axis_map.new_gain
    on_copies = np.zeros(axis_map.new)
    if side == "read":
        on_copies = np.where(copies > 1, axis_map.copy_noise / np.maximum(copies, 1), 0.0)
    elif side == "write":
        on_copies = np.where(copy_numbers(axis_map.source) > 0, axis_map.write_noise, 0.0)
    return np.where(new, free, on_copies)


def _centred(drawn: Tensor, dim: int, axis_map: AxisMap) -> Tensor:
    """The values less their mean over the copies of an entry; those of new entries as they are."""
    copies = along(torch.from_numpy(axis_map.copies()[axis_map.source.clip(0)]).to(drawn), dim, drawn)
    old = along(torch.from_numpy(axis_map.source >= 0), dim, drawn)
    index = torch.from_numpy(axis_map.source.clip(0)).to(drawn.device)
    shape = [axis_map.old if d == dim else length for d, length in enumerate(drawn.shape)]
    total = drawn.new_zeros(shape).index_add_(dim, index, torch.where(old, drawn, 0.0))
    return torch.where(old, drawn - total.index_select(dim, index) / copies.clip(min=1), drawn)
