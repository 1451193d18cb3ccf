"""The table of a class, read off a tiny model of it. It is a guess until the verifier has proven it."""

import re
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from growlib.architectures.schema import Architecture, Stack
from growlib.checkpoint.loading import skeleton
from growlib.growth_plan import Skeleton
from growlib.inference import probe
from growlib.inference.draft import (
    FIXED,
    Draft,
    as_their_like,
    feeds,
    is_branch,
    is_hidden,
    is_post_norm,
    merged,
    norm_after,
    parts_read,
    raw_if,
    refuse_unseen,
    side_by_side,
    stacks_of,
    width_of,
    writer_of,
    writes_unit,
)
from growlib.inference.rows import Unresolved, read_rows
from growlib.inference.sizes import Build, builds
from growlib.inference.stacked import expert_count, expert_layout
from growlib.inference.table import table_of
from growlib.layouts import Dim, Layout
from growlib.media import text_width
from growlib.outputs import vocabulary
from growlib.parts import flat, value_of

MOST = 0.6  # of the channels: more than one of at least two heads
CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def draft(model: PreTrainedModel, known: tuple[Stack, ...] = (), part: str = "") -> Architecture:
    """The table of a tiny model's class. Raises GrowError where its parts cannot be told apart.

    `known` are stacks of which it is known already what makes a block the identity. `part` is the part of the config
    whose axes are found, such as `vision_config`: by default the text, and what joins it.
    """
    base = skeleton(model)
    others = builds(type(model), base, part)
    seen = probe.trace(model)
    stacks = stacks_of(base, others)
    widths = {n: t.shape[-1] for n, t in seen.inputs.items()}
    norms = {n: k for n, m in model.named_modules() if n in widths and (k := probe.norm_of(m, widths[n]))}
    state = Draft(model, width_of(model, stacks, base.prefix, seen), stacks, seen, norms, part=part, known=known)
    state.sizes["hidden"] = state.hidden
    if part:
        refuse_unseen(state)
    _linear_maps(state)
    _stack_norms(state)
    _pooled_as_hidden(state)
    _other_streams(state)
    for name, module in model.named_modules():
        if experts := expert_count(state, name, module):
            state.axis("experts", experts, "experts", name)
        if isinstance(module, nn.MultiheadAttention) and not state.is_elsewhere(name):
            state.inputs[state.key(f"{name}.out_proj")] = _head_axes(state, name, module)[2]
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            row = state.row_of(f"{name}.{kind}".removeprefix(state.prefix) if name else kind)
            if row not in state.rows:
                state.rows[row] = _layout(state, name, module, kind, tuple(parameter.shape))
    as_their_like(state)
    for name in base.shapes:  # buffers that are saved
        row = state.row_of(base.base(name))
        state.rows.setdefault(row, tuple(_dim(state, size, "write") for size in base.shapes[name]))
    _of_each_layer(state, base, others)
    return table_of(state, base, others)


def _of_each_layer(state: Draft, base: Skeleton, others: list[Build]) -> None:
    """Dimensions outside the layers that hold as many entries of each, side by side."""
    counts = {stack.layers: value_of(base.config, stack.layers) for stack in state.stacks}
    for build in others:
        old, new = counts.get(build.field), value_of(build.skeleton.config, build.field)
        for name, shape in base.shapes.items():
            row, longer = state.row_of(base.base(name)), build.skeleton.shapes.get(name, shape)
            if old is None or "*" in row or len(shape) != len(longer):
                continue
            layout = list(state.rows[row])
            for i, (before, after) in enumerate(zip(shape, longer, strict=True)):
                if (
                    before != after
                    and before % old == 0
                    and after == before // old * new
                    and layout[i].parts == FIXED.parts
                ):
                    axes = state.axis("layers", old, "layers", ""), state.axis("of_each", before // old, "", "")
                    layout[i] = replace(layout[i], parts=(axes,))
            state.rows[row] = tuple(layout)


def _linear_maps(state: Draft) -> None:
    """Find what the dimensions of the linear maps are that no residual stream passes."""
    readers: dict[str, dict[str, list[probe.Row]]] = {}
    known: set[str] = set()
    for name, module in state.model.named_modules():
        row = state.row_of(name.removeprefix(state.prefix) + ".weight")
        if not probe.is_linear(module) or row in known or name not in state.seen.outputs:
            continue
        if not state.grows(name) and (state.part or all(size % state.hidden for size in module.weight.shape)):
            continue  # a map inside another part
        known.add(row)
        moved = probe.moved_by(state.model, name, probe.out_features(module))
        norm = norm_after(state, name)
        if moved and norm and _share(moved[1]) > MOST:
            through = probe.moved_by(state.model, norm, probe.out_features(module))
            if through and any(int(r.channels.sum()) > 1 for r in through[1]):
                moved = through
        if moved and not _is_mixed(moved[1]):
            readers.setdefault(moved[0], {})[name] = moved[1]
    for reader, writers in readers.items():
        try:
            _read(state, reader, writers)
        except Unresolved:
            continue
    _read_beside(state)


def _read_beside(state: Draft) -> None:
    """A map that reads what a known one reads has its axes: keys and values of the same image."""
    maps = {name: module for name, module in state.model.named_modules() if probe.is_linear(module)}
    read = {name: probe.rows(state.seen.inputs[name]) for name in maps if name in state.seen.inputs}
    known = {frozenset(rows): state.inputs[state.key(n)] for n, rows in read.items() if state.key(n) in state.inputs}
    for name, rows in read.items():
        if axes := known.get(frozenset(rows)):
            state.inputs.setdefault(state.key(name), axes)


def _is_mixed(rows: list[probe.Row]) -> bool:
    """Every row moves nearly every channel of the reader, here only: they write the residual stream."""
    return _share(rows) > MOST and not any(row.elsewhere for row in rows)


def _share(rows: list[probe.Row]) -> float:
    """The share of the reader's channels that a row moves, on average."""
    return sum(float(row.channels.float().mean()) for row in rows) / len(rows)


def _read(state: Draft, reader: str, writers: dict[str, list[probe.Row]]) -> None:
    width = state.seen.inputs[reader].shape[-1]
    if not state.grows(reader) and (state.part or width % state.hidden):
        return  # a width of another part
    reading = read_rows(writers, width)
    if reading.sizes.get("heads") == 1 and _is_in_scan(state, reader):
        return  # what a scan makes of its own input and output maps
    if state.part and state.stack_of(reader) is None and (times := merged(state, width)):
        units = (times, state.axis("inner", state.hidden, "elementwise", ""))
        state.inputs[state.key(reader)] = units
        state.outputs |= {state.key(name): ((units,), "") for name, (_, by) in reading.writers.items() if not by}
        return
    names = {}
    kv_heads = reading.sizes.get("kv_heads")
    told = [v for f, v in flat(state.model.config).items() if re.search("key_value_heads|kv_heads", f)]
    shared = kv_heads == reading.sizes.get("heads") and kv_heads not in told
    for axis, size in reading.sizes.items():
        role = {"ffn": "elementwise", "heads": "query_heads", "kv_heads": "key_heads", "value": "linear"}.get(
            axis, axis
        )
        if axis == "kv_heads" and (size == 1 or shared):
            continue  # one KV head never grows; as many as query heads are the same axis
        kind = "pooled" if axis == "ffn" and state.stack_of(reader) is None else axis
        own = [writer for writer, (parts, _) in reading.writers.items() if any(axis in part for part in parts)]
        normed = axis in ("query", "key") and _reads_heads(state, own, size)
        names[axis] = state.axis(kind, size, role, reader, normed)
    if shared:
        names["kv_heads"] = names.get("heads", "")

    def named(part: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[axis] for axis in part if axis in names)

    state.inputs[state.key(reader)] = named(reading.reader)
    for name, (parts, by) in reading.writers.items():
        state.outputs[state.key(name)] = (tuple(named(part) for part in parts), names.get(by, ""))


def _reads_heads(state: Draft, writers: list[str], size: int) -> bool:
    """Whether a norm reads each head that these maps write."""
    over = [norm for norm in state.norms if state.seen.inputs[norm].shape[-1] == size != state.hidden]
    return any(writer_of(state, norm) in writers for norm in over)


def _stack_norms(state: Draft) -> None:
    """For each stack, the last norm of a post-norm block and the ones before it."""
    told = {stack.block: stack for stack in state.known}
    for index, stack in enumerate(state.stacks):
        if stack.block in told:
            state.stacks[index] = told[stack.block]
            continue
        block = state.prefix + stack.block.replace("*.", "0.")
        inside = [norm for norm in state.norms if norm.startswith(block) and is_hidden(state, norm)]
        written = state.seen.outputs.get(block[:-1])
        if written is None:
            continue
        last = next((n for n in inside if probe.rows(state.seen.outputs[n]) == probe.rows(written)), None)
        if last and not is_branch(state, last):
            inner = tuple(n.removeprefix(block) for n in inside if n != last and not is_branch(state, n))
            state.stacks[index] = replace(stack, inner_norms=inner, last_norm=last.removeprefix(block))


def _pooled_as_hidden(state: Draft) -> None:
    """The pooled vector of a post-norm model grows as its stream does."""
    if is_post_norm(state) and state.sizes.get("pooled") == state.hidden:
        del state.sizes["pooled"]
        state.inputs |= {name: ("hidden",) for name, axes in state.inputs.items() if axes == ("pooled",)}
        state.outputs |= {n: ((("hidden",),), "") for n, (parts, _) in state.outputs.items() if parts == (("pooled",),)}


def _other_streams(state: Draft) -> None:
    """Norms over an axis of their own, such as factorised embeddings or a low-rank bottleneck."""
    embedded = {m.embedding_dim for m in state.model.modules() if isinstance(m, nn.Embedding)}
    for name, norm in state.norms.items():
        width = state.seen.inputs[name].shape[-1]
        if state.part and merged(state, width):
            continue
        if state.grows(name) and width != state.hidden and not writes_unit(state, name):
            kind = "embedding" if width in embedded else "low_rank"
            state.streams[width] = state.axis(kind, width, "layer_norm" if norm.centred else "rms_norm", "")


def _layout(state: Draft, name: str, module: nn.Module, kind: str, shape: tuple[int, ...]) -> Layout:
    """The row of one parameter."""
    if state.part and state.is_elsewhere(name):
        return (FIXED,) * len(shape)
    if name in state.norms:
        return _norm_layout(state, name, kind, shape)
    if probe.is_linear(module):
        return _linear_layout(state, name, module, kind)
    if isinstance(module, nn.Embedding):
        if state.is_elsewhere(name):
            return (replace(FIXED, side="read"), _dim(state, shape[1], "write"))
        return (Dim(((_lookup(state, name, shape[0]),),), "read"), _dim(state, shape[1], "write", heads=True))
    if isinstance(module, CONVOLUTIONS):
        reads = tuple(_dim(state, size, "read") for size in shape[1:2])
        write = _units_beside(state, name, shape[0]) if shape[1:2] in ((1,), ()) else None
        of_each = getattr(module, "groups", 1) == shape[0] > 1  # of each head by itself, where there are as many
        return (write or _dim(state, shape[0], "write", heads=of_each), *reads, *(FIXED,) * len(shape[2:]))
    if isinstance(module, nn.MultiheadAttention) and not state.is_elsewhere(name) and kind.startswith("in_proj"):
        write = Dim(_head_axes(state, name, module), "write")
        return (write, _dim(state, shape[1], "read")) if len(shape) == 2 else (write,)
    if len(shape) > 1 and shape[0] == expert_count(state, name, module):
        return expert_layout(state, name, kind, shape)
    if len(shape) == 1 and shape[0] == state.hidden and not state.is_elsewhere(name):
        added = probe.is_added(state.model, state.seen, module.get_parameter(kind))
        if added is False or (added is None and state.stack_of(name)):
            return (Dim((("raw",),), "scale"),)  # such as a LayerScale
    if units := _units_beside(state, f"{name}.{kind}", shape[0] if shape else 0):
        return (units, *(FIXED,) * (len(shape) - 1))  # of each unit of a scan by itself
    # a linear map of its own kind, such as a router; what joins an image to the text writes the text's stream
    here = not state.is_elsewhere(name)
    read = "weight" in kind and len(shape) == 2 and here
    if state.part and shape == (state.hidden, text_width(state.model)):
        return (raw_if(state, name, _dim(state, shape[0], "read")), FIXED)
    sides = [_dim(state, size, "read" if read and i else "write", heads=here) for i, size in enumerate(shape)]
    return tuple(raw_if(state, name, dim) for dim in sides)


def _is_in_scan(state: Draft, name: str) -> bool:
    """Whether a convolution of single units stands beside a linear map: a scan reads what it gives."""
    beside = state.model.get_submodule(name.rpartition(".")[0]).children()
    return any(isinstance(m, nn.Conv1d) and m.groups == m.in_channels > 1 for m in beside)


def _units_beside(state: Draft, name: str, size: int) -> Dim | None:
    """The axis of this size that the linear maps beside a parameter read, where each of its units acts by itself."""
    parent, hidden = state.key(name.rpartition(".")[0]), size == state.hidden
    beside = {axes[0] for reader, axes in state.inputs.items() if reader.startswith(parent) and len(axes) == 1}
    own = [axis for axis in beside if state.roles.get(axis) == "elementwise" and state.sizes[axis] == size]
    return Dim(((own[0],),), "write") if own and not hidden and state.stack_of(name) else None


def _dim(state: Draft, size: int, side: Any, heads: bool = False) -> Dim:
    vocab = 0 if state.part else vocabulary(state.model)
    if size == state.hidden:
        return Dim((("hidden",),), side)
    if size == vocab:
        state.axis("vocab", size, "lookup", "")
        return Dim((("vocab",),), side)
    if times := merged(state, size):
        return Dim(((times, "hidden"),), side)
    if size in state.streams:
        return Dim(((state.streams[size],),), side)
    per_head = next((a for a in state.sizes if heads and a.endswith("heads") and state.sizes[a] == size), None)
    router = next((a for a, role in state.roles.items() if role == "experts" and state.sizes[a] == size), None)
    axis = (per_head or router) if side == "write" else None
    return Dim(((axis,),), side) if axis else replace(FIXED, side=side)


def _lookup(state: Draft, name: str, size: int) -> str:
    last = name.rpartition(".")[2]
    if size == vocabulary(state.model) and not state.part:
        return state.axis("vocab", size, "lookup", "")
    if state.part:
        return "fixed"  # places of an image or a sound
    kind = "types" if "type" in last else "positions" if "pos" in last or last == "wpe" else "lookup"
    return state.axis(kind, size, "lookup", "")


def _linear_layout(state: Draft, name: str, module: nn.Module, kind: str) -> Layout:
    weight: Any = module.weight
    features_in, features_out = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
    if state.key(name) in state.outputs:
        parts, by = state.outputs[state.key(name)]
        write = Dim(parts, "write", by)
    else:
        never_ran = name not in state.seen.outputs
        write = (_units_beside(state, name, features_out) if never_ran else None) or _dim(state, features_out, "write")
    if kind == "bias":
        return (write,)
    if state.key(name) in state.inputs:
        read = Dim((state.inputs[state.key(name)],), "read")
    else:
        read = raw_if(state, name, side_by_side(state, name, _dim(state, features_in, "read")))
        if read.parts == FIXED.parts and _is_in_scan(state, name):
            read = replace(_units_beside(state, name, features_in) or read, side="read")
        if read.parts == FIXED.parts and not state.stack_of(name) and not state.is_elsewhere(name):
            read = _embeddings_read(state, name) or _side_by_side(state, features_in) or read
    return (read, write) if isinstance(module, Conv1D) else (write, read)


def _embeddings_read(state: Draft, name: str) -> Dim | None:
    """Several embeddings side by side, of which one has the model's width, such as those of a word and its sound."""
    given = state.seen.inputs.get(name)
    embeddings = {n for n, module in state.model.named_modules() if isinstance(module, nn.Embedding)}
    made = [written for n, written in state.seen.outputs.items() if n in embeddings]
    widths: list[int] = []
    while given is not None and sum(widths) < given.shape[-1]:
        rest = given[..., sum(widths) :]
        fits = (m.shape[-1] for m in made if probe.rows(rest[..., : m.shape[-1]]) <= probe.rows(m))
        if not (width := next(fits, 0)):
            return None
        widths.append(width)
    if state.hidden not in widths:
        return None
    axes = ("hidden" if width == state.hidden else state.axis("beside", width, "", name) for width in widths)
    return Dim(tuple((axis,) for axis in axes), "read")


def _side_by_side(state: Draft, size: int) -> Dim | None:
    """Several vectors, such as a class token and a mean, or the heads of all layers."""
    times, rest = divmod(size, state.hidden)
    if not rest:
        return Dim((("hidden",),) * times, "read")
    heads = next((axis for axis in state.sizes if axis.endswith("heads")), "")
    for stack in state.stacks[:1]:
        layers = len(list(state.model.get_submodule(state.prefix + stack.block.partition(".*")[0]).children()))
        if heads and size == layers * state.sizes[heads]:
            return Dim(((state.axis("layers", layers, "layers", ""), heads),), "read")
    return None


def _norm_layout(state: Draft, name: str, kind: str, shape: tuple[int, ...]) -> Layout:
    norm = state.norms[name]
    side: Any = "scale" if kind == norm.scale else "shift"
    offset = norm.offset if side == "scale" else 0.0
    axes: tuple[str, ...] = ("fixed",)
    if writes_unit(state, name):
        parts = parts_read(state, name)
        if len(parts) == 1:
            size = [state.sizes[a] for a in parts[0]]
            axes = parts[0] if len(size) < 2 or shape[0] == size[0] * size[1] else parts[0][-1:]
    elif merged(state, shape[0]):
        axes = side_by_side(state, name, _dim(state, shape[0], "read")).parts[0]
    elif shape[0] in state.streams:
        axes = (state.streams[shape[0]],)
    elif shape[0] == state.hidden:
        stream = not is_post_norm(state) and (is_branch(state, name) or not feeds(state, name))
        axes = ("raw",) if stream else ("hidden",)
    return (Dim((axes,), side, offset=offset),)


def _head_axes(state: Draft, name: str, module: nn.MultiheadAttention) -> tuple[tuple[str, str], ...]:
    """The axes of torch's own attention: queries, keys and values one after the other."""
    heads = state.axis("heads", module.num_heads, "query_heads", name)
    kinds = (("query", "query"), ("key", "key"), ("value", "linear"))
    return tuple((heads, state.axis(kind, module.head_dim, role, name)) for kind, role in kinds)
