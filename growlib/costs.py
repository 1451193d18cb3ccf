"""What a growth costs: parameters, FLOPs, memory and disk, before and after; read off its plan."""

from math import prod

import torch
from transformers import PreTrainedConfig

from growlib.checkpoint.loading import dtype_of
from growlib.growth_plan import GrowthPlan, Shape
from growlib.layouts import Layout
from growlib.parts import flat

ADAM = 16  # bytes per parameter of a training in float32: weight, gradient, two moments


def sizes_that_stay(plan: GrowthPlan) -> dict[str, int]:
    """The whole numbers of the config that say a size and do not change."""
    before, after = flat(plan.source), flat(plan.config)
    sizes = set(plan.old_sizes.values())
    return {
        field: size
        for field, size in before.items()
        if type(size) is int and size in sizes and after.get(field) == size and not field.endswith("_token_id")
    }


def cost_table(plan: GrowthPlan) -> list[tuple[str, str, str]]:
    """Rows of (what, before, after), a heading first."""
    old = {made.source: (made.layout, made.old_shape) for made in plan.tensors if made.source}
    dtype = _dtype(plan.source)
    before = _costs(list(old.values()), plan, plan.source, dtype)
    after = _costs(_grown(plan), plan, plan.config, dtype_of(plan.dtype) or dtype)
    return [("", "before", "after"), *((what, before[what], after[what]) for what in before)]


def bytes_of(plan: GrowthPlan, dtype: torch.dtype | str | None = None) -> int:
    """What the grown model takes on disk or in memory, in a dtype; by default the plan's, or its config's."""
    wanted = dtype_of(dtype) or dtype_of(plan.dtype) or _dtype(plan.config)
    return wanted.itemsize * parameters_of(plan)


def parameters_of(plan: GrowthPlan) -> int:
    """How many values the grown model has."""
    return sum(prod(shape) for _, shape in _grown(plan))


def _grown(plan: GrowthPlan) -> list[tuple[Layout, Shape]]:
    """The layout and the shape of each tensor of the grown model; of a mixture's own no layout is known."""
    if not plan.mixture:
        return [(made.layout, made.new_shape) for made in plan.tensors]
    used = {source for made in plan.mixture.tensors for source in made.sources}
    dense = [(made.layout, made.new_shape) for made in plan.tensors if made.name not in used]
    return dense + [((), made.shape) for made in plan.mixture.tensors]


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _costs(
    tensors: list[tuple[Layout, Shape]], plan: GrowthPlan, config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, str]:
    tied = bool(getattr(config, "tie_word_embeddings", False))
    count = sum(prod(shape) for _, shape in tensors)
    acting = sum(prod(shape) * _share(layout, shape, plan, tied) for layout, shape in tensors if len(shape) > 1)
    return {
        "parameters": f"{count:,}",
        "FLOPs per token of training (6 per weight that multiplies)": f"{6 * acting:.3g}",
        "memory for training with AdamW in float32": _bytes(ADAM * count),
        "room on disk": f"{_bytes(dtype.itemsize * count)} ({str(dtype).removeprefix('torch.')})",
    }


def _share(layout: Layout, shape: Shape, plan: GrowthPlan, tied: bool) -> float:
    """The share of a tensor that multiplies with each token: none of a lookup, of experts those that act."""
    read = {axis for dim in layout if dim.side == "read" for part in dim.parts for axis in part}
    if looked_up := {axis for axis in read if plan.roles.get(axis) == "lookup"}:
        return float(tied and "vocab" in looked_up)  # a tied embedding is the head too
    if not layout and plan.mixture and len(shape) == 3:
        return plan.mixture.per_token / plan.mixture.experts
    experts = next((axis for axis in read | {"experts"} if plan.roles.get(axis) in ("experts", "gated_experts")), "")
    if experts and len(shape) == 3:
        sizes = plan.new_sizes if shape[0] == plan.new_sizes[experts] else plan.old_sizes
        return sizes.get("per_token", sizes[experts]) / sizes[experts]
    return 1.0


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
