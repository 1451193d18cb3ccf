"""What the dimensions of a tensor are, and the walk through them: take a tensor apart into its axes, grow each.

A layout is read from a row of a table, such as `(heads value) -> hidden`, `vocab <- hidden` or `scale hidden`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from growlib.maps import AxisMap, Side, copy_numbers


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: a concatenation of parts, each a product of axes."""

    parts: tuple[tuple[str, ...], ...]
    side: Side
    by: str = ""  # the parts lie interleaved: first the share of this axis's first entry in each part, and so on
    offset: float = 0.0  # scale: the weight w acts as offset + w


Layout = tuple[Dim, ...]


def parse_layout(text: str) -> Layout:
    """Read a row such as `(heads value) -> hidden`, `vocab <- hidden` or `scale hidden`.

    Arrows run from the dimensions that the tensor reads to those that it writes (`experts -> hidden <- ffn`); the
    dimensions stand in memory order. Parentheses hold one dimension: a product of axes as in einops, `+` a
    concatenation, `by` an interleaved one. `1 + scale` is a norm's weight w that acts as 1 + w.
    """
    if match := re.fullmatch(r"(1 \+ )?(scale|shift) ([\w ]+)", text):
        kind: Side = "scale" if match.group(2) == "scale" else "shift"
        return (Dim((tuple(match.group(3).split()),), kind, offset=1.0 if match.group(1) else 0.0),)
    *words_and_arrows, last = re.split(r"(->|<-)", text)
    if not words_and_arrows:
        raise ValueError(f"there is no arrow in {text!r}")
    dims, before = [], ""
    for words, after in zip([*words_and_arrows[::2], last], [*words_and_arrows[1::2], ""], strict=True):
        side: Side = "write" if before == "->" or after == "<-" else "read"
        before = after
        for group, single in re.findall(r"\(([^)]*)\)|(\w+)", words):
            product, _, by = (group or single).partition(" by ")
            parts = tuple(tuple(part.split()) for part in product.split("+"))
            dims.append(Dim(parts, side, by))
    return tuple(dims)


def layout_text(layout: Layout) -> str:
    """The inverse of `parse_layout`; a single number has the layout `->`."""
    if layout and layout[0].side in ("scale", "shift"):
        return ("1 + " if layout[0].offset else "") + f"{layout[0].side} {' '.join(layout[0].parts[0])}"
    if not layout:
        return "->"
    groups = []
    for side, dims in groupby(layout, lambda dim: dim.side):
        texts = [" + ".join(" ".join(part) for part in d.parts) + (f" by {d.by}" if d.by else "") for d in dims]
        groups.append((side, " ".join(f"({text})" if " " in text else text for text in texts)))
    if len(groups) < 2:
        groups.append(("write", ""))
    arrows = ["->" if side == "read" else "<-" for side, _ in groups[:-1]]
    return " ".join(
        word for pair in zip((text for _, text in groups), [*arrows, ""], strict=True) for word in pair if word
    )


class GrownAxes(Protocol):
    """The axes of one growth: their maps, and their sizes before and after."""

    @property
    def maps(self) -> Mapping[str, AxisMap]: ...
    @property
    def old_sizes(self) -> Mapping[str, int]: ...
    @property
    def new_sizes(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Part:
    """One part of a tensor, taken apart into its axes."""

    axes: tuple[tuple[str, Side], ...]  # in memory order
    leading: int  # how many of them stand before the tensor's last dimension
    path: str  # which of the concatenated parts it is

    def growing(self, maps: Mapping[str, AxisMap]) -> list[tuple[int, AxisMap, Side]]:
        """The dimensions that grow, in the order in which they do.

        Readers last: F cancels within each row, so rows that are copies get noise of their own.
        """
        found = [(d, maps[axis], side) for d, (axis, side) in enumerate(self.axes) if axis in maps]
        return sorted((g for g in found if not g[1].is_identity), key=lambda g: g[2] == "read")


# (the values of a part with a dimension per axis, the part) -> the same, grown
GrowPart = Callable[[Tensor, Part], Tensor]
# (a part with a dimension per axis, the dimension that grows, its axis, its side) -> the part, grown
GrowAxis = Callable[[Tensor, int, str, Side], Tensor]


def by_axes(growth: GrownAxes, grow_axis: GrowAxis, unread: float = 0.0) -> GrowPart:
    """The growth of a part that is a growth of each of its axes. `unread` stands where a copy does not read another."""

    def grow_part(values: Tensor, part: Part) -> Tensor:
        for dim, _, side in part.growing(growth.maps):
            values = grow_axis(values, dim, part.axes[dim][0], side)
        return read_own(values, part, growth.maps, unread)

    return grow_part


def read_own(
    values: Tensor, part: Part, maps: Mapping[str, AxisMap], unread: float = 0.0, rows: slice = slice(None)
) -> Tensor:
    """A grown part, or some rows of it, in which copy k reads copy k alone, at full weight."""
    for d, e, copies in own_blocks(part.axes, maps):
        written, read = (torch.from_numpy(copy_numbers(maps[part.axes[dim][0]].source)) for dim in (d, e))
        written, read = (numbers[rows] if dim == 0 else numbers for dim, numbers in ((d, written), (e, read)))
        own = along(written, d, values) == along(read, e, values)
        values = torch.where(own, values * copies if values.is_floating_point() else values, unread)
    return values


def grow_layout(work: Tensor, layout: Layout, growth: GrownAxes, grow_part: GrowPart, path: str = "") -> Tensor:
    """Take a tensor apart into its axes, grow them, and put it together; concatenated dimensions part by part.

    What stands in the tensor is up to `grow_part`: values, or what becomes of them.
    """
    for index, dim in enumerate(layout):
        if len(dim.parts) > 1:
            old_groups, new_groups = (sizes[dim.by] if dim.by else 1 for sizes in (growth.old_sizes, growth.new_sizes))
            # [.., groups * rows, ..] -> parts of [.., groups * rows of the part, ..]
            split = work.unflatten(index, (old_groups, -1))
            parts = split.split([size // old_groups for size in _part_sizes(dim, growth.old_sizes)], dim=index + 1)
            layouts = [(*layout[:index], Dim((part,), dim.side), *layout[index + 1 :]) for part in dim.parts]
            grown = [
                grow_layout(
                    part.flatten(index, index + 1), part_layout, growth, grow_part, f"{path}{number}."
                ).unflatten(index, (new_groups, -1))
                for number, (part, part_layout) in enumerate(zip(parts, layouts, strict=True))
            ]
            return torch.cat(grown, dim=index + 1).flatten(index, index + 1)
    return _grow_part(work, layout, growth, grow_part, path)


def _grow_part(values: Tensor, layout: Layout, growth: GrownAxes, grow_part: GrowPart, path: str) -> Tensor:
    names = [f"{axis}_{d}" for d, dim in enumerate(layout) for axis in dim.parts[0]]
    flat = " ".join(names)
    folded = " ".join("(" + " ".join(f"{axis}_{d}" for axis in dim.parts[0]) + ")" for d, dim in enumerate(layout))
    axes: list[tuple[str, Side]] = [(axis, dim.side) for dim in layout for axis in dim.parts[0]]
    known = {n: growth.old_sizes[axis] for n, (axis, _) in zip(names, axes, strict=True) if axis in growth.old_sizes}
    leading = sum(len(dim.parts[0]) for dim in layout[:-1])
    part = grow_part(rearrange(values, f"{folded} -> {flat}", **known), Part(tuple(axes), leading, path))
    return rearrange(part, f"{flat} -> {folded}")


def _part_sizes(dim: Dim, sizes: Mapping[str, int]) -> list[int]:
    return [prod(sizes[axis] for axis in part) for part in dim.parts]


def along(values: Tensor, dim: int, part: Tensor) -> Tensor:
    """Values of one dimension, shaped to meet a part of a tensor."""
    return values.to(part.device).reshape([-1 if d == dim else 1 for d in range(part.ndim)])


def own_blocks(axes: Sequence[tuple[str, str]], maps: Mapping[str, AxisMap]) -> Iterator[tuple[int, int, int]]:
    """For the (axis, side) of a tensor's dimensions: which write and which read copies of their own, and how many."""
    for d, (written, side) in enumerate(axes):
        for e, (read, other) in enumerate(axes):
            if (side, other) == ("write", "read") and written in maps and read in maps:
                copies = maps[written].copies().max()
                if maps[written].blocks and maps[read].blocks and maps[read].copies().max() == copies > 1:
                    yield d, e, int(copies)
