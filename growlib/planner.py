"""Decide a growth: from two skeletons and a method to the frozen plan."""

import copy
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from growlib import contract
from growlib.architectures.schema import Architecture, Axis, Stack
from growlib.errors import GrowError
from growlib.growth_plan import GrowthPlan, Shape, Skeleton, TensorPlan
from growlib.layer_fields import kinds_said, taken_elsewhere
from growlib.layouts import Dim, Layout
from growlib.maps import AxisMap, LayerMap, split_evenly
from growlib.operators import Method
from growlib.parts import beside, flat, text_of, value_of
from growlib.reasons import EffectOf, of_architecture, of_config

PLACES = re.compile(r"(^|\.)(image|patch)_size$")  # they say how many positions an image has
Maps = Mapping[str, AxisMap]
Layers = Mapping[str, LayerMap]


@dataclass(frozen=True)
class Request:
    """What is to grow into what, and how."""

    table: Architecture
    method: Method
    seed: int
    source: Skeleton
    target: Skeleton
    effect_of: EffectOf = lambda field, old, new: "unknown"

    @property
    def asked(self) -> str:
        return f"growing {self.table.model_type} with method {self.method.name!r}"

    @cached_property
    def old(self) -> dict[str, int]:
        return self._sizes(self.source)

    @cached_property
    def new(self) -> dict[str, int]:
        return self._sizes(self.target)

    @property
    def grows(self) -> set[str]:
        """The axes and stacks that get longer."""
        return {name for name in self.old if self.new[name] != self.old[name]}

    def _sizes(self, model: Skeleton) -> dict[str, int]:
        sizes = {**self.table.layer_counts(model.config), **self.table.sizes(model.config)}
        return sizes if self.table.proven is None else sizes | self._lengths(model)

    def _lengths(self, model: Skeleton) -> dict[str, int]:
        """The sizes that tensors have: a class may add the id of padding, or round what its config says."""
        lengths = defaultdict(set)
        for name, shape in model.shapes.items():
            layout = self.table.tensors.get(self.table.template(model.base(name))[0], ())
            for dim, length in zip(layout, shape, strict=False):
                if len(dim.parts) == 1 and len(dim.parts[0]) == 1:
                    lengths[dim.parts[0][0]].add(length)
        return {axis: min(found) for axis, found in lengths.items() if axis in self.table.axes and len(found) == 1}


def make_plan(request: Request) -> GrowthPlan:
    """Decide a growth. Raises GrowError where the request has no meaning; what is only inexact becomes a reason."""
    table, method, source, target = request.table, request.method, request.source, request.target
    _check_request(request)
    maps = _maps(request)
    layers = {stack.layers: _fitted(_layer_map(request, stack), stack, source, target) for stack in table.stacks}
    maps |= {name: _of_layers(layers[axis.size]) for name, axis in table.axes.items() if axis.role == "layers"}
    tensors = tuple(_tensors(request, maps, layers))
    _check_shapes(request, tensors, maps)
    _check_all_used(request, layers, tensors)
    reasons = [axis_map.inexact for axis_map in maps.values() if axis_map.inexact]
    reasons += [stack.inexact for stack in layers.values() if stack.inexact]
    reasons += contract.broken(table, maps, request.old, request.new)
    reasons += of_architecture(table, request.old, request.new, request.grows, maps, source.config, target.config)
    reasons += of_config(table, layers, source.config, target.config, request.effect_of)
    return GrowthPlan(
        method=method.name,
        seed=request.seed,
        model_class=source.model_class,
        source=copy.deepcopy(source.config),  # the model's own may change
        config=target.config,
        old_sizes=request.old,
        new_sizes=request.new,
        roles={name: axis.role for name, axis in table.axes.items()},
        maps={name: _for_scores(axis_map, table.axes[name], source.config) for name, axis_map in maps.items()},
        layers=layers,
        tensors=tensors,
        reasons=tuple(dict.fromkeys(reasons)),
        initializer_range=getattr(text_of(source.config), "initializer_range", 0.02),
        learned=method.learned,
    )


def _check_request(request: Request) -> None:
    """Raise GrowError for sizes that shrink and for a growth that the method does not know."""
    asked, method, old, new = request.asked, request.method, request.old, request.new
    depths = request.table.layer_counts(request.source.config).keys()
    field = {name: axis.size for name, axis in request.table.axes.items()} | {name: name for name in depths}
    shrinks = dict.fromkeys(f"{field[name]} {old[name]} -> {new[name]}" for name in old if new[name] < old[name])
    if shrinks:
        raise GrowError(asked, f"sizes would shrink: {', '.join(shrinks)}", "sizes at least the source's")
    if method.width is None and (wider := request.grows - depths):
        wrong = f"{method.name} grows depth only, and {', '.join(sorted(wider))} would grow"
        raise GrowError(asked, wrong, f"method 'lossless+{method.name}'")
    if method.depth is None and request.grows & depths:
        raise GrowError(asked, f"{method.name} does not grow depth", f"method '{method.name}+lossless'")


def _maps(request: Request) -> dict[str, AxisMap]:
    """The method's map of each axis."""
    method, old, new, maps = request.method, request.old, request.new, {}
    for name, axis in request.table.axes.items():
        if method.width and axis.role and axis.role != "layers":
            made = method.width(name, axis, old, new, request.seed)
            maps[name] = contract.checked_map(made, method.name, name, axis, old[name], new[name])
    return maps


def _layer_map(request: Request, stack: Stack) -> LayerMap:
    return layer_map(request.method, stack, request.old[stack.layers], request.new[stack.layers])


def layer_map(method: Method, stack: Stack, old: int, new: int) -> LayerMap:
    """The method's map of one stack; a method without depth leaves it as it is."""
    if method.depth is None:
        return LayerMap(old, tuple(range(old)), (False,) * old)
    layers = contract.checked_layers(method.depth(old, new), method.name, old, new)
    if not stack.numbered or not any(layers.identity):
        return layers
    order = sorted(range(new), key=lambda place: layers.identity[place])  # stable: old layers first, in their order
    return dataclasses.replace(
        layers,
        source=tuple(layers.source[place] for place in order),
        identity=tuple(layers.identity[place] for place in order),
        share=tuple(layers.share[place] for place in order) if layers.share else (),
    )


def _fitted(layers: LayerMap, stack: Stack, source: Skeleton, target: Skeleton) -> LayerMap:
    """The map with each layer at a place of its kind, and new ones copied from the nearest of their kind.

    In some classes layers differ: in their tensors, or in what the config says about them.
    """
    have, need = _layer_kinds(stack, source), _layer_kinds(stack, target)
    if all(need.get(t) == have.get(s) for t, s in enumerate(layers.source)):
        return layers
    like = [[s for s in range(layers.old) if have.get(s) == need.get(t)] for t in range(len(layers.source))]
    if not any(layers.identity):
        if not all(like):
            return layers
        nearest = tuple(min(like[t], key=lambda s: abs(s - source)) for t, source in enumerate(layers.source))
        return dataclasses.replace(layers, source=nearest) if set(nearest) == set(layers.source) else layers
    wanted = [t for t, new in enumerate(layers.identity) if not new]
    placed = wanted if stack.numbered else _places(wanted, like)
    if placed is None or any(s not in like[t] for s, t in enumerate(placed)):
        return layers
    acting = {t: s for s, t in enumerate(placed)}
    # A kind of which the source has no layer is drawn: it comes from no layer, and stands beside one.
    options = [like[t] or list(range(layers.old)) for t in range(len(like))]
    chosen = [acting.get(t, min(options[t], key=lambda s: abs(s - layers.source[t]))) for t in range(len(like))]
    return dataclasses.replace(
        layers, source=tuple(chosen), identity=tuple(t not in acting for t in range(len(chosen))), share=()
    )


def _places(wanted: list[int], like: list[list[int]]) -> list[int] | None:
    """A place for each old layer, in their order: one that takes it, as near as can be to the wanted one.

    Args:
        wanted: [old layers] places.
        like: [new layers] the old layers that each place takes.
    """
    best: dict[int, tuple[int, list[int]]] = {-1: (0, [])}  # the last place that is taken -> the cost, the places
    for layer, place in enumerate(wanted):
        reached: dict[int, tuple[int, list[int]]] = {}
        before: tuple[int, list[int]] | None = best.get(-1)
        for t, options in enumerate(like):
            if before is not None and layer in options:
                reached[t] = before[0] + abs(t - place), [*before[1], t]
            if t in best and (before is None or best[t][0] < before[0]):
                before = best[t]
        best = reached
    return min(best.values(), default=(0, None))[1]


def _layer_kinds(stack: Stack, model: Skeleton) -> dict[int, set[str]]:
    """For each layer the names of its tensors, which of their sizes it has, and what the config says about it."""
    shapes: dict[str, dict[int, Shape]] = defaultdict(dict)
    for name, shape in model.shapes.items():
        base = model.base(name)
        if (layer := stack.layer_of(base)) is not None:
            shapes[stack.row_of(base, layer)][layer] = shape
    kinds: dict[int, set[str]] = defaultdict(set)
    for row, found in shapes.items():
        order = sorted(set(found.values()))
        for layer, shape in found.items():
            kinds[layer].add(f"{row} {order.index(shape) + 1} of {len(order)}")
    fields = flat(model.config)
    own = beside(fields, stack.layers) | taken_elsewhere(fields, stack.layers)
    for layer, said in enumerate(kinds_said(own, len(kinds))):
        kinds[layer].update(said)
    return dict(kinds)


def _of_layers(layers: LayerMap) -> AxisMap:
    """What reads something of each layer reads it of those that act."""
    source = np.where(layers.identity, -1, layers.source)
    return AxisMap(layers.old, source, split_evenly(layers.old, source))


def _for_scores(axis_map: AxisMap, axis: Axis, config: PreTrainedConfig) -> AxisMap:
    """The map, less the growth of 1/sqrt(head_dim) that it takes back, where the scores have no such factor."""
    if not axis.scaled_by or (axis.scaled_by != "never" and value_of(config, axis.scaled_by)):
        return axis_map
    wider = (axis_map.new / axis_map.old) ** 0.5
    if axis_map.new_writes == "zero":  # queries under a norm, whose weight holds the scale
        return dataclasses.replace(axis_map, gain=axis_map.gain / wider)
    return dataclasses.replace(axis_map, write=axis_map.write / wider)


def _tensors(request: Request, maps: Maps, layers: Layers) -> Iterator[TensorPlan]:
    """A plan for each tensor of the target."""
    table, source, target = request.table, request.source, request.target
    _check_known(request)
    tied = {_head_reads(table, pair) for pair in table.ties.items() if set(pair) & target.aliases}
    wider = request.new["hidden"] / request.old["hidden"]
    embedding, head = wider**-table.embedding_power, wider**-table.head_power
    for name, new_shape in target.shapes.items():
        row, stack, layer = table.template(target.base(name))
        origin = row if row in (alias for pair in table.ties.items() for alias in pair) else target.base(name)
        if table.ties.get(row) in target.aliases:
            row = origin = table.ties[row]  # a tied head that stands before its embedding grows as the embedding does
        layout, constant, more = table.tensors[row], None, {}
        if stack:
            own = stack.row_of(target.base(name), layer)  # an expert's may have the row of another one
            origin = own.replace("*", str(layers[stack.layers].source[layer]), 1)
            constant = _identity_constant(stack, row, layout, layer, layers[stack.layers])
            more = _other_layers(own, layer, layers[stack.layers], layout, maps, source)
            more |= _weigher(table, row, layers[stack.layers].source[layer], maps, source)
        names = [origin, *(n for pair in table.ties.items() if origin in pair for n in pair)]
        taken = next((full for base in names if (full := source.find(base))), None)
        if taken is None and not row.endswith(".bias"):
            if not (stack and layers[stack.layers].identity[layer]):
                wrong = f"the source has no tensor for {name}"
                raise GrowError(request.asked, wrong, "a class with the source's tensors")
            constant, more = _first_values(row, layout, constant)
        looked_up = layout and layout[0].parts == (("vocab",),) and layout[0].side == "read"
        factor = (embedding if looked_up else 1.0) * wider ** -table.powers.get(row, 0.0)
        if stack and _stands_in(row.removeprefix(stack.block), stack.writers):
            factor = (request.old[stack.layers] / request.new[stack.layers]) ** stack.branch_power
        if row.startswith(table.head_norm + ".") and (not stack or layer == len(layers[stack.layers].source) - 1):
            (axis,) = layout[0].parts[0]
            factor = head * (maps[axis].tied_gain / embedding if axis in tied and axis in maps else 1.0)
        old_shape = source.shapes[taken] if taken else _shape(layout, request.old, new_shape)
        yield TensorPlan(name, taken, layout, old_shape, new_shape, constant, factor, **more)


def _first_values(row: str, layout: Layout, constant: float | None) -> tuple[float | None, dict[str, Any]]:
    """What a tensor of a new block starts with that no layer of the source has: drawn; a vector is one or zero."""
    if len(layout) > 1 or constant is not None:
        return constant, {"noise": 1.0 if constant is None else 0.0, "added": True}
    return (0.0 if layout[0].side == "shift" or not row.endswith("weight") else 1.0), {"added": True}


def _check_known(request: Request) -> None:
    table, target = request.table, request.target
    unknown = [name for name in target.shapes if table.template(target.base(name))[0] not in table.tensors]
    if unknown:
        wrong = f"the {table.model_type} table does not know the tensors {', '.join(unknown)}"
        raise GrowError(request.asked, wrong, "a class whose tensors are all in growlib/architectures")


def _other_layers(
    row: str, layer: int, layers: LayerMap, layout: Layout, maps: Mapping[str, AxisMap], source: Skeleton
) -> dict[str, Any]:
    """What a layer's tensor takes beside its source: the twin in the next layer, and noise on a repeated layer."""
    origin, again = layers.source[layer], layers.source[layer] in layers.source[:layer]
    share = layers.share[layer] if layers.share else 0.0
    writes = [axis for dim in layout if dim.side == "write" for part in dim.parts for axis in part]
    this, following = (source.find(row.replace("*", str(place), 1)) for place in (origin, origin + 1))
    wanted = share or any(axis in maps and maps[axis].from_next for axis in writes)
    if not (wanted and this and following and source.shapes[this] == source.shapes[following]):
        following, share = None, 0.0
    noise = layers.noise if again and not layers.identity[layer] else 0.0
    return {"following": following, "share": share, "noise": noise, "added": layers.identity[layer]}


def _weigher(table: Architecture, row: str, layer: int, maps: Maps, source: Skeleton) -> dict[str, Any]:
    """The weights (LayerScale) that scale what a row writes on a stream whose new entries hold its mean."""
    scale = table.weighed.get(row)
    if scale is None or not any(m.new_writes == "mean" and (m.source < 0).any() for m in maps.values()):
        return {}
    (axis,) = table.tensors[scale][0].parts[0]
    return {"weigher": source.find(scale.replace("*", str(layer), 1)), "weigher_gain": maps[axis].new_gain}


def _head_reads(table: Architecture, rows: tuple[str, str]) -> str | None:
    """The axis that a head reads, where one of the rows writes the vocabulary."""
    layouts = [table.tensors[row] for row in rows if row in table.tensors]
    heads = [layout for layout in layouts if len(layout) == 2 and layout[0] == Dim((("vocab",),), "write")]
    return heads[0][1].parts[0][0] if heads else None


def _identity_constant(stack: Stack, row: str, layout: Layout, layer: int, layers: LayerMap) -> float | None:
    """What makes a new block the identity: zero writers; in a post-norm block, also norms of (1, 0).

    The last of the blocks that stand in for a source layer keeps that layer's last norm (design: post-norm depth).
    """
    name = row.removeprefix(stack.block)
    identity = layers.identity[layer]
    followed = layer + 1 < len(layers.identity) and layers.identity[layer + 1]
    if identity and _stands_in(name, stack.writers):
        return 0.0
    if (identity and _stands_in(name, stack.inner_norms)) or (followed and _stands_in(name, [stack.last_norm])):
        return 0.0 if name.endswith("bias") or layout[0].side == "shift" else 1.0
    return None


def _stands_in(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter of a block is one of these, or belongs to one; "." is the block itself."""
    module = name.rpartition(".")[0] or "."
    return any(part in (name, module) for part in parts)


def _shape(layout: Layout, sizes: Mapping[str, int], shape: Shape) -> Shape:
    """The shape that a layout has under these sizes. An axis without a size (`fixed`) keeps its length in `shape`."""
    return tuple(
        sum(prod(sizes[axis] for axis in part) for part in dim.parts) if dim.parts[0][0] in sizes else length
        for dim, length in zip(layout, shape, strict=True)
    )


def _check_shapes(request: Request, tensors: tuple[TensorPlan, ...], maps: Maps) -> None:
    grown = {**request.old, **{name: axis_map.new for name, axis_map in maps.items()}}  # an axis without a map stays
    for made in tensors:
        if len(made.layout) != len(made.old_shape):
            dims = f"{len(made.old_shape)} dimensions and its row {len(made.layout)}"
            wrong = f"{made.name} has {dims}: tensors of one name differ from layer to layer"
            raise GrowError(request.asked, wrong, "a table in growlib/architectures")
        for shape, sizes in ((made.old_shape, request.old), (made.new_shape, grown)):
            right = _shape(made.layout, sizes, made.old_shape)
            if shape == right:
                continue
            if request.table.proven is None or sizes is request.old:  # the source is not what the table says
                valid = f"{right}, by config and table"
                raise GrowError(request.asked, f"{made.name} has the shape {shape}", valid)
            wrong = f"{made.name} would change from {made.old_shape} to {shape}, {_why_new(request, made.name)}"
            raise GrowError(request.asked, wrong, f"sizes that leave it {right}, or a table in growlib/architectures")


def _why_new(request: Request, name: str) -> str:
    """Why a tensor of another shape has no plan: it holds more places of an image, or no table says what it holds."""
    before, after = flat(request.source.config), flat(request.target.config)
    known = request.table.size_fields()
    places = [f for f in after if PLACES.search(f) and f not in known and before.get(f) != after[f]]
    if not places or "pos" not in name:
        return "and inference cannot tell how"
    changes = " and ".join(f"{field} {before.get(field)} -> {after[field]}" for field in places)
    return f"for {changes}: the number of positions follows from it, and new ones have no values to come from"


def _check_all_used(request: Request, layers: Layers, tensors: tuple[TensorPlan, ...]) -> None:
    used, lost = {made.source for made in tensors}, []
    for name in request.source.shapes:
        _, stack, layer = request.table.template(request.source.base(name))
        if name not in used and (stack is None or layer in layers[stack.layers].source):
            lost.append(name)
    if lost:
        wrong = f"the target has no place for the source's {', '.join(lost)}"
        valid = "a target with the source's tensors (compare tie_word_embeddings and the bias flags)"
        raise GrowError(request.asked, wrong, valid)
