"""From the layouts of a draft to a table: which field says how long an axis is, what follows what, what to zero."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from growlib.architectures.schema import Architecture, Axis, Stack, fields_in
from growlib.errors import GrowError
from growlib.growth_plan import Skeleton
from growlib.inference.draft import FIXED, Draft, feeds, head_norm_of, is_hidden, is_post_norm, norm_after
from growlib.inference.sizes import Build, choose
from growlib.inference.tiny import same_width
from growlib.layouts import Dim
from growlib.parts import flat, value_of


def table_of(state: Draft, base: Skeleton, others: list[Build]) -> Architecture:
    if any(axis == "raw" for layout in state.rows.values() for d in layout for p in d.parts for axis in p):
        state.sizes["raw"] = state.hidden
    hints = {"hidden": "hidden", "raw": "hidden", "vocab": "vocab", "positions": "positions", **state.hints}
    # A field that adds or removes tensors makes another table, whose sizes say nothing about this one.
    rows = {state.row_of(base.base(name)) for name in base.shapes}
    alike = [b for b in others if {state.row_of(base.base(name)) for name in b.skeleton.shapes} == rows]
    bound = [b.field for b in others if b not in alike and value_of(base.config, b.field) == state.hidden]
    _only_hidden(state, base, alike)
    _only_vocab(state, base, alike)
    sizes = choose(
        state.sizes, hints, state.rows, state.row_of, base, alike, state.part, {stack.layers for stack in state.stacks}
    )
    # Heads of which no field says how many are said layer by layer: what has them keeps its length.
    sizes = {name: size for name, size in sizes.items() if not (size.isdigit() and name.endswith("heads"))}
    state.rows = {row: tuple(_known(dim, sizes) for dim in layout) for row, layout in state.rows.items()}
    used = {axis for layout in state.rows.values() for dim in layout for part in dim.parts for axis in part}
    known = [name for name in state.sizes if name in used and name in sizes]
    axes = {name: Axis(sizes[name], _role(state, name, sizes[name]), _groups(state, name, sizes)) for name in known}
    if "hidden" not in axes:
        asked = f"inferring the table of {type(state.model).__name__}"
        raise GrowError(asked, "no config field says how wide its blocks are", "a table in growlib/architectures")
    per_token, routed = _per_token(base.config, axes)
    axes |= per_token
    return Architecture(
        model_type=base.config.model_type,
        stacks=tuple(_with_writers(state, stack) for stack in state.stacks),
        axes=axes,
        tensors=state.rows,
        ties=_ties(state),
        head_norm="" if state.part else state.key(head_norm_of(state)).rstrip("."),
        follows=_follows(axes)
        | ({} if state.part else dict.fromkeys(same_width(base.config), axes["hidden"].size))
        | routed
        | {field: axes["hidden"].size for field in bound if field != axes["hidden"].size},
    )


def _only_by_chance(state: Draft, base: Skeleton, others: list[Build], axis: str) -> list[tuple[str, int]]:
    """The dimensions that have the axis's length by chance: those that its field does not explain in every build."""
    skeletons = [base, *(build.skeleton for build in others if not build.was_absent)]
    fields = [f for f, v in flat(base.config).items() if type(v) is int and v == state.sizes.get(axis)]

    def chance(field: str) -> set[tuple[str, int]]:
        return {
            (row, i)
            for skeleton in skeletons
            for name, shape in skeleton.shapes.items()
            for row in [state.row_of(skeleton.base(name))]
            for i, (dim, length) in enumerate(zip(state.rows.get(row, ()), shape, strict=False))
            if set(dim.parts) == {(axis,)} and length != len(dim.parts) * value_of(skeleton.config, field)
        }

    return min((sorted(chance(field)) for field in fields), key=len, default=[])


def _only_hidden(state: Draft, base: Skeleton, others: list[Build]) -> None:
    """Dimensions that have the width's length by chance keep theirs."""
    for row, i in _only_by_chance(state, base, others, "hidden"):
        layout = state.rows[row]
        fixed = replace(FIXED, side=layout[i].side)
        state.rows[row] = (*layout[:i], fixed, *layout[i + 1 :])


def _only_vocab(state: Draft, base: Skeleton, others: list[Build]) -> None:
    """Tables that are as long as the vocabulary by chance have an axis of their own."""
    for row, i in _only_by_chance(state, base, others, "vocab"):
        layout = state.rows[row]
        if layout[i].side == "read":
            own = state.axis(f"{row.rpartition('.')[0].rpartition('.')[2]}_rows", state.sizes["vocab"], "lookup", "")
            state.rows[row] = (*layout[:i], replace(layout[i], parts=((own,),)), *layout[i + 1 :])


def _known(dim: Dim, sizes: dict[str, str]) -> Dim:
    """A dimension whose axes have no known size stays as it is."""
    known = all(axis in sizes for part in dim.parts for axis in part)
    return dim if known else Dim(FIXED.parts, dim.side, offset=dim.offset)


def _role(state: Draft, axis: str, size: str) -> str:
    if state.part and (not state.roles.get(axis, "-") or not fields_in(size)):
        return ""  # a constant, or what the text says
    if axis == "raw":
        return "unscaled"
    if axis == "hidden":
        centred = any(norm.centred for name, norm in state.norms.items() if is_hidden(state, name))
        return "post_layer_norm" if centred and is_post_norm(state) else "layer_norm" if centred else "rms_norm"
    scaled = [layout[0].parts[0] for layout in state.rows.values() if layout and layout[0].side == "scale"]
    together = any(len(part) > 1 and part[0] == axis for part in scaled)
    return f"normed_{state.roles[axis]}" if together else state.roles[axis]


def _groups(state: Draft, axis: str, sizes: dict[str, str]) -> str:
    kv_heads = axis.replace("heads", "kv_heads")
    return kv_heads if state.roles.get(axis) == "query_heads" and kv_heads in sizes else ""


def _per_token(config: Any, axes: dict[str, Axis]) -> tuple[dict[str, Axis], dict[str, str]]:
    """The experts' axes with that of how many act on a token, which no shape shows; its field follows theirs."""
    fields = [f for f, v in flat(config).items() if type(v) is int and re.search(r"per_tok|top_?k", f)]
    field = next((field for field in fields if "group" not in field), "")
    experts = {name: axis for name, axis in axes.items() if axis.role == "experts"}
    if not field or not experts:
        return {name: replace(axis, role="") for name, axis in experts.items()}, {}
    told = {name: replace(axis, per_token="per_token") for name, axis in experts.items()}
    return told | {"per_token": Axis(field)}, {field: next(iter(experts.values())).size}


def _follows(axes: dict[str, Axis]) -> dict[str, str]:
    """Heads grow with the width where head_dim is the one over the other.

    A second table of the same ids, such as Gemma's `vocab_size_per_layer_input`, grows with the first.
    """
    following = {}
    for axis in axes.values():
        if "vocab" in axes and axis.size.startswith(axes["vocab"].size + "_"):
            following[axis.size] = axes["vocab"].size
        width, divided, heads = axis.size.partition(" / ")
        if divided and width == axes["hidden"].size and any(a.size == heads for a in axes.values()):
            following[heads] = width
    return following


def _ties(state: Draft) -> dict[str, str]:
    """The tensors that stand under a second name, or may: {alias: tensor}."""
    keys = state.model._tied_weights_keys
    pairs = dict(keys) if isinstance(keys, dict) else {}
    strip = state.prefix
    return {alias.removeprefix(strip): name.removeprefix(strip) for alias, name in pairs.items()}


def _with_writers(state: Draft, stack: Stack) -> Stack:
    """What to zero in a new block: the norm after a map that writes the stream, or after all experts; else the map."""
    if stack in state.known:
        return stack
    writers: dict[str, None] = {}
    for row, layout in state.rows.items():
        if not row.startswith(stack.block) or not any(d.side == "write" and d.parts == (("hidden",),) for d in layout):
            continue
        name = row.removeprefix(stack.block)
        module = name.rpartition(".")[0] if name.rpartition(".")[2] in ("weight", "bias") else name
        full = state.prefix + stack.block.replace("*", "0") + module
        block = state.prefix + stack.block.replace("*", "0").rstrip(".")
        norms = (norm_after(state, place) for place in _up_to(block, full))
        norm = next((norm for norm in norms if norm and not feeds(state, norm)), None)
        if norm and not stack.last_norm:
            module = norm.removeprefix(state.prefix + stack.block.replace("*", "0"))
        writers[module] = None
    return replace(stack, writers=tuple(writers))


def _up_to(block: str, name: str) -> Iterator[str]:
    """A module of a block and what it is a part of: a norm may read the sum of all experts."""
    while name.startswith(block + "."):
        yield name
        name = name.rpartition(".")[0]
