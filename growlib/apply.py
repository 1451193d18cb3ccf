"""The loop that turns a plan and the source's tensors into the grown tensors. It knows no method, no architecture.

Each tensor grows by the one rule W' = E_out W C_in + F, where F holds values that the rule leaves free: columns
that read zeros, and noise that cancels over the copies of an entry (F E = 0), so that copies do not stay equal.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from growlib.growth_plan import GrowthPlan, TensorPlan
from growlib.layouts import Dim, along, grow_layout
from growlib.maps import AxisMap, Side, copy_numbers

# The dimension that holds a tensor and its twin of the next layer, where rows are taken from both.
SOURCES = "sources"


def apply(plan: GrowthPlan, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of the grown model, in the dtype and on the device of its source."""
    for made in plan.tensors:
        source = tensors[made.source] if made.source else torch.zeros(made.old_shape)
        yield made.name, grow_tensor(made, source, plan, tensors[made.following] if made.following else None)


def grow_tensor(made: TensorPlan, source: Tensor, plan: GrowthPlan, following: Tensor | None = None) -> Tensor:
    """Grow one tensor: float32 arithmetic (float64 for float64 sources), the source's dtype.

    `following` is the same tensor of the next layer, for tensors that take from it.
    """
    work = source.detach().to(torch.promote_types(source.dtype, torch.float32))
    if following is not None and made.share:
        work = torch.lerp(work, following.detach().to(work), made.share)
    deviation = work.std(correction=0)
    if work.ndim > 1 and deviation == 0:
        deviation = deviation + plan.initializer_range  # an all-zero matrix still needs free values that differ
    if not made.layout:  # a single number
        return source.detach().clone()
    offset = made.layout[0].offset
    work = torch.full_like(work, made.constant) if made.constant is not None else work + offset
    draw, layout = Draw(plan.seed, made.name, deviation), made.layout
    paired = following if made.constant is None else None
    if paired is not None:
        work = torch.stack([work, paired.detach().to(work) + offset], dim=-1)
        layout = (*layout, Dim(((SOURCES,),), "write"))

    def grow_axis(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        axis_map = plan.maps[axis]
        grown = _GROW[side](part, dim, axis_map, draw)
        if paired is not None and side == "write" and axis_map.from_next:
            later = along(torch.from_numpy(copy_numbers(axis_map.source) > 0), dim, part)
            grown = torch.where(later, grown[..., 1:], grown)
        return grown

    grown = grow_layout(work, layout, plan, grow_axis)
    grown = grown if paired is None else grown[..., 0]
    if made.noise and made.constant is None:
        grown = grown + made.noise * draw.normal(grown)
    return (grown * made.factor - offset).to(source.dtype)


class Draw:
    """Free values of one tensor: the same for a seed and a name, whatever the order and the device."""

    def __init__(self, seed: int, name: str, deviation: Tensor) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        self.deviation = deviation

    def normal(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return noise.to(like) * self.deviation


def _index(axis_map: AxisMap, part: Tensor) -> Tensor:
    return torch.from_numpy(axis_map.source.clip(0)).to(part.device)


def _new(axis_map: AxisMap, dim: int, part: Tensor) -> Tensor:
    return along(torch.from_numpy(axis_map.source < 0), dim, part)


def _filled(grown: Tensor, part: Tensor, dim: int, axis_map: AxisMap, side: Side, draw: Draw) -> Tensor:
    """The grown part with its new entries as the map fills them on this side."""
    match axis_map.fill(side):
        case "zero":
            new = torch.zeros_like(grown)
        case "mean":
            new = part.mean(dim, keepdim=True) * (axis_map.write if side == "write" else 1.0)
        case "free":
            new = part.mean(dim, keepdim=True) + axis_map.spread * draw.normal(grown)
        case "faint":
            new = axis_map.spread * draw.normal(grown)
    return torch.where(_new(axis_map, dim, part), new, grown)


def read_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """W C + F along one dimension: [.., n, ..] -> [.., N, ..]."""
    index = _index(axis_map, part)
    grown = part.index_select(dim, index) * along(torch.from_numpy(axis_map.read).to(part), dim, part)
    copies = torch.from_numpy(axis_map.copies()).to(part)
    if axis_map.copy_noise and copies.max() > 1:
        noise = axis_map.copy_noise * draw.normal(grown)
        noise = torch.where(_new(axis_map, dim, part), 0, noise / along(copies[index], dim, part))
        total = torch.zeros_like(part).index_add_(dim, index, noise)
        mean = total.index_select(dim, index) / along(copies[index], dim, part)
        grown = grown + torch.where(_new(axis_map, dim, part), 0, noise - mean)
    # C holds the zeros already.
    return grown if axis_map.new_reads == "zero" else _filled(grown, part, dim, axis_map, "read", draw)


def write_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """E W along one dimension: [.., n, ..] -> [.., N, ..]."""
    grown = part.index_select(dim, _index(axis_map, part)) * axis_map.write
    if axis_map.write_noise:
        later = along(torch.from_numpy(copy_numbers(axis_map.source) > 0), dim, part)
        grown = grown + later * axis_map.write_noise * draw.normal(grown)
    return _filled(grown, part, dim, axis_map, "write", draw)


def scale_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """The weight of a norm over the axis."""
    grown = part.index_select(dim, _index(axis_map, part))
    grown = _filled(grown, part, dim, axis_map, "scale", draw) * axis_map.gain
    return torch.where(_new(axis_map, dim, part), grown * axis_map.new_gain, grown)


def shift_axis(part: Tensor, dim: int, axis_map: AxisMap, draw: Draw) -> Tensor:
    """The bias of a norm over the axis."""
    grown = part.index_select(dim, _index(axis_map, part))
    return _filled(grown, part, dim, axis_map, "shift", draw)


_GROW = {"read": read_axis, "write": write_axis, "scale": scale_axis, "shift": shift_axis}
