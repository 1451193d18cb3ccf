"""The layers of a tiny model: few, and of every kind that its class and its config know."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.checkpoint.loading import skeleton_of
from growlib.growth_plan import Skeleton
from growlib.layer_fields import followed, is_by_number, kinds_said
from growlib.parts import flat, rebuilt, text_part, value_of

FEW, MOST = 3, 8  # layers of one kind, and kinds
PERIOD = 16  # layers among which every kind is found that comes with a period
MISLEADING = (4, 8)  # numbers of heads and of experts


def layer_counts(config: PreTrainedConfig, names: Sequence[str]) -> dict[str, int]:
    """The fields that count layers, also those that a config derives from a list; no second names."""
    counts = {name: value_of(config, name) for name in names if name not in config.attribute_map}
    return {name: count for name, count in counts.items() if type(count) is int}


def few_layers(fields: dict[str, Any], names: Sequence[str], counts: Mapping[str, int], of_each: int) -> None:
    """Leave a layer of each kind that the fields tell apart, or several of each, in their order, and three at least."""
    for name, count in counts.items():
        kinds: dict[tuple[str, ...], list[int]] = {}
        for layer, kind in enumerate(kinds_said(fields, count)):
            kinds.setdefault(kind, []).append(layer)
        several = of_each if len(kinds) > 1 else 1
        chosen = [layer for alike in list(kinds.values())[:MOST] for layer in alike[:several]]
        wanted = min(count, max(FEW, len(chosen) + (len(chosen) in MISLEADING)))
        layers = sorted([*chosen, *[chosen[0]] * (wanted - len(chosen))]) if chosen else []
        fields |= {key: value for key, value in followed(fields, count, layers).items() if key not in names}
        if name in fields:
            fields[name] = len(layers)


def small_by_number(fields: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of single layers, such as a larger head_dim, made as much larger than what is said of all."""
    return fields | {
        key: {
            number: {name: _in_proportion(v, before.get(name), fields.get(name)) for name, v in said.items()}
            for number, said in value.items()
        }
        for key, value in fields.items()
        if is_by_number(value, PERIOD)
    }


def _in_proportion(value: Any, old: Any, new: Any) -> Any:
    sizes = all(type(v) is int and v > 0 for v in (value, old, new))
    return max(value * new // old, 1) if sizes else value


def without_derived(
    config: PreTrainedConfig, fields: Mapping[str, Any], known: Collection[str], optional: bool
) -> dict[str, Any]:
    """The fields, less the sizes that the class derives from others: always, or, where `optional`, if not given."""
    if "__dataclass_fields__" not in vars(type(config)):
        return dict(fields)
    given = {field.name: field.default for field in dataclasses.fields(type(config))}
    sizes = {name for name, value in fields.items() if type(value) is int and name not in known}
    derived = {name for name in sizes if name not in given or (optional and given[name] is None)}
    return {name: value for name, value in fields.items() if name not in derived}


def with_all_kinds(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, names: Sequence[str]
) -> PreTrainedConfig:
    """The config with as many layers as it takes to have each kind that a deeper model has, such as every eighth's."""
    part = text_part(config)
    for name in (f"{part}.{name}" if part else name for name in names):
        count = value_of(config, name)
        if type(count) is not int or not 0 < count < PERIOD or name not in flat(config):
            continue
        wanted = _kinds(_deeper(model_class, config, name, PERIOD))
        if not wanted or wanted == _kinds(_deeper(model_class, config, name, count)):
            continue
        for more in range(count + 1, PERIOD):
            if _kinds(_deeper(model_class, config, name, more)) == wanted:
                config = _with_layers(config, name, more)
                break
    return config


def _with_layers(config: PreTrainedConfig, name: str, count: int) -> PreTrainedConfig:
    fields, old = flat(config), value_of(config, name)
    layers = [layer * old // count for layer in range(count)]
    return rebuilt(config, {**fields, **followed(fields, old, layers), name: count})


def _deeper(model_class: type[PreTrainedModel], config: PreTrainedConfig, name: str, count: int) -> Skeleton | None:
    try:
        return skeleton_of(model_class, _with_layers(config, name, count))
    except Exception:  # whatever a class of transformers raises: it cannot be built so
        return None


def _kinds(model: Skeleton | None) -> set[frozenset[tuple[str, Any]]]:
    """The kinds of numbered modules: the tensors that one holds, by name and shape."""
    if model is None:
        return set()
    layers: dict[tuple[str, str], set[tuple[str, Any]]] = defaultdict(set)
    for name, shape in model.shapes.items():
        if match := re.match(r"(.*?\.|)(\d+)\.(.*)", name):
            layers[match.group(1), match.group(2)].add((match.group(1) + match.group(3), shape))
    return {frozenset(tensors) for tensors in layers.values()}
