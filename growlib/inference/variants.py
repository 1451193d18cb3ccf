"""What shapes and interventions cannot tell: a short list of tables that differ in one fact each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

from transformers import PreTrainedConfig

from growlib.architectures.schema import Architecture, Axis, Stack, size_of
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
    scales = {
        "": (0.0, 0.0),
        ", embeddings times sqrt(hidden)": (0.5, 0.0),
        ", head over sqrt(hidden)": (0.0, -0.5),
        ", head over hidden": (0.0, -1.0),
    }
    for (name, powers), follows in product(scales.items(), (same | heads, same) if heads else (same,)):
        told = "heads grow with it" if follows != same else "heads stay"
        yield (
            told + name,
            replace(table, embedding_power=powers[0], head_power=powers[1], follows=others | follows),
        )


def of_stream(table: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Tables in which one row stands elsewhere on the residual stream than it seems to.

    It reads what a norm gave, is added and scales nothing or the other way round, scales what another row writes
    (LayerScale), is a convolution of each channel; or an axis of the width gates what a norm gave.
    """
    scales = [n for n, dims in table.tensors.items() if len(dims) == 1 and dims[0] == Dim((("raw",),), "scale")]
    scales = [row for row in scales if not _is_norm(table, row)]
    for stack in table.stacks:
        own = [row for row in scales if row.startswith(stack.block)]
        if own and len(own) == len(stack.writers):
            weighed = {row: w for s, w in zip(stack.writers, own, strict=True) for row in _rows_of(table, stack, s)}
            yield f"{' and '.join(own)} scale what is written, in their order", replace(table, weighed=weighed)
    for row, layout in table.tensors.items():
        raw = [dim for dim in layout if dim.parts == (("raw",),)]
        if raw and raw[0].side == "read":
            yield f"{row} reads what a norm gave", _with_row(table, row, _on(layout, "hidden", "read"))
        elif raw and len(layout) == 1 and not _is_norm(table, row):
            yield f"{row} is added", _with_row(table, row, _on(layout, "hidden", "write"))
            yield from _scaling(table, row)
        elif layout and layout[0] == Dim((("hidden",),), "write") and len(layout) == 1 and not row.endswith(".bias"):
            yield f"{row} scales", _with_row(table, row, _on(layout, "raw", "scale"))
        elif len(layout) > 2 and layout[0] == Dim((("hidden",),), "write") and len({d.parts for d in layout[1:]}) == 1:
            yield f"{row} acts on each channel", _with_row(_channels(table), row, _on(layout, "channel", "write"))
    width = table.axes["hidden"].size
    for name, axis in table.axes.items():
        if axis.role == "elementwise" and axis.size == width and name != "channel":
            yield f"{name} gates what a norm gave", _gating(table, name)


def _is_norm(table: Architecture, row: str) -> bool:
    """Whether a scale has a shift beside it."""
    beside = [table.tensors.get(f"{row.rpartition('.')[0]}.bias", ())]
    return any(layout and layout[0].side == "shift" for layout in beside)


def _scaling(table: Architecture, row: str) -> Iterator[tuple[str, Architecture]]:
    """The row scales what one of a block's writers writes."""
    for stack in table.stacks:
        for writer in stack.writers if row.startswith(stack.block) else ():
            rows = _rows_of(table, stack, writer)
            changed = {name: scale for name, scale in table.weighed.items() if scale != row} | dict.fromkeys(rows, row)
            yield f"{row} scales what {writer} writes", replace(table, weighed=changed)


def _rows_of(table: Architecture, stack: Stack, module: str) -> list[str]:
    return [row for row in table.tensors if row.startswith(f"{stack.block}{module}.")]


def _channels(table: Architecture) -> Architecture:
    """The table with an axis for what acts on each channel of the stream by itself."""
    return replace(table, axes={**table.axes, "channel": Axis(table.axes["hidden"].size, "elementwise")})


def _gating(table: Architecture, name: str) -> Architecture:
    """What reads the axis reads the width, and what writes it acts on each channel."""
    rows = {}
    for row, layout in table.tensors.items():
        rows[row] = tuple(
            dim if dim.parts != ((name,),) else Dim((("hidden" if dim.side == "read" else "channel",),), dim.side)
            for dim in layout
        )
    made = replace(_channels(table), tensors=rows)
    left = {axis for layout in rows.values() for dim in layout for part in dim.parts for axis in part}
    return replace(made, axes={n: axis for n, axis in made.axes.items() if n != name or n in left})


def _on(layout: Layout, axis: str, side: Side) -> Layout:
    """The layout with another axis where the stream is."""
    return tuple(Dim(((axis,),), side) if dim.parts in ((("raw",),), (("hidden",),)) else dim for dim in layout)


def _with_row(table: Architecture, row: str, layout: Layout) -> Architecture:
    used = {**table.axes}
    if layout[0].parts == (("raw",),):
        used.setdefault("raw", Axis(table.axes["hidden"].size, "unscaled"))
    return replace(table, tensors={**table.tensors, row: layout}, axes=used)


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
