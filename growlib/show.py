"""A plan as a table: for each tensor, which share of it comes from where."""

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from growlib.axes import AxisMap, LayerMap, copy_numbers, own_blocks
from growlib.families.schema import Side

if TYPE_CHECKING:
    from growlib.plan import Entry, GrowthPlan

# Kinds of entries, each outranked by those before it: a zero row stays zero whatever its columns are.
KINDS = {"zero": "·", "new": "░", "mean": "▒", "next": "▚", "shared": "▓", "copied": "█"}
LEGEND = "█ copied   ▓ shared among copies   ▚ of the next layer   ▒ mean   ░ new   · zero"
BAR = 24


def axis_kinds(axis_map: AxisMap, side: Side, following: bool = False, own: bool = False) -> np.ndarray:
    """The share of an axis at each rank of KINDS: float [6]. `following`: the tensor has a twin in the next layer;
    `own`: each copy is read by one of its own."""
    names = list(KINDS)
    new = {
        "read": {"free": "new", "zero": "zero"}[axis_map.new_reads],
        "write": {"free": "new", "faint": "new", "zero": "zero", "mean": "mean"}[axis_map.new_writes],
        "scale": {"free": "mean", "zero": "zero"}[axis_map.new_scale],
        "shift": axis_map.new_shift,
    }[side]
    several = axis_map.copies()[axis_map.source.clip(0)] > 1
    kind = np.where(several & (side == "read") & (not own), names.index("shared"), names.index("copied"))
    kind = np.where(axis_map.source < 0, names.index(new), kind)
    if side == "write" and axis_map.from_next and following:
        kind = np.where(copy_numbers(axis_map.source) > 0, names.index("next"), kind)
    return np.bincount(kind, minlength=len(names)) / len(kind)


def entry_kinds(plan: "GrowthPlan", entry: "Entry") -> np.ndarray:
    """The share of a tensor at each rank of KINDS: float [6]."""
    shares = np.zeros(len(KINDS))
    lengths = [[np.prod([plan.new_sizes.get(a, 1) for a in part]) for part in dim.parts] for dim in entry.layout]
    for part in range(max(len(dim.parts) for dim in entry.layout)):
        # Axes are independent, so the share of entries at least at a rank is a product over the axes.
        at_least, weight = np.ones(len(KINDS)), 1.0
        axes = [(axis, dim.side) for dim in entry.layout for axis in dim.parts[part if len(dim.parts) > 1 else 0]]
        blocks = [copies for _, _, copies in own_blocks(axes, plan.maps)]
        for dim, length in zip(entry.layout, lengths, strict=True):
            chosen = part if len(dim.parts) > 1 else 0
            weight *= length[chosen] / sum(length)
            for axis in dim.parts[chosen]:
                if axis in plan.maps:
                    kinds = axis_kinds(plan.maps[axis], dim.side, bool(entry.following), bool(blocks))
                    at_least *= np.cumsum(kinds[::-1])[::-1]
        at_least[1:] /= np.prod(blocks)  # off the diagonal of blocks there is nothing
        shares += weight * (at_least - np.append(at_least[1:], 0.0))
    return shares


def bar(shares: np.ndarray) -> str:
    """Shares as BAR characters, the copied first; a share that is not zero shows."""
    counts = np.where(shares > 0, np.maximum(1, np.floor(shares * BAR)), 0).astype(int)
    counts[np.argmax(counts)] += BAR - counts.sum()
    return "".join(char * count for char, count in reversed(list(zip(KINDS.values(), counts, strict=True))))


def plan_table(plan: "GrowthPlan") -> str:
    """The whole plan. Layers that grow alike share their lines."""
    verdict = "exact" if plan.exact else "not exact: " + "; ".join(plan.reasons)
    sizes = [
        f"  {name:<10} {plan.old_sizes[name]:>7} -> {new}"
        for name, new in plan.new_sizes.items()
        if new != plan.old_sizes[name]
    ]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for entry in plan.entries:
        name, layer = _split_layer(entry.name)
        old, new = ("x".join(map(str, shape)) for shape in (entry.old_shape, entry.new_shape))
        fill = "" if entry.constant is None else f"  set to {entry.constant:g}"
        drawn = bar(entry_kinds(plan, entry)) + fill
        groups[name, f"{old} -> {new}", drawn].append(layer)
    width = max(len(name) for name, _, _ in groups)
    shapes = max(len(shape) for _, shape, _ in groups)
    rows = [
        f"  {name:<{width}}  {shape:<{shapes}}  {drawn}" + (f"  layers {_ranges(layers)}" if layers[0] else "")
        for (name, shape, drawn), layers in groups.items()
    ]
    layers = [f"  {name:<10} {' '.join(_layer_names(stack))}" for name, stack in plan.layers.items()]
    then = [f"  {plan.mixture}"] if plan.mixture else []
    return "\n".join([f"{plan.method}, seed {plan.seed}: {verdict}", *sizes, *layers, *then, "", LEGEND, *rows])


def _layer_names(stack: LayerMap) -> list[str]:
    share = stack.share or (0.0,) * len(stack.source)
    return [f"{s + p:.3g}{'*' if i else ''}" for s, p, i in zip(stack.source, share, stack.identity, strict=True)]


def _split_layer(name: str) -> tuple[str, str]:
    words = name.split(".")
    layer = next((word for word in words if word.isdigit()), "")
    return ".".join("*" if word == layer else word for word in words) if layer else name, layer


def _ranges(layers: list[str]) -> str:
    return ",".join(layers) if len(layers) < 4 else f"{layers[0]}..{layers[-1]} ({len(layers)})"
