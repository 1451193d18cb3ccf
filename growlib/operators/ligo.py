"""ligo: width and depth factors, learned on text and folded into plain weights by `growlib.learn`.

    W'_t = Σ_k w_tk B_k W_k A_kᵀ        b'_t = Σ_k w_tk B_k b_k

k runs over the source's L layers, t over the target's L'. W stands for one row of the table (`q_proj` of all
layers, say), which has its own w [L' x L]. Each axis has one matrix [N x n], and each axis of a tensor is multiplied
by it, whether the tensor writes the axis or reads it. These are the paper's ties: A is the B of what is read; biases,
norms and embeddings take the B of their axis, a tied head what the embedding takes. The residual stream has one matrix
for the whole model, an axis inside a block (FFN units, heads, head_dim) one for each source layer.

At the start B = [I; C] with C ~ N(0, 1 / 4n), and w interpolates: t is source layer ⌊t L / L'⌋. I stands where the
architecture wants the old entries: beside their KV head, at their rotary pair. New ids and positions are the mean row.

Source: LiGO (Wang et al., ICLR 2023, arXiv 2303.00980). Two departures: heads are mixed as wholes (a matrix of heads
times one of head_dim, where the paper mixes all rows of q, k and v), and C is normal, not a random choice of rows.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from growlib.architectures.schema import Architecture, Axis, Sizes
from growlib.free_values import normal
from growlib.growth_plan import GrowthPlan, Skeleton, TensorPlan
from growlib.layouts import by_axes, grow_layout
from growlib.maps import AxisMap, LayerMap, Side
from growlib.operators import copies

NEW_ROW = 0.5  # the norm of a row of C at the start; a row of I has 1


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """The start of B: where I stands, the rest free. Queries take the growth of the score's 1/sqrt(head_dim) back."""
    start = copies.width(name, axis, old, new, seed)
    if axis.role == "lookup" or old[name] == new[name]:
        return start
    source = np.full(new[name], -1)
    first = np.unique(start.source, return_index=True)[1]
    source[first] = start.source[first]
    write = start.write if axis.role in ("query", "rotary_query") else 1.0
    inexact = f"LiGO mixes the {old[name]} entries of {name} into {new[name]}"
    return AxisMap(old[name], source, (source >= 0).astype(float), write, new_reads="free", inexact=inexact)


def depth(old: int, new: int) -> LayerMap:
    """The start of w: interpolation."""
    source = tuple(layer * old // new for layer in range(new))
    inexact = f"interpolating {old} -> {new} layers applies copied layers again"
    return LayerMap(old, source, (False,) * new, inexact if new > old else "")


@dataclass(frozen=True)
class Row:
    """One row of the table in the model: the tensors that are mixed, and those that they are mixed into."""

    stack: str  # the config field that counts its layers; empty: the row stands once
    sources: tuple[tuple[int, str], ...]  # (layer, tensor) of the source
    grown: tuple[TensorPlan, ...]


def rows(plan: GrowthPlan, table: Architecture, source: Skeleton) -> list[Row]:
    """The plan's tensors, those of one row of the table together. Biases that the source does not have are left out."""
    grouped: dict[str, list[TensorPlan]] = defaultdict(list)
    for made in plan.tensors:
        if made.source and made.layout:
            grouped[table.template(source.base(made.name))[0]].append(made)
    rows_of_table = []
    for row, together in grouped.items():
        _, stack, _ = table.template(source.base(together[0].name))
        if stack is None:
            rows_of_table += [Row("", ((0, str(made.source)),), (made,)) for made in together]
            continue
        names = ((k, source.find(row.replace("*", str(k), 1))) for k in range(plan.layers[stack.layers].old))
        alike = tuple((k, name) for k, name in names if name and source.shapes[name] == together[0].old_shape)
        rows_of_table.append(Row(stack.layers, alike, tuple(together)))
    return rows_of_table


class Factors:
    """The matrices of one growth, and what they make of the source's tensors."""

    def __init__(self, plan: GrowthPlan, rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> None:
        self.plan, self.tensors = plan, tensors
        self.looked_up = {name for name, role in plan.roles.items() if role == "lookup"}
        device, dtype = (getattr(next(iter(tensors.values())), kind) for kind in ("device", "dtype"))
        outside = {axis for row in rows if not row.stack for axis in _axes(row)}
        self.width: dict[tuple[str, str], Tensor] = {}  # (axis, stack or ""): [N, n], or [L, N, n] inside a block
        self.depth: dict[Row, Tensor] = {}  # [L', L]
        for row in rows:
            for axis in sorted(_axes(row) - self.looked_up):
                axis_map, stack = plan.maps.get(axis), "" if axis in outside else row.stack
                if axis_map is not None and not axis_map.is_identity and (axis, stack) not in self.width:
                    start = _start(axis_map, (plan.layers[stack].old,) if stack else (), plan.seed, f"{axis}/{stack}")
                    self.width[axis, stack] = start.to(device, dtype).requires_grad_()
            if row.stack:
                names = [name for _, name in row.sources]
                w = torch.zeros(len(row.grown), len(names))
                for t, made in enumerate(row.grown):
                    # A block that starts as the identity has zero writers: w learns them from zero.
                    w[t, names.index(str(made.source))] = float(made.constant != 0)
                self.depth[row] = w.to(device, dtype).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [*self.width.values(), *self.depth.values()]

    def grow(self, row: Row) -> dict[str, Tensor]:
        """The grown tensors of a row, by name; differentiable in the factors."""
        layout = row.grown[0].layout
        wide = []
        for layer, name in row.sources:

            def grow_axis(part: Tensor, dim: int, axis: str, side: Side, layer: int = layer) -> Tensor:
                return self._grow_axis(part, dim, axis, row.stack, layer)

            grow_part = by_axes(self.plan, grow_axis)
            wide.append(grow_layout(self.tensors[name] + layout[0].offset, layout, self.plan, grow_part))
        mixed = torch.tensordot(self.depth[row], torch.stack(wide), 1) if row.stack else wide
        return {made.name: grown * made.factor - layout[0].offset for made, grown in zip(row.grown, mixed, strict=True)}

    def _grow_axis(self, part: Tensor, dim: int, axis: str, stack: str, layer: int) -> Tensor:
        """B times one dimension: [.., n, ..] -> [.., N, ..]."""
        if axis in self.looked_up:
            more = [part.mean(dim, keepdim=True)] * (self.plan.maps[axis].new - part.shape[dim])
            return torch.cat([part, *more], dim)
        matrix = self.width[axis, ""] if (axis, "") in self.width else self.width[axis, stack][layer]
        return torch.tensordot(matrix, part, dims=([1], [dim])).movedim(0, dim)


def _axes(row: Row) -> set[str]:
    return {axis for dim in row.grown[0].layout for part in dim.parts for axis in part}


def _start(axis_map: AxisMap, layers: tuple[int, ...], seed: int, name: str) -> Tensor:
    """B at the start: [.., N, n]."""
    old, shape = torch.from_numpy(np.flatnonzero(axis_map.source >= 0)), (*layers, axis_map.new, axis_map.old)
    drawn = normal(seed, f"ligo/{name}", prod(shape[:-1]), axis_map.old).reshape(shape)
    start = NEW_ROW * axis_map.old**-0.5 * drawn
    start[..., old, :] = axis_map.write * torch.eye(axis_map.old)[axis_map.source[old]]
    return start
