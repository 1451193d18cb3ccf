"""The plan of a growth: frozen, printable, comparable. It says what is exact before anything runs."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig

from growlib.axes import AxisMap, LayerMap, split_evenly
from growlib.errors import GrowError
from growlib.families.schema import Dim, Family, Layout, Stack
from growlib.methods import Method
from growlib.reasons import of_config, of_family

if TYPE_CHECKING:
    from torch import Tensor

    from growlib.upcycle import Mixture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where one tensor of the grown model comes from."""

    name: str
    source: str | None  # None: the source has no such bias, which is a bias of zeros
    layout: Layout
    old_shape: Shape
    new_shape: Shape
    constant: float | None = None  # replaces the source's values
    factor: float = 1.0
    following: str | None = None  # the same tensor of the next layer, where entries come from it
    share: float = 0.0  # of `following` in every entry
    noise: float = 0.0  # in standard deviations of the source
    added: bool = False  # it belongs to a block that starts as the identity


@dataclass(frozen=True)
class Skeleton:
    """A model without its values: the config, and the names and shapes of its tensors, tied ones once."""

    config: PreTrainedConfig
    shapes: Mapping[str, Shape]
    aliases: frozenset[str]  # names under which a tied tensor stands a second time
    prefix: str  # what stands before a base model's tensor names, such as `model.`

    def base(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def find(self, base: str) -> str | None:
        """The full name of a base-model name, where this model has the tensor."""
        return next((name for name in (self.prefix + base, base) if name in self.shapes), None)


@dataclass(frozen=True)
class GrowthPlan:
    """A growth, decided and not yet run. `exact` says whether it preserves the function, `reasons` why not."""

    method: str
    seed: int
    config: PreTrainedConfig
    old_sizes: Mapping[str, int]
    new_sizes: Mapping[str, int]
    maps: Mapping[str, AxisMap]
    layers: Mapping[str, LayerMap]  # by the config field that says how many
    entries: tuple[Entry, ...]
    reasons: tuple[str, ...]
    initializer_range: float  # the deviation of free values where the source's tensor is all zero
    mixture: "Mixture | None" = None  # what becomes of the grown dense model

    @property
    def exact(self) -> bool:
        return not self.reasons

    @property
    def grows(self) -> list[str]:
        """The axes and stacks that get longer."""
        return [name for name, size in self.new_sizes.items() if size != self.old_sizes[name]]

    def part_sizes(self, dim: Dim) -> list[int]:
        """The old sizes of a dimension's concatenated parts."""
        return [prod(self.old_sizes[axis] for axis in part) for part in dim.parts]

    def new_parameters(self) -> "dict[str, Tensor]":
        """Where each entry of each grown tensor comes from: by the tensor's name a uint8 tensor of its new shape.

        Its values are those of `growlib.Origin`: OLD (a value of the source goes on here), COPIED (a further copy of
        such a value), NEW (zero, mean or constant by rule), FREE (drawn from the seed). `> Origin.OLD` is what a
        training calls the new parameters. Old and copied entries may be scaled, and share noise that cancels.
        """
        from growlib.origin import origins

        return origins(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        return {
            "method": self.method,
            "seed": self.seed,
            "exact": self.exact,
            "reasons": list(self.reasons),
            "config": self.config.to_dict(),
            "axes": {name: axis_map.to_dict() for name, axis_map in self.maps.items()},
            "layers": {name: dataclasses.asdict(layer_map) for name, layer_map in self.layers.items()},
            "tensors": [{k: v for k, v in vars(entry).items() if k != "layout"} for entry in self.entries],
            "mixture": self.mixture and self.mixture.to_dict(),
        }

    def __str__(self) -> str:
        from growlib.show import plan_table

        return plan_table(self)


def make_plan(family: Family, method: Method, seed: int, source: Skeleton, target: Skeleton) -> GrowthPlan:
    """Decide a growth. Raises GrowError where the request has no meaning; what is only inexact becomes a reason."""
    asked = f"growing {family.model_type} with method {method.name!r}"
    depths = family.layer_counts(source.config)
    old, new = ({**family.layer_counts(s.config), **family.sizes(s.config)} for s in (source, target))
    field = {name: axis.size for name, axis in family.axes.items()} | {name: name for name in depths}
    shrinks = dict.fromkeys(f"{field[name]} {old[name]} -> {new[name]}" for name in old if new[name] < old[name])
    if shrinks:
        raise GrowError(asked, f"sizes would shrink: {', '.join(shrinks)}", "sizes at least the source's")
    grows = {name for name in old if new[name] != old[name]}
    if method.width is None and grows - depths.keys():
        wrong = f"{method.name} grows depth only, and {', '.join(sorted(grows - depths.keys()))} would grow"
        raise GrowError(asked, wrong, f"method 'lossless+{method.name}'")
    if method.depth is None and grows & depths.keys():
        raise GrowError(asked, f"{method.name} does not grow depth", f"method '{method.name}+lossless'")
    maps = _maps(family, method, seed, old, new, source.config)
    layers = {
        stack.layers: _fitted(layer_map(method, old[stack.layers], new[stack.layers]), stack, source, target)
        for stack in family.stacks
    }
    maps |= {name: _of_layers(layers[axis.size]) for name, axis in family.axes.items() if axis.meets == "layers"}
    entries = tuple(_entries(asked, family, old, new, maps, layers, source, target))
    _check_shapes(asked, family, entries, old, new)
    _check_all_used(asked, family, layers, entries, source)
    reasons = [axis_map.inexact for axis_map in maps.values() if axis_map.inexact]
    reasons += [stack.inexact for stack in layers.values() if stack.inexact]
    reasons += of_family(family, old, new, grows, source.config, target.config)
    reasons += of_config(family, layers, source.config, target.config)
    initializer_range = getattr(source.config, "initializer_range", 0.02)
    return GrowthPlan(
        method.name,
        seed,
        target.config,
        old,
        new,
        maps,
        layers,
        entries,
        tuple(dict.fromkeys(reasons)),
        initializer_range,
    )


def _fitted(layers: LayerMap, stack: Stack, source: Skeleton, target: Skeleton) -> LayerMap:
    """The map with each layer copied from one with the same tensors: in some classes the first layers are others."""
    have, need = _layer_kinds(stack, source), _layer_kinds(stack, target)
    if all(need.get(t) == have.get(s) for t, s in enumerate(layers.source)):
        return layers
    like = [[s for s in range(layers.old) if have.get(s) == need.get(t)] for t in range(len(layers.source))]
    if not all(like):
        return layers
    nearest = tuple(min(like[t], key=lambda s: abs(s - source)) for t, source in enumerate(layers.source))
    if not any(layers.identity):
        return dataclasses.replace(layers, source=nearest) if set(nearest) == set(layers.source) else layers
    acting, place = {}, 0  # old layers in their order, each in the first place that takes it
    for t, options in enumerate(like):
        if place in options:
            acting[t], place = place, place + 1
    if place < layers.old:
        return layers
    chosen = tuple(acting.get(t, nearest[t]) for t in range(len(nearest)))
    return dataclasses.replace(layers, source=chosen, identity=tuple(t not in acting for t in range(len(chosen))))


def _layer_kinds(stack: Stack, model: Skeleton) -> dict[int, set[str]]:
    """For each layer the names of its tensors, and what the config's per-layer lists say about it."""
    kinds: dict[int, set[str]] = defaultdict(set)
    for name in model.shapes:
        base = model.base(name)
        if (layer := stack.layer_of(base)) is not None:
            kinds[layer].add(base.partition(f".{layer}.")[2])
    for key, value in model.config.to_dict().items():
        if isinstance(value, list) and len(value) == len(kinds):
            for layer, entry in enumerate(value):
                kinds[layer].add(f"{key}: {entry}")
    return dict(kinds)


def layer_map(method: Method, old: int, new: int) -> LayerMap:
    """The method's map of one stack; a method without depth leaves it as it is."""
    return method.depth(old, new) if method.depth else LayerMap(old, tuple(range(old)), (False,) * old)


def _maps(
    family: Family, method: Method, seed: int, old: Mapping[str, int], new: Mapping[str, int], config: PreTrainedConfig
) -> dict[str, AxisMap]:
    if method.width is None:
        return {}
    maps = {}
    for name, axis in family.axes.items():
        if axis.meets and axis.meets != "layers":
            maps[name] = method.width(name, axis, old, new, seed)
            if axis.scaled_by == "never" or (axis.scaled_by and not getattr(config, axis.scaled_by)):
                maps[name] = _unscaled(maps[name])
    return maps


def _of_layers(layers: LayerMap) -> AxisMap:
    """What reads something of each layer reads it of those that act."""
    source = np.where(layers.identity, -1, layers.source)
    return AxisMap(layers.old, source, split_evenly(layers.old, source))


def _unscaled(axis_map: AxisMap) -> AxisMap:
    """The map of queries whose scores are not divided by sqrt(head_dim)."""
    wider = (axis_map.new / axis_map.old) ** 0.5
    if axis_map.new_writes == "zero":  # queries under a norm, whose weight holds the scale
        return dataclasses.replace(axis_map, gain=axis_map.gain / wider)
    return dataclasses.replace(axis_map, write=axis_map.write / wider)


def _entries(
    asked: str,
    family: Family,
    old: Mapping[str, int],
    new: Mapping[str, int],
    maps: Mapping[str, AxisMap],
    layers: Mapping[str, LayerMap],
    source: Skeleton,
    target: Skeleton,
) -> Iterator[Entry]:
    unknown = [name for name in target.shapes if family.template(target.base(name))[0] not in family.tensors]
    if unknown:
        raise GrowError(
            asked,
            f"the {family.model_type} table does not know the tensors {', '.join(unknown)}",
            "a class whose tensors are all in growlib/families",
        )
    tied = {_head_reads(family, pair) for pair in family.ties.items() if set(pair) & target.aliases}
    wider = new["hidden"] / old["hidden"]
    embedding, head = wider**-family.embedding_power, wider**-family.head_power
    for name, new_shape in target.shapes.items():
        row, stack, layer = family.template(target.base(name))
        if family.ties.get(row) in target.aliases:
            row = family.ties[row]  # a tied head that stands before its embedding grows as the embedding does
        layout, constant, origin, more = family.tensors[row], None, row, {}
        if stack:
            origin = row.replace("*", str(layers[stack.layers].source[layer]), 1)
            constant = _identity_constant(stack, row, layer, layers[stack.layers])
            more = _other_layers(row, layer, layers[stack.layers], layout, maps, source)
        names = [origin, *(n for pair in family.ties.items() if origin in pair for n in pair)]
        found = next((full for base in names if (full := source.find(base))), None)
        if found is None and not row.endswith(".bias"):
            raise GrowError(asked, f"the source has no tensor for {name}", "a class with the source's tensors")
        looked_up = layout and layout[0].parts == (("vocab",),) and layout[0].side == "read"
        factor = embedding if looked_up else 1.0
        if row.startswith(family.head_norm + ".") and (not stack or layer == len(layers[stack.layers].source) - 1):
            (axis,) = layout[0].parts[0]
            factor = head * (maps[axis].tied_gain / embedding if axis in tied and maps else 1.0)
        old_shape = source.shapes[found] if found else _shape(layout, old, new_shape)
        yield Entry(name, found, layout, old_shape, new_shape, constant, factor, **more)


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


def _head_reads(family: Family, rows: tuple[str, str]) -> str | None:
    """The axis that a head reads, where one of the rows writes the vocabulary."""
    layouts = [family.tensors[row] for row in rows if row in family.tensors]
    heads = [layout for layout in layouts if len(layout) == 2 and layout[0] == Dim((("vocab",),), "write")]
    return heads[0][1].parts[0][0] if heads else None


def _identity_constant(stack: Stack, row: str, layer: int, layers: LayerMap) -> float | None:
    """What makes a new block the identity: zero writers; in a post-norm block, also norms of (1, 0).

    The last of the blocks that stand in for a source layer keeps that layer's last norm (design: post-norm depth).
    """
    name = row.removeprefix(stack.block)
    part, _, kind = name.rpartition(".")
    identity = layers.identity[layer]
    followed = layer + 1 < len(layers.identity) and layers.identity[layer + 1]
    if identity and (part in stack.writers or name in stack.writers):
        return 0.0
    if (identity and part in stack.inner_norms) or (followed and part == stack.last_norm):
        return 1.0 if kind == "weight" else 0.0
    return None


def _shape(layout: Layout, sizes: Mapping[str, int], shape: Shape) -> Shape:
    """The shape that a layout has under these sizes. An axis without a size (`fixed`) keeps its length in `shape`."""
    return tuple(
        sum(prod(sizes[axis] for axis in part) for part in dim.parts) if dim.parts[0][0] in sizes else length
        for dim, length in zip(layout, shape, strict=True)
    )


def _check_shapes(
    asked: str, family: Family, entries: tuple[Entry, ...], old: Mapping[str, int], new: Mapping[str, int]
) -> None:
    for entry in entries:
        for shape, sizes in ((entry.old_shape, old), (entry.new_shape, new)):
            right = _shape(entry.layout, sizes, entry.old_shape)
            if shape == right:
                continue
            if family.proven is None:
                raise GrowError(asked, f"{entry.name} has the shape {shape}", f"{right}, by config and family table")
            wrong = f"{entry.name} would change from {entry.old_shape} to {shape}, and inference cannot tell how"
            raise GrowError(asked, wrong, f"sizes that leave it {right}, or a table in growlib/families")


def _check_all_used(
    asked: str, family: Family, layers: Mapping[str, LayerMap], entries: tuple[Entry, ...], source: Skeleton
) -> None:
    used, lost = {entry.source for entry in entries}, []
    for name in source.shapes:
        _, stack, layer = family.template(source.base(name))
        if name not in used and (stack is None or layer in layers[stack.layers].source):
            lost.append(name)
    if lost:
        raise GrowError(
            asked,
            f"the target has no place for the source's {', '.join(lost)}",
            "a target with the source's tensors (compare tie_word_embeddings and the bias flags)",
        )
