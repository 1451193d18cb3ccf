"""Why a growth is not known to preserve the function: growths without a proof, and config fields that change it."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from growlib.architectures.schema import RESIDUAL, Architecture, Growth, Verdict, fields_in
from growlib.config import NO_FUNCTION
from growlib.layer_fields import followed, says_the_same
from growlib.maps import AxisMap, LayerMap
from growlib.parts import beside, flat, last_word, value_of

EffectOf = Callable[[str, Any, Any], str]  # (field, old value, new value) -> "acts", "silent" or "unknown"


def of_architecture(
    table: Architecture,
    old: Mapping[str, int],
    new: Mapping[str, int],
    grows: set[str],
    maps: Mapping[str, AxisMap],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
) -> list[str]:
    """What the table says against a growth: its conditions, and growths of an inferred table without a proof."""
    reasons = [
        f"{c.field}={c.value(target)!r}: {c.why}" for c in table.conditions if c.grows in grows and not c.holds(target)
    ]
    if not table.proven:  # a table that tests hold, or one that is being verified
        return reasons
    said = {_without_sizes(axis_map.inexact) for axis_map in maps.values() if axis_map.inexact}
    unproven: dict[str, list[str]] = defaultdict(list)
    for name in sorted(grows):
        kind = Growth.of(name, old[name], new[name]) if name in table.axes else Growth(name, "deeper")
        if name in maps and table.axes[name].role in (*RESIDUAL, "elementwise") and (maps[name].source < 0).any():
            kind = Growth(name, "x1.5")  # new entries beside copies, at whole multiples too
        verdict = table.proven.get(kind, Verdict("refused", "it was not tried"))
        if not verdict.exact and _without_sizes(verdict.why) not in said:
            words = fields_in(table.axes[name].size) if name in table.axes else [name]
            unproven[verdict.why] += [word for word in words if _changes(source, target, word)]
    return reasons + [
        f"growth of {' and '.join(dict.fromkeys(names))} is not proven for {table.model_type}: {why}"
        for why, names in unproven.items()
    ]


def _without_sizes(reason: str) -> str:
    """What a plan says of a tiny model, it says of a large one with other numbers."""
    return re.sub(r"\d+", "", reason)


def _changes(source: PreTrainedConfig, target: PreTrainedConfig, field: str) -> bool:
    old, new = value_of(source, field), value_of(target, field)
    return old != new and not isinstance(old, PreTrainedConfig)


def _follows_layers(key: str, old: Any, new: Any, stack: LayerMap) -> bool:
    """A field that says of each layer that acts what it said of its source, or a name of the last layer."""
    depths = stack.old, len(stack.source)
    if (old, new) in (tuple([n] for n in depths), tuple([f"stage{n}"] for n in depths)):
        return True
    return says_the_same(key, old, new, stack)


def of_config(
    table: Architecture,
    layers: Mapping[str, LayerMap],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
    effect_of: EffectOf,
) -> list[str]:
    """The fields that change and act, or may act. Sizes, and what follows the layers, are accounted for elsewhere."""
    before, after = flat(source), flat(target)
    known = NO_FUNCTION | table.size_fields() | table.free_fields
    moved = copy.deepcopy(before)
    for counted, stack in layers.items():
        own = beside(moved, counted)
        known |= {key for key in own if _follows_layers(last_word(key), before[key], after.get(key), stack)}
        moved |= {key: value for key, value in followed(own, stack.old, stack.source).items() if key not in known}
    reasons = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in known or last_word(key) in NO_FUNCTION or "drop" in key or old == new or moved.get(key) == new:
            continue
        effect = effect_of(key, old, new)
        if effect != "silent":
            told = "which changes the function" if effect == "acts" else "which is not known to be without effect"
            reasons.append(f"{key} changes from {old!r} to {new!r}, {told}")
    return reasons
