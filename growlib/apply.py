"""The loop that turns a plan and the source's tensors into the grown tensors. It knows no method, no architecture.

Each tensor grows by the one rule W' = E_out W C_in + F, where F holds values that the rule leaves free: columns
that read zeros, and noise that cancels over the copies of an entry (F E = 0), so that copies do not stay equal.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from growlib.axes import AxisMap, copy_numbers, own_blocks
from growlib.families.schema import Dim, Side

if TYPE_CHECKING:
    from growlib.plan import Entry, GrowthPlan

# The dimension that holds a tensor and its twin of the next layer, where rows are taken from both.
SOURCES = "sources"


def apply(plan: "GrowthPlan", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of the grown model, in the dtype and on the device of its source."""
    for entry in plan.entries:
        source = tensors[entry.source] if entry.source else torch.zeros(entry.old_shape)
        yield entry.name, grow_tensor(entry, source, plan, tensors[entry.following] if entry.following else None)


def grow_tensor(entry: "Entry", source: Tensor, plan: "GrowthPlan", following: Tensor | None = None) -> Tensor:
    """Grow one tensor: float32 arithmetic (float64 for float64 sources), the source's dtype.

    `following` is the same tensor of the next layer, for entries that take from it.
    """
    work = source.detach().to(torch.promote_types(source.dtype, torch.float32))
    if following is not None and entry.share:
        work = torch.lerp(work, following.detach().to(work), entry.share)
    deviation = work.std(correction=0)
    if work.ndim > 1 and deviation == 0:
        deviation = deviation + plan.initializer_range  # an all-zero matrix still needs free values that differ
    if not entry.layout:  # a single number
        return source.detach().clone()
    offset = entry.layout[0].offset
    work = torch.full_like(work, entry.constant) if entry.constant is not None else work + offset
    draw, layout = Draw(plan.seed, entry.name, deviation), entry.layout
    paired = following if entry.constant is None else None
    if paired is not None:
        work = torch.stack([work, paired.detach().to(work) + offset], dim=-1)
        layout = (*layout, Dim(((SOURCES,),), "write"))

    def grow_axis(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        axis_map = plan.maps[axis]
        grown = _GROW[side](part, dim, axis_map, draw)
        if paired is not None and side == "write" and axis_map.from_next:
            later = _along(torch.from_numpy(copy_numbers(axis_map.source) > 0), dim, part)
            grown = torch.where(later, grown[..., 1:], grown)
        return grown

    grown = grow_layout(work, layout, plan, grow_axis)
    grown = grown if paired is None else grown[..., 0]
    if entry.noise and entry.constant is None:
        grown = grown + entry.noise * draw.normal(grown)
    return (grown * entry.factor - offset).to(source.dtype)


# (a part of a tensor with a dimension per axis, the dimension that grows, its axis, its side) -> the part, grown
GrowAxis = Callable[[Tensor, int, str, Side], Tensor]


def grow_layout(
    work: Tensor, layout: tuple[Dim, ...], plan: "GrowthPlan", grow_axis: GrowAxis, unread: float = 0.0
) -> Tensor:
    """Take a tensor apart into its axes, grow each, and put it together; concatenated dimensions part by part.

    What stands in the tensor is up to `grow_axis`: values, or what becomes of them. `unread` stands where a copy does
    not read another.
    """
    for index, dim in enumerate(layout):
        if len(dim.parts) > 1:
            old_groups, new_groups = (sizes[dim.by] if dim.by else 1 for sizes in (plan.old_sizes, plan.new_sizes))
            # [.., groups * rows, ..] -> parts of [.., groups * rows of the part, ..]
            split = work.unflatten(index, (old_groups, -1))
            parts = split.split([size // old_groups for size in plan.part_sizes(dim)], dim=index + 1)
            layouts = [(*layout[:index], Dim((part,), dim.side), *layout[index + 1 :]) for part in dim.parts]
            grown = [
                grow_layout(part.flatten(index, index + 1), part_layout, plan, grow_axis, unread).unflatten(
                    index, (new_groups, -1)
                )
                for part, part_layout in zip(parts, layouts, strict=True)
            ]
            return torch.cat(grown, dim=index + 1).flatten(index, index + 1)
    return _grow_part(work, layout, plan, grow_axis, unread)


class Draw:
    """Free values of one tensor: the same for a seed and a name, whatever the order and the device."""

    def __init__(self, seed: int, name: str, deviation: Tensor) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        self.deviation = deviation

    def normal(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return noise.to(like) * self.deviation


def _grow_part(part: Tensor, layout: tuple[Dim, ...], plan: "GrowthPlan", grow_axis: GrowAxis, unread: float) -> Tensor:
    names = [f"{axis}_{d}" for d, dim in enumerate(layout) for axis in dim.parts[0]]
    flat = " ".join(names)
    folded = " ".join("(" + " ".join(f"{axis}_{d}" for axis in dim.parts[0]) + ")" for d, dim in enumerate(layout))
    axes: list[tuple[str, Side]] = [(axis, dim.side) for dim in layout for axis in dim.parts[0]]
    known = {n: plan.old_sizes[axis] for n, (axis, _) in zip(names, axes, strict=True) if axis in plan.old_sizes}
    part = rearrange(part, f"{folded} -> {flat}", **known)
    # Readers last: F cancels within each row, so rows that are copies get noise of their own.
    for position, (axis, side) in sorted(enumerate(axes), key=lambda item: item[1][1] == "read"):
        if axis in plan.maps and not plan.maps[axis].is_identity:
            part = grow_axis(part, position, axis, side)
    for d, e, copies in own_blocks(axes, plan.maps):  # copy k reads copy k alone, at full weight
        numbers = [torch.from_numpy(copy_numbers(plan.maps[axes[dim][0]].source)) for dim in (d, e)]
        own = _along(numbers[0], d, part) == _along(numbers[1], e, part)
        part = torch.where(own, part * copies if part.is_floating_point() else part, unread)
    return rearrange(part, f"{flat} -> {folded}")


def _index(axis_map: AxisMap, part: Tensor) -> Tensor:
    return torch.from_numpy(axis_map.source.clip(0)).to(part.device)


def _along(values: Tensor, dim: int, part: Tensor) -> Tensor:
    return values.to(part.device).reshape([-1 if d == dim else 1 for d in range(part.ndim)])


def _new(axis_map: AxisMap, dim: int, part: Tensor) -> Tensor:
    return _along(torch.from_numpy(axis_map.source < 0), dim, part)


def _free(part: Tensor, dim: int, grown: Tensor, axis_map: AxisMap, draw: Draw) -> Tensor:
    return part.mean(dim, keepdim=True) + axis_map.spread * draw.normal(grown)


def read_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """W C + F along one dimension: [.., n, ..] -> [.., N, ..]."""
    index = _index(axis_map, part)
    weights = torch.from_numpy(axis_map.read).to(part)
    grown = part.index_select(dim, index) * _along(weights, dim, part)
    copies = torch.from_numpy(axis_map.copies()).to(part)
    if axis_map.copy_noise and copies.max() > 1:
        noise = axis_map.copy_noise * draw.normal(grown)
        noise = torch.where(_new(axis_map, dim, part), 0, noise / _along(copies[index], dim, part))
        total = torch.zeros_like(part).index_add_(dim, index, noise)
        mean = total.index_select(dim, index) / _along(copies[index], dim, part)
        grown = grown + torch.where(_new(axis_map, dim, part), 0, noise - mean)
    if axis_map.new_reads == "free":
        grown = torch.where(_new(axis_map, dim, part), _free(part, dim, grown, axis_map, draw), grown)
    return grown


def write_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """E W along one dimension: [.., n, ..] -> [.., N, ..]."""
    grown = part.index_select(dim, _index(axis_map, part)) * axis_map.write
    if axis_map.write_noise:
        later = _along(torch.from_numpy(copy_numbers(axis_map.source) > 0), dim, part)
        grown = grown + later * axis_map.write_noise * draw.normal(grown)
    match axis_map.new_writes:
        case "mean":
            new = part.mean(dim, keepdim=True) * axis_map.write
        case "free":
            new = _free(part, dim, grown, axis_map, draw)
        case "faint":
            new = axis_map.spread * draw.normal(grown)
        case "zero":
            new = torch.zeros_like(grown)
    return torch.where(_new(axis_map, dim, part), new, grown)


def scale_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """The weight of a norm over the axis."""
    grown = part.index_select(dim, _index(axis_map, part))
    new = part.mean(dim, keepdim=True) if axis_map.new_scale == "free" else torch.zeros_like(grown)
    return torch.where(_new(axis_map, dim, part), new, grown) * axis_map.gain


def shift_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """The bias of a norm over the axis."""
    grown = part.index_select(dim, _index(axis_map, part))
    new = part.mean(dim, keepdim=True) if axis_map.new_shift == "mean" else torch.zeros_like(grown)
    return torch.where(_new(axis_map, dim, part), new, grown)


_GROW = {"read": read_axis, "write": write_axis, "scale": scale_axis, "shift": shift_axis}
