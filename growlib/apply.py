"""The loop that turns a plan and the source's tensors into the grown tensors. It knows no method, no architecture.

Each tensor grows by the one rule W' = E_out W C_in + F, where F holds values that the rule leaves free: columns
that read zeros, and noise that cancels over the copies of an entry (F E = 0), so that copies do not stay equal.
Means are the source's: what is drawn has no share in them.

A tensor is made some rows at a time: what stands in between stays in the cache, and takes no memory to speak of.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from growlib.averages import deviation, mean_along
from growlib.choice import Choice, Copies
from growlib.free_values import FreeValues, scaled
from growlib.growth_plan import GrowthPlan, TensorPlan
from growlib.layouts import Part, along, by_axes, grow_layout, read_own
from growlib.maps import FILLINGS, AxisMap, Side, copy_numbers

BLOCK = 1 << 20  # values at once: 4 MB in float32


def apply(plan: GrowthPlan, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of the grown model, in the dtype and on the device of its source."""
    for made in plan.tensors:
        source = tensors[made.source] if made.source else torch.zeros(made.old_shape)
        following, weigher = (tensors[name] if name else None for name in (made.following, made.weigher))
        yield made.name, grow_tensor(made, source, plan, following, weigher)


def grow_tensor(
    made: TensorPlan,
    source: Tensor,
    plan: GrowthPlan,
    following: Tensor | None = None,
    weigher: Tensor | None = None,
    empty: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """Grow one tensor: float32 arithmetic (float64 for float64 sources), the source's dtype.

    `following` is the same tensor of the next layer, for tensors that take from it; `weigher` [rows] scales what this
    tensor writes, so that its mean row is the mean of rows that are weighed so. `empty` makes the memory.
    """
    kept, source = source.dtype, source.detach()
    if not made.layout:  # a single number
        return source.clone()
    wide = torch.promote_types(kept, torch.float32)
    axes = {axis for dim in made.layout for part in dim.parts for axis in part}
    grows = any(axis in plan.maps and not plan.maps[axis].is_identity for axis in axes)
    # What stays is left bit for bit: 1 + w - 1 is not w.
    offset = made.layout[0].offset if grows or made.constant is not None or made.factor != 1.0 else 0.0
    later = None if following is None else following.detach().to(source.device)
    if later is not None and made.share:
        source = torch.lerp(source.to(wide), later.to(wide), made.share)
    rule = _Rule(made.name, plan, source, wide, _shares(weigher, made.weigher_gain), empty)
    if made.constant is not None:
        values, later, noise = source.new_full((), made.constant, dtype=wide).expand(source.shape), None, 0.0
    else:
        values, noise = source.to(wide) + offset if offset else source, made.noise
    taken = None if later is None else _from_next(made, plan)
    if taken is None and not noise:
        return grow_layout(values, made.layout, plan, partial(_grow_part, rule, _Ending(kept, made.factor, offset)))
    grow_part = partial(_grow_part, rule, _Ending(wide))
    grown = grow_layout(values, made.layout, plan, grow_part)
    if taken is not None and later is not None:
        further = later.to(wide) + offset if offset else later
        grown = torch.where(taken.to(grown.device), grow_layout(further, made.layout, plan, grow_part), grown)
    return _with_noise(grown, rule, noise, _Ending(kept, made.factor, offset))


def _shares(weigher: Tensor | None, gain: float) -> Tensor | None:
    """What rows weigh in their mean where weights w scale them, of which a new entry has gain times the mean."""
    if weigher is None:
        return None
    weights = weigher.detach().double()
    mean = weights.mean().item() * gain
    return weights / mean if mean else None


@dataclass(frozen=True)
class _Rule:
    """What the growth of one tensor depends on, beside its values."""

    name: str
    plan: GrowthPlan
    source: Tensor
    wide: torch.dtype  # of the arithmetic
    shares: Tensor | None = None  # of each row in the mean row: float64 [rows]
    empty: Callable[..., Tensor] = torch.empty

    @cached_property
    def width(self) -> float:
        """The deviation of the source, which free values have too."""
        width = deviation(self.source)
        # An all-zero matrix still needs free values that differ.
        return self.plan.initializer_range if self.source.ndim > 1 and width == 0 else width

    def drawn(self, key: str, rows: np.ndarray, first: int, last: int, amplitude: float | None = None) -> Tensor:
        """Free values of some rows, columns `first` to `last`: `amplitude` deviations of the source wide, or 1."""
        table = None if amplitude is None else scaled(amplitude * self.width, self.wide)
        values = FreeValues(self.plan.seed, f"{self.name}/{key}").normals(rows, first, last, table)
        return torch.from_numpy(values).to(self.source.device, self.wide)


@dataclass(frozen=True)
class _Ending:
    """What comes after the growth: W' = (grown * factor - offset), in a dtype."""

    dtype: torch.dtype
    factor: float = 1.0
    offset: float = 0.0

    def write(self, values: Tensor, out: Tensor) -> None:
        """Into `out`; the values are used up."""
        if self.factor != 1.0:
            values.mul_(self.factor)
        if self.offset:
            values.sub_(self.offset)
        out.copy_(values)


def _with_noise(grown: Tensor, rule: _Rule, noise: float, ending: _Ending) -> Tensor:
    """The grown tensor with noise on all of its values, `noise` deviations of the source wide."""
    out = torch.empty_like(grown, dtype=ending.dtype)
    rows, into = grown.reshape(-1, grown.shape[-1]), out.view(-1, grown.shape[-1])
    step = max(BLOCK // max(grown.shape[-1], 1), 1)
    for start in range(0, len(rows), step):
        block = rows[start : start + step].clone()
        if noise:
            numbers = np.arange(start, start + len(block))
            block += rule.drawn("noise", numbers, 0, block.shape[1]) * (noise * rule.width)
        ending.write(block, into[start : start + step])
    return out


def _from_next(made: TensorPlan, plan: GrowthPlan) -> Tensor | None:
    """Which entries the next layer's tensor gives: bool [new shape]; None where it gives none."""
    axes = {axis for dim in made.layout if dim.side == "write" for part in dim.parts for axis in part}
    if not any(axis in plan.maps and plan.maps[axis].from_next for axis in axes):
        return None

    def mark(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        axis_map = plan.maps[axis]
        part = part.index_select(dim, torch.from_numpy(axis_map.source.clip(0)))
        further = torch.from_numpy(copy_numbers(axis_map.source) > 0)
        return part | along(further, dim, part) if side == "write" and axis_map.from_next else part

    return grow_layout(torch.zeros(made.old_shape, dtype=torch.bool), made.layout, plan, by_axes(plan, mark))


class _Step:
    """The growth of one dimension of a part: what is the same for all of its rows."""

    def __init__(self, dim: int, axis_map: AxisMap, side: Side, like: Tensor) -> None:
        self.dim, self.axis_map, self.side = dim, axis_map, side
        new = axis_map.source < 0
        self.has_mean = axis_map.fill(side) in ("mean", "free") and bool(new.any())
        self.index = np.where(new, axis_map.old if self.has_mean else 0, axis_map.source)
        self.choice = Choice(self.index)
        self.scale = torch.from_numpy(_scale(axis_map, side)).to(like)
        self.scales = bool((self.scale != 1.0).any())
        self.zero = new & (axis_map.fill(side) in ("zero", "faint"))
        self.amplitude = _amplitude(axis_map, side)
        drawn = np.flatnonzero(self.amplitude)
        self.low, self.high = (int(drawn[0]), int(drawn[-1]) + 1) if len(drawn) else (0, 0)
        self.centred = side == "read" and bool(axis_map.copy_noise)
        widths = self.amplitude[drawn]
        even = not self.centred and len(drawn) == self.high - self.low > 0 and np.ptp(widths) == 0
        self.even = float(widths[0]) if even else None  # the amplitude of all that is drawn, where it is one

    @cached_property
    def copies(self) -> Copies:
        return Copies(self.axis_map.source[self.low : self.high])


def _grow_part(rule: _Rule, ending: _Ending, values: Tensor, part: Part) -> Tensor:
    """Grow the axes of one part, [n, m, ..] -> [N, M, ..]."""
    like = torch.empty(0, dtype=rule.wide, device=values.device)
    steps = [_Step(*growing, like) for growing in part.growing(rule.plan.maps)]
    if not steps and (ending.dtype, ending.factor, ending.offset) == (values.dtype, 1.0, 0.0):
        return values.clone(memory_format=torch.contiguous_format)
    sizes = list(values.shape)
    for step in steps:
        sizes[step.dim] = step.axis_map.new
    out = rule.empty(sizes, dtype=ending.dtype, device=values.device)
    weighed = values if rule.shares is None else values * along(rule.shares, 0, values)
    mean = next((mean_along(weighed, 0, rule.wide) for step in steps if step.dim == 0 and step.has_mean), None)
    # Dimensions that all lie in the tensor's last one are drawn as one row.
    count = max(BLOCK // max(prod(sizes[1:]), 1), 1) if part.leading else max(sizes[0], 1)
    for start in range(0, sizes[0], count):
        at = np.arange(start, min(start + count, sizes[0]))
        rows = slice(start, start + count)
        block = _Rows(rule, part, steps, at).grow(values, mean)
        ending.write(read_own(block, part, rule.plan.maps, rows=rows), out[rows])
    return out


class _Rows:
    """Some rows of a grown part: the entries `at` of its first dimension."""

    def __init__(self, rule: _Rule, part: Part, steps: list[_Step], at: np.ndarray) -> None:
        self.rule, self.part, self.steps, self.at = rule, part, steps, at
        self.old = next((step.axis_map.old for step in steps if step.dim == 0), None)
        # Which entries the rows stand for: until the first dimension grows, those of the source.
        self.numbers = next((step.index[at] for step in steps if step.dim == 0), at)
        self.means = {step.dim for step in steps if step.has_mean}  # dimensions whose last entry is a mean

    def grow(self, values: Tensor, mean: Tensor | None) -> Tensor:
        """The values of the rows, from those of all of the source's, and the mean over these."""
        block = self._of_source(values, mean)
        for step in self.steps:
            scale, zero = step.scale, step.zero
            if step.dim == 0:
                self.numbers, scale, zero = self.at, scale[self.at[0] : self.at[-1] + 1], zero[self.at]
            else:
                block = step.choice(block, step.dim)
            self.means -= {step.dim}
            if step.scales:
                block = block.mul_(along(scale, step.dim, block))
            if zero.any():
                block.index_fill_(step.dim, torch.from_numpy(np.flatnonzero(zero)).to(block.device), 0.0)
            if step.high and self.rule.width:
                self._add_drawn(block, step)
        return block

    def _of_source(self, values: Tensor, mean: Tensor | None) -> Tensor:
        """The source's rows, each mean behind what it is the mean of, in the dtype of the arithmetic."""
        is_mean = self.numbers == self.old if mean is not None else np.zeros(len(self.at), dtype=bool)
        rows = Choice(np.where(is_mean, 0, self.numbers))(values, 0)
        sizes = [length + (dim in self.means and dim > 0) for dim, length in enumerate(rows.shape)]
        whole = torch.empty(sizes, dtype=self.rule.wide, device=rows.device)
        block = whole[tuple(map(slice, rows.shape))].copy_(rows)
        if mean is not None and is_mean.any():
            block[torch.from_numpy(is_mean)] = mean
        for dim in sorted(self.means - {0}):
            so_far = [n if d <= dim or d not in self.means else n - 1 for d, n in enumerate(sizes)]
            filled = whole[tuple(map(slice, so_far))]
            filled.narrow(dim, sizes[dim] - 1, 1).copy_(mean_along(filled.narrow(dim, 0, sizes[dim] - 1), dim))
        return whole

    def _add_drawn(self, block: Tensor, step: _Step) -> None:
        """Add what is drawn for one dimension, whose entries `low` to `high` have an amplitude."""
        low, high, numbers = step.low, step.high, self.numbers
        if step.dim == 0:
            low, high = max(low, int(self.at[0])), min(high, int(self.at[-1]) + 1)
            if low >= high:
                return
            numbers = np.arange(low, high)
            block = block[low - int(self.at[0]) : high - int(self.at[0])]
        lengths = [length - (dim in self.means) for dim, length in enumerate(block.shape)]
        if step.dim == 0 and step.centred:
            source = step.axis_map.source
            others = np.flatnonzero(np.isin(source, source[numbers]) & (source >= 0)) if self.part.leading else numbers
            needed = np.union1d(others, numbers)
            drawn = Copies(source[needed]).centred(self._drawn(step, needed, [len(needed), *lengths[1:]]), 0)
            drawn = drawn[torch.from_numpy(np.searchsorted(needed, numbers))]
        else:
            lengths[0] = len(numbers)
            drawn = self._drawn(step, numbers, lengths)
            if step.centred:
                drawn = step.copies.centred(drawn, step.dim)
        if 0 in self.means:  # what stands for a mean is not drawn
            drawn[torch.from_numpy(numbers == self.old)] = 0.0
        for dim in self.means - {0}:
            block = block.narrow(dim, 0, lengths[dim])
        if step.dim:
            block = block.narrow(step.dim, low, high - low)
        if not step.even:
            drawn.mul_(along(torch.from_numpy(step.amplitude[low:high] * self.rule.width).to(drawn), step.dim, drawn))
        block.add_(drawn)

    def _drawn(self, step: _Step, numbers: np.ndarray, lengths: list[int]) -> Tensor:
        """Free values of the entries `numbers` of the first dimension, `low` to `high` of the step's, all of others."""
        dim, leading = step.dim, self.part.leading
        key = f"{self.part.path}{dim}"
        rows = numbers if leading else np.zeros(1, dtype=np.int64)
        for d in range(1, leading):
            entries = np.arange(step.low, step.high) if d == dim else np.arange(lengths[d])
            rows = (rows[:, None] * lengths[d] + entries).ravel()
        inner = prod(lengths[leading + 1 :])
        first, last = 0, inner * (len(numbers) if not leading and dim == 0 else lengths[leading])
        if dim == leading:
            first, last = step.low * inner, step.high * inner
        drawn = self.rule.drawn(key, rows, first, last, step.even)
        if dim <= leading and dim:
            lengths = [*lengths[:dim], step.high - step.low, *lengths[dim + 1 :]]
        drawn = drawn.view(lengths)
        return drawn.narrow(dim, step.low, step.high - step.low) if dim > leading else drawn


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
