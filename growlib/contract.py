"""What the planner asks of the maps that an operator returns: their type and length, and whether they can be exact.

    write · gain · Σ read = 1     for each old entry, over its copies: readers undo what writers and norms do
    write² · copies · n / N = 1   under a norm, which then sees the statistics that it saw

Nothing new may reach an old entry, and what meets in a dot product grows alike. A map that says by itself why it is
not exact is believed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from growlib.architectures.schema import Architecture, Axis, Sizes
from growlib.errors import GrowError
from growlib.maps import AxisMap, LayerMap

CLOSE = 1e-9
# What may be written to new entries that are read: a norm makes zeros of it.
SILENT = {"rms_norm": {"zero"}, "layer_norm": {"mean"}, "unscaled": {"zero", "mean"}}
SUMS_ELSEWHERE = ("experts", "normed_query_heads", "normed_key_heads")  # a router's or a norm's own share


def checked_map(made: Any, method: str, name: str, axis: Axis, old: int, new: int) -> AxisMap:
    """The map of an axis, as an operator returned it. Raises GrowError where it cannot be one."""
    asked = f"the map of axis {name} ({axis.size} {old} -> {new}) by method {method!r}"
    if not isinstance(made, AxisMap):
        raise GrowError(asked, f"the operator returned a {type(made).__name__}", "a growlib.AxisMap")
    source, read = np.asarray(made.source), np.asarray(made.read)
    for what, array, kind in (("source", source, "iu"), ("read", read, "f")):
        if array.shape != (new,) or array.dtype.kind not in kind:
            valid = f"{'int64' if what == 'source' else 'float64'} [{new}]"
            raise GrowError(asked, f"its {what} is {array.dtype} of shape {array.shape}", valid)
    if made.old != old or source.min() < -1 or source.max() >= old:
        wrong = f"it maps {made.old} entries, with sources from {source.min()} to {source.max()}"
        raise GrowError(asked, wrong, f"old={old}, and sources from 0 to {old - 1}, or -1 for a new entry")
    if not np.isfinite([*read, made.write, made.gain, made.tied_gain]).all():
        raise GrowError(asked, "it holds a value that is not finite", "finite numbers")
    if read[source < 0].any():
        wrong = f"new entry {int(np.flatnonzero(read * (source < 0))[0])} has a read of its own"
        raise GrowError(asked, wrong, "read 0 where source is -1; new_reads says what readers hold there")
    return made


def checked_layers(made: Any, method: str, old: int, new: int) -> LayerMap:
    """The map of a stack, as an operator returned it. Raises GrowError where it cannot be one."""
    asked = f"growing {old} layers to {new} by method {method!r}"
    if not isinstance(made, LayerMap):
        raise GrowError(asked, f"the operator returned a {type(made).__name__}", "a growlib.LayerMap")
    lengths = {"source": len(made.source), "identity": len(made.identity), "share": len(made.share) or new}
    wrong = [f"{what} has {length} layers" for what, length in lengths.items() if length != new]
    if made.old != old:
        wrong.append(f"it maps {made.old} layers")
    if not all(0 <= layer < old for layer in made.source):
        wrong.append(f"its sources are {made.source}")
    if wrong:
        raise GrowError(asked, "; ".join(wrong), f"old={old}, and {new} layers with sources from 0 to {old - 1}")
    return made


def broken(table: Architecture, maps: Mapping[str, AxisMap], old: Sizes, new: Sizes) -> list[str]:
    """Why maps that claim to be exact are not, one reason for each axis."""
    reasons = []
    for name, axis_map in maps.items():
        axis = table.axes[name]
        regrouped = axis.groups in maps and not maps[axis.groups].is_identity
        if axis_map.inexact or axis.role in ("", "layers") or (axis_map.is_identity and not regrouped):
            continue
        if why := _entry_fault(axis, axis_map) or _norm_fault(axis, axis_map) or _partner_fault(table, name, maps):
            reasons.append(f"the map of axis {name} ({axis.size} {old[name]} -> {new[name]}) is not exact: {why}")
    return reasons


def _entry_fault(axis: Axis, axis_map: AxisMap) -> str:
    """Whether an old entry is lost or comes out at another size, or a new one reaches an old one; "": none does."""
    if not axis_map.copies().all():
        return f"old entry {axis_map.copies().argmin()} has no copy"
    heard = axis_map.new_reads != "zero" and axis_map.new_writes not in SILENT.get(axis.role, {"zero"})
    if heard and axis.role != "lookup" and (axis_map.source < 0).any():
        return f"new entries are written ({axis_map.new_writes}) and read ({axis_map.new_reads})"
    if axis.role in SUMS_ELSEWHERE:
        return ""
    read = np.bincount(axis_map.source.clip(0), weights=axis_map.read, minlength=axis_map.old)
    product = axis_map.write * axis_map.gain * read
    wanted = (axis_map.new / axis_map.old) ** 0.5 if axis.role.endswith("query") else 1.0
    off = int(abs(product - wanted).argmax())
    fits = abs(product[off] - wanted) <= CLOSE * wanted
    return "" if fits else f"write · gain · Σ read of old entry {off} is {product[off]:.4g}, not {wanted:.4g}"


def _norm_fault(axis: Axis, axis_map: AxisMap) -> str:
    """Whether a norm over the axis sees other statistics; "": it does not."""
    copies, new = axis_map.copies(), bool((axis_map.source < 0).any())
    if axis.role not in ("rms_norm", "layer_norm", "post_layer_norm"):
        return ""
    if len(set(copies)) > 1 or (new and axis.role == "post_layer_norm"):
        return "a norm sees some entries more often than others"
    if new and axis_map.new_writes not in SILENT[axis.role]:
        return f"a norm sees what is written to new entries ({axis_map.new_writes})"
    power = axis_map.write**2 * copies[0] * axis_map.old / axis_map.new
    return "" if abs(power - 1) <= CLOSE else f"a norm sees {power:.4g} times the mean square"


def _partner_fault(table: Architecture, name: str, maps: Mapping[str, AxisMap]) -> str:
    """Whether queries and keys, or query heads and their KV heads, grow apart; "": they do not."""
    axis, axis_map = table.axes[name], maps[name]
    if axis.groups in maps and axis.role == "query_heads":
        kv = maps[axis.groups]
        group, new_group = axis_map.old // kv.old, axis_map.new // kv.new
        apart = (axis_map.source >= 0) & (axis_map.source // group != kv.source[np.arange(axis_map.new) // new_group])
        return f"query head {int(apart.argmax())} is not beside its KV head" if apart.any() else ""
    if not axis.role.endswith("query"):
        return ""
    places = np.arange(axis_map.new) * axis_map.old - axis_map.source * axis_map.new
    if "rotary" in axis.role and places[axis_map.source >= 0].any():
        return "a rotary pair is not at the place of its frequency"
    key = next((n for n, a in table.axes.items() if (a.role, a.size) == (axis.role[:-5] + "key", axis.size)), None)
    if key is None or key not in maps:
        return ""
    if not np.array_equal(axis_map.source, maps[key].source):
        return f"its entries are not where those of axis {key} are, which they meet in a dot product"
    fills = (axis_map.new_writes, maps[key].new_writes)
    heard = (axis_map.source < 0).any() and "zero" not in fills and "faint" not in fills
    return "new queries meet new keys in a dot product" if heard else ""
