"""What shapes and interventions cannot tell: a short list of tables that differ in one fact each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product

from transformers import PreTrainedConfig

from growlib.architectures.schema import Architecture, Axis, size_of
from growlib.layouts import Dim, Layout
from growlib.maps import Side
from growlib.parts import text_part, value_of

ROTARY_SHARES = (
    "partial_rotary_factor",
    "rope_parameters.partial_rotary_factor",
    "rotary_pct",
    "rotary_dim",
    "rope_dim",
)


def of_hidden(table: Architecture, config: PreTrainedConfig) -> Iterator[tuple[str, Architecture]]:
    """Whether the class scales its embeddings or its head by the width, and whether heads may grow with the width."""
    hidden = table.axes["hidden"].size
    others = {name: wide for name, wide in table.follows.items() if wide != hidden}
    same = {n: hidden for n in table.follows.keys() - others if value_of(config, n) == value_of(config, hidden)}
    heads = dict.fromkeys(table.follows.keys() - others - same.keys(), hidden)
    scales = {"": (0.0, 0.0), ", embeddings times sqrt(hidden)": (0.5, 0.0), ", head over sqrt(hidden)": (0.0, -0.5)}
    for (name, powers), follows in product(scales.items(), (same | heads, same) if heads else (same,)):
        told = "heads grow with it" if follows != same else "heads stay"
        yield (
            told + name,
            replace(table, embedding_power=powers[0], head_power=powers[1], follows=others | follows),
        )


def of_stream(table: Architecture) -> Iterator[tuple[str, Callable[[Architecture], Architecture]]]:
    """For each row that reads the residual stream or scales it: that it reads what a norm made of it, or adds to it."""
    for row, layout in table.tensors.items():
        raw = [dim for dim in layout if dim.parts == (("raw",),)]
        if raw and raw[0].side == "read":
            yield f"{row} reads what a norm gave", partial(_with_row, row=row, layout=_on_hidden(layout, "read"))
        elif raw and len(layout) == 1:
            yield f"{row} is added", partial(_with_row, row=row, layout=_on_hidden(layout, "write"))


def _on_hidden(layout: Layout, side: Side) -> Layout:
    return tuple(Dim((("hidden",),), side) if dim.parts == (("raw",),) else dim for dim in layout)


def _with_row(table: Architecture, row: str, layout: Layout) -> Architecture:
    return replace(table, tensors={**table.tensors, row: layout})


def of_experts(table: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Whether the router's weights depend on one another."""
    for role, told in (("experts", "weights are shares of a whole"), ("gated_experts", "each weight is its own")):
        routed = {n: replace(a, role=role) if a.per_token else a for n, a in table.axes.items()}
        yield told, replace(table, axes=routed)


def of_pairs(table: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Whether the two halves of a gated map, such as gate and up, lie one after the other or interleaved."""
    for by in (False, True):
        rows = {row: tuple(_paired(dim, by) for dim in layout) for row, layout in table.tensors.items()}
        yield "gate and up interleaved" if by else "gate, then up", replace(table, tensors=rows)


def _paired(dim: Dim, by: bool) -> Dim:
    twice = len(dim.parts) > 1 and len(set(dim.parts)) == 1 and len(dim.parts[0]) == 1
    return replace(dim, by=dim.parts[0][0]) if twice and by else dim


def of_head_dim(table: Architecture, config: PreTrainedConfig) -> Iterator[tuple[str, Architecture]]:
    """How queries and keys are rotated and whether their product is scaled by 1/sqrt(head_dim)."""
    text = text_part(config)
    queries = [name for name, axis in table.axes.items() if axis.role == "query"]
    for scaled_by in ("", "never"):
        axes = {n: replace(a, scaled_by=scaled_by) if n in queries else a for n, a in table.axes.items()}
        plain = replace(table, axes=axes)
        scale = "scores over sqrt(head_dim)" if not scaled_by else "scores of a fixed scale"
        yield f"no rotation, {scale}", plain
        named = [f"{text}.{share}" if text else share for share in ROTARY_SHARES]
        shares = [share for share in named if size_of(share, config) not in (None, 1.0)]
        for halves_first, share in product((True, False), (*shares, None)):
            pairs = "rotated by halves" if halves_first else "rotated by neighbours"
            of_it = f", {share} of it" if share else ""
            yield f"{pairs}{of_it}, {scale}", _rotated(plain, halves_first, share)


def _rotated(table: Architecture, halves_first: bool, share: str | None) -> Architecture:
    """The table with each query and key axis split into rotary pairs, and a rest where a share is not rotated."""
    axes: dict[str, Axis] = {}
    scaled = [layout[0].parts[0] for layout in table.tensors.values() if layout and layout[0].side == "scale"]
    for name, axis in table.axes.items():
        if axis.role not in ("query", "key"):
            axes[name] = axis
            continue
        normed = "normed_" if any(name in part for part in scaled) else ""
        turned = replace(axis, role=f"{normed}rotary_{axis.role}", size=f"{axis.size} / 2")
        if share and share.endswith("_dim"):
            turned = replace(axis, role="", size=f"{share} / 2")
            axes[f"{name}_rest"] = replace(axis, size=f"{axis.size} - {share}")
        elif share:
            turned = replace(turned, size=f"{axis.size} * {share} / 2")
            axes[f"{name}_rest"] = replace(axis, size=f"{axis.size} - {axis.size} * {share}")
        axes[name] = turned
    axes["half"] = Axis("2")
    rows = {
        row: tuple(_rotated_dim(dim, table.axes, halves_first, bool(share)) for dim in layout)
        for row, layout in table.tensors.items()
    }
    return replace(table, axes=axes, tensors=rows)


def _rotated_dim(dim: Dim, axes: Mapping[str, Axis], halves_first: bool, partial: bool) -> Dim:
    parts: list[tuple[str, ...]] = []
    for part in dim.parts:
        *outer, last = part
        if last not in axes or axes[last].role not in ("query", "key"):
            parts.append(part)
            continue
        parts.append((*outer, "half", last) if halves_first else (*outer, last, "half"))
        if partial:
            parts.append((*outer, f"{last}_rest"))
    by = dim.by
    if partial and len(parts) > len(dim.parts) and not by:
        by = parts[0][0] if len(dim.parts) == 1 and len(parts[0]) > 2 else ""
    return replace(dim, parts=tuple(parts), by=by)
