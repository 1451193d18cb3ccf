"""What an optimizer remembers of each tensor, grown as gradients grow: the plan with its roles swapped.

With W' = E_out W C_in and the function preserved, the gradient of the grown tensor is dW' = C_outᵀ dW E_inᵀ. A first
moment is a mean of gradients and grows so; a second moment is one of their squares and grows with squared weights.
What is free in the plan has no gradient that the source knows of, and starts at zero; so does a new block.

Two parts of a gradient are not in the source's, and are left out: what tells new entries from old ones where they hold
the mean under a LayerNorm; and what copies get through a norm where its readers share them unevenly.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from growlib.growth_plan import GrowthPlan, TensorPlan
from growlib.layouts import Part, along, grow_layout
from growlib.maps import AxisMap, Side
from growlib.origin import Origin

Policy = Literal["dual", "keep-old-zero-new", "reset"]

# What optimizers call their moments, and the power of the gradient in them.
POWERS = {
    "exp_avg": 1,  # Adam, AdamW (also fused), Adafactor
    "momentum_buffer": 1,  # SGD, Muon
    "exp_avg_sq": 2,  # Adam, AdamW, Adafactor of vectors
    "max_exp_avg_sq": 2,  # Adam with amsgrad
    "variance": 2,  # torch's Adafactor of vectors
}
NUMBERS = {"step", "RMS"}  # stay as they are


class Factors(NamedTuple):
    """The names of a factored second moment (Adafactor): means over the columns, and over the rows."""

    rows: str
    columns: str
    keeps_dims: bool  # [.., R, 1] and [.., 1, C]; otherwise [.., R] and [.., C]


FACTORS = (Factors("exp_avg_sq_row", "exp_avg_sq_col", False), Factors("row_var", "col_var", True))
KNOWN = {*POWERS, *NUMBERS, *(name for factors in FACTORS for name in factors[:2])}


def grown_moment(made: TensorPlan, moment: Tensor, plan: GrowthPlan, power: int = 1) -> Tensor:
    """A moment of one tensor's gradient, in the shape of the grown tensor.

    Args:
        moment: of the source's tensor, in its shape.
        power: of the gradient that it is a mean of: 1 or 2.
    """
    if not made.layout:
        return moment.clone()
    if not _goes_on(made, plan):
        return moment.new_zeros(made.new_shape)

    tied = made.factor != 1.0  # of a norm's tensors, the next line of a head that is tied to the embedding

    def grow_part(values: Tensor, part: Part) -> Tensor:
        for dim, axis_map, side in part.growing(plan.maps):
            seen, index = _seen(axis_map, side, tied), axis_map.source
            if _reads_mean(axis_map, side, tied):
                values = torch.cat([values, values.mean(dim, keepdim=True)], dim)
                index = np.where(index < 0, axis_map.old, index)
            values = values.index_select(dim, torch.from_numpy(index.clip(0)))
            values = values * along(torch.from_numpy(seen**power).to(values.dtype), dim, values)
        return values

    wide = moment.to(torch.promote_types(moment.dtype, torch.float32))
    return (grow_layout(wide, made.layout, plan, grow_part) / made.factor**power).to(moment.dtype)


def _goes_on(made: TensorPlan, plan: GrowthPlan) -> bool:
    """Whether a tensor does what its source did. After a post-norm layer the new block has the layer's last norm."""
    others = (other for other in plan.tensors if other.source == made.source)
    return made.constant is None and (not made.added or all(o.added or o.constant is not None for o in others))


def _seen(axis_map: AxisMap, side: Side, tied: bool) -> np.ndarray:
    """The gradient of each entry, as a share of that of the entry that it is a copy of: float64 [N].

    What stands behind a norm has the norm's gain: readers see `gain * write`, and writers are seen by `gain * read`.
    A norm whose readers are a tied head is read by all copies alike.
    """
    source, counts = axis_map.source.clip(0), np.maximum(axis_map.copies(), 1)
    old = axis_map.source >= 0
    # Copies together are seen as the one was. Queries are more than that: the score's 1/sqrt(head_dim) shrinks.
    whole = np.bincount(source, np.where(old, axis_map.read, 0.0), axis_map.old) * axis_map.write * axis_map.gain
    read = np.where(old, axis_map.read / np.where(whole == 0, 1.0, whole)[source], 0.0)
    match side:
        case "write":
            return axis_map.gain * read
        case "read":
            return np.where(old, axis_map.gain * axis_map.write, 0.0)
        case "scale":
            return axis_map.write * (np.where(old, 1 / counts[source], 0.0) if tied else read)
        case "shift":
            return np.where(old | _reads_mean(axis_map, side, tied), 1 / counts[source], 0.0) if tied else read


def _reads_mean(axis_map: AxisMap, side: Side, tied: bool) -> bool:
    """Whether a tied head reads the new entries of a norm's bias, as the mean of what it reads of the old ones."""
    return side == "shift" and tied and axis_map.new_writes == "mean"


def kept_moment(made: TensorPlan, moment: Tensor, plan: GrowthPlan, origin: Tensor) -> Tensor:
    """The moment as it was where the source's own values go on; zero everywhere else."""

    def grow_part(values: Tensor, part: Part) -> Tensor:
        for dim, axis_map, _ in part.growing(plan.maps):
            values = values.index_select(dim, torch.from_numpy(axis_map.source.clip(0)))
        return values

    grown = grow_layout(moment, made.layout, plan, grow_part) if made.layout else moment
    return torch.where(origin == Origin.OLD, grown, torch.zeros((), dtype=grown.dtype))


def grown_state(
    made: TensorPlan, state: Mapping[str, object], plan: GrowthPlan, origin: Tensor | None = None
) -> dict[str, object]:
    """An optimizer's state of one tensor. With its `Origin`s old values are kept instead, see `kept_moment`."""

    def grow(moment: Tensor, power: int) -> Tensor:
        if origin is not None:
            return kept_moment(made, moment, plan, origin)
        return grown_moment(made, moment, plan, power)

    grown: dict[str, object] = {name: state[name] for name in NUMBERS & state.keys()}
    for name in POWERS.keys() & state.keys():
        moment = state[name]
        grown[name] = grow(moment, POWERS[name]) if isinstance(moment, Tensor) else moment
    for factors in FACTORS:
        if factors.rows in state:
            rows, columns = state[factors.rows], state[factors.columns]
            assert isinstance(rows, Tensor)
            assert isinstance(columns, Tensor)
            if not factors.keeps_dims:
                rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
            mean = rows.mean(-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
            whole = grow(rows * columns / mean, 2)  # what the factors stand for
            for name, dim in ((factors.rows, -1), (factors.columns, -2)):
                grown[name] = whole.mean(dim, keepdim=factors.keeps_dims)
    return grown
