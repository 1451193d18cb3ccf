"""Which config field says which size, found by building a class at other sizes without memory for its values."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.architectures.schema import size_of
from growlib.checkpoint.loading import skeleton_of
from growlib.config import DERIVED_FIELDS, LayerSources, settled
from growlib.growth_plan import Skeleton
from growlib.inference.tiny import LAYERS, SIZE_OF, same_width
from growlib.inference.tiny_layers import layer_counts
from growlib.layer_fields import follow_layers
from growlib.layouts import Layout
from growlib.media import PLACEHOLDER
from growlib.parts import flat, last_word, own_part, part_in, rebuilt, value_of

ABSENT = 72  # what a field that is None is set to
HEADS = ("head", "k", "head_dim")  # hints of the axes that a number of heads says something of
CONSTANTS = range(2, 9)
TRIES = 20_000  # of one group of axes

# The parts of a dimension, its length, and the config under which it has that length.
Check = tuple[tuple[tuple[str, ...], ...], int, PreTrainedConfig]


def evenly(counted: str, old: int, new: int) -> list[int]:
    """The source of each new layer where each old one is followed by its share."""
    return [layer * old // new for layer in range(new)]


@dataclass(frozen=True)
class Build:
    """The class built with one field changed."""

    field: str
    was_absent: bool
    skeleton: Skeleton


def builds(model_class: type[PreTrainedModel], base: Skeleton, part: str = "") -> list[Build]:
    """One for each config field that is doubled, or set where it is None and this changes the class's shapes.

    Where doubling changes none, no size is this field's, whatever its number; of a part that is not the text such
    fields are no candidates anyway. The fields are those of a part; of the text and the top level where it is "".
    """
    built_with = []
    links = same_width(base.config)
    fields = flat(base.config)
    counted = {name: count for name, count in layer_counts(base.config, LAYERS).items() if name not in fields}
    listed = {name: 2 * count for name, count in counted.items() if name in settled(base.config, {name: 2 * count})}
    for name, value in {**{name: counted[name] for name in listed}, **fields}.items():
        if part_in(name) not in own_part(base.config, part) or name in links:
            continue
        if isinstance(value, bool) or PLACEHOLDER.search(name) or not (value is None or isinstance(value, int)):
            continue
        try:
            built = skeleton_of(model_class, changed(base.config, {name: 2 * value if value else ABSENT}))
        except Exception:  # whatever a class of transformers raises: it cannot be built so
            continue
        if built.shapes != base.shapes or (value and not part):
            built_with.append(Build(name, value is None, built))
    return built_with


def changed(
    config: PreTrainedConfig,
    fields: Mapping[str, Any],
    stacks: Collection[str] = (),
    sources: LayerSources = evenly,
) -> PreTrainedConfig:
    """The config with other values; what says something of each layer follows the layers that grow.

    `stacks` are fields known to count layers. A field of an unknown name may do so: lists of its length follow it.
    """
    values = {name: value for name, value in flat(config).items() if last_word(name) not in DERIVED_FIELDS}
    links = same_width(config)
    fields = {**{link: fields[width] for link, width in links.items() if width in fields}, **fields}
    for name, new in fields.items():
        old = values.get(name, value_of(config, name))
        counts_layers = name in stacks or SIZE_OF.get(last_word(name), 3) == 3
        if counts_layers and isinstance(old, int) and isinstance(new, int) and new > old > 1:
            certain = name in stacks or last_word(name) in LAYERS
            kept = {n for n, v in values.items() if not certain and not (isinstance(v, list) and len(v) == old)}
            follow_layers(values, name, old, sources(name, old, new), {*fields, *kept})
    return rebuilt(config, {**values, **fields})


def candidates(
    size: int, config: PreTrainedConfig, hint: str, part: str = "", acting: Collection[str] = ()
) -> list[str]:
    """Expressions of a part's config with this size, the likeliest first.

    Of a part that is not the text, only fields count that change a shape (`acting`): others may have the size of what
    the text says. The number of heads need not change one.
    """
    links = same_width(config)
    numbers = {
        name: value
        for name, value in flat(config).items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not PLACEHOLDER.search(name)
        if part_in(name) in own_part(config, part) and name not in links
        if not part or name in acting or ("head" in name and hint.rpartition(" ")[2] in HEADS)
    }
    # A field whose name says what the axis is for comes first, then the usual names.
    order = sorted(
        numbers, key=lambda name: (-sum(word in name for word in hint.split()), last_word(name) not in SIZE_OF)
    )
    options = [name for name in order if numbers[name] == size]
    options += [f"{a} / {b}" for a in order for b in order if a != b and numbers[a] == size * numbers[b]]
    options += [f"{a} * {c}" for a in order for c in CONSTANTS if numbers[a] * c == size]
    options += [f"{a} / {c}" for a in order for c in CONSTANTS if numbers[a] == size * c]
    options += [f"{a} * {b}" for a in order for b in order if a < b and numbers[a] * numbers[b] == size]
    options += [f"{a} * {a}" for a in order if part and numbers[a] * numbers[a] == size]  # patches of a square
    options += [f"{a} + {c}" for a in order for c in (1, 2) if numbers[a] + c == size]
    return [*options, str(size)]


def choose(
    sizes: Mapping[str, int],
    hints: Mapping[str, str],
    layouts: Mapping[str, Layout],
    row_of: Any,
    base: Skeleton,
    others: Iterable[Build],
    part: str = "",
    layers: Collection[str] = (),
) -> dict[str, str]:
    """For each axis the expression of its size under which every dimension has its length in every build.

    Axes whose sizes no expressions explain are left out.
    """
    others = list(others)
    present = [base, *(build.skeleton for build in others if not build.was_absent)]
    checks = [check for skeleton in present for check in _checks(sizes, layouts, row_of, skeleton)]
    acting = {build.field for build in others if build.skeleton.shapes != base.shapes}.difference(layers)
    options = {name: candidates(n, base.config, hints.get(name, name), part, acting) for name, n in sizes.items()}
    chosen: dict[str, str] = {}
    for group in _groups(sizes, checks):
        chosen |= _solve(group, options, checks)
    for build in others:
        if build.was_absent:
            chosen = _with_field(chosen, build.field, _checks(chosen, layouts, row_of, build.skeleton))
    return chosen


def _checks(sizes: Collection[str], layouts: Mapping[str, Layout], row_of: Any, skeleton: Skeleton) -> list[Check]:
    dimensions = {
        (dim.parts, length)
        for name, shape in skeleton.shapes.items()
        for dim, length in zip(layouts.get(row_of(skeleton.base(name)), ()), shape, strict=False)
        if all(axis in sizes for part in dim.parts for axis in part)
    }
    return [(parts, length, skeleton.config) for parts, length in dimensions]


def _groups(names: Iterable[str], checks: list[Check]) -> list[set[str]]:
    """Axes that stand in one dimension, directly or through others, are chosen together."""
    groups = [{name} for name in names]
    for check in checks:
        joined = [group for group in groups if group & _axes(check)]
        groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return groups


def _solve(group: set[str], options: Mapping[str, list[str]], checks: list[Check]) -> dict[str, str]:
    """Choose for a group of axes; where no choice fits, for what is left without one of them."""
    own = [check for check in checks if _axes(check) <= group]
    chosen = _search(_order(group, options), {}, options, own, iter(range(TRIES)))
    if chosen is not None or len(group) < 2:
        return chosen or {}
    rest = [group - {name} for name in sorted(group, key=lambda name: (name in ("hidden", "vocab"), name))]
    smaller = [
        {k: v for part in _groups(g, _within(g, own)) for k, v in _try(part, options, own).items()} for g in rest
    ]
    return max(smaller, key=len)


def _within(group: set[str], checks: list[Check]) -> list[Check]:
    return [check for check in checks if _axes(check) <= group]


def _try(group: set[str], options: Mapping[str, list[str]], checks: list[Check]) -> dict[str, str]:
    return _search(_order(group, options), {}, options, _within(group, checks), iter(range(TRIES // 10))) or {}


def _order(group: Iterable[str], options: Mapping[str, list[str]]) -> list[str]:
    """Heads before what is counted per head: their number may show in no shape at all."""
    return sorted(group, key=lambda name: ("heads" not in name, len(options[name]), name))


def _search(
    names: list[str],
    chosen: dict[str, str],
    options: Mapping[str, list[str]],
    checks: list[Check],
    budget: Iterator[int],
) -> dict[str, str] | None:
    if len(chosen) == len(names):
        return chosen
    name = names[len(chosen)]
    for expression in options[name]:
        if next(budget, None) is None:
            return None
        tried = {**chosen, name: expression}
        ready = [c for c in checks if {name} <= _axes(c) <= tried.keys()]
        if all(_holds(check, tried) for check in ready):
            complete = _search(names, tried, options, checks, budget)
            if complete:
                return complete
    return None


def _with_field(chosen: dict[str, str], field: str, checks: list[Check]) -> dict[str, str]:
    """The field put before the one expression that it overrules."""
    for name, expression in chosen.items():
        tried = {**chosen, name: f"{field} or {expression}"}
        if not all(_holds(c, chosen) for c in checks) and all(_holds(c, tried) for c in checks):
            return tried
    return chosen


def _axes(check: Check) -> set[str]:
    return {axis for part in check[0] for axis in part}


def _holds(check: Check, chosen: Mapping[str, str]) -> bool:
    parts, length, config = check
    values = {axis: size_of(chosen[axis], config) for axis in _axes(check)}
    return None not in values.values() and sum(prod(values[axis] or 0 for axis in part) for part in parts) == length
