"""What a config says about its layers one by one: lists, dicts by number, numbers of layers, counts up to a place."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from growlib.maps import LayerMap
from growlib.parts import beside, last_word, part_in

# Fields that count layers up to a place in the stack, and those that count them from a place to the end.
FROM_THE_START = frozenset({"max_window_layers", "first_k_dense_replace", "num_dense_layers"})
TO_THE_END = frozenset({"num_kv_shared_layers"})
# Of these, what says which layers have other tensors stays: the planner gives each place a layer of its kind.
_STAYS = frozenset({"first_k_dense_replace", "num_dense_layers"})
# Fields that say behind which layers the output is taken: numbers of layers, or of the hidden states, of which the
# first is the first layer's input. They say where new layers may stand, and go on to name what they named.
_TAKEN = re.compile(r"deepstack\w*_(indexes|indices)|feature_layers?$")
_SIDES = re.compile(r"(image|patch|input|window|tile|crop)_size$")  # a height and a width say nothing of layers
_STAGES = frozenset({"out_features", "out_indices"})
# Names of fields that list layers by their numbers. A list of flags, such as no_rope_layers, is none.
_NUMBERS = re.compile(r"idx|ind(ices|exes)|(?<!rope)_layers$|layer_ids")


def follow_layers(
    fields: dict[str, Any], counted: str, old: int, layers: Sequence[int], named: Collection[str] = ()
) -> None:
    """Let lists and counts follow the layers that the field `counted` counts, in its own part of the config.

    Args:
        fields: flat fields, which are changed.
        counted: the field that says how many layers there are, such as `num_hidden_layers`.
        old: how many there were.
        layers: for each new layer the old one that it comes from.
        named: fields that the user gave: they stay.
    """
    own = _of_this_stack(beside(fields, counted), counted)
    fields |= {key: value for key, value in followed(own, old, layers).items() if key not in named}


def _of_this_stack(own: Mapping[str, Any], counted: str) -> Mapping[str, Any]:
    """The fields without those that speak of the other half of an encoder and a decoder.

    A field whose name says neither speaks of the encoder: LED's attention_window is as long as encoder_layers.
    """
    halves = ("encoder", "decoder")
    word = next((half for half in halves if half in last_word(counted)), "")
    other = counted.replace(word, halves[word == "encoder"]) if word else counted
    if not word or other not in own:
        return own
    named = {key: next((half for half in halves if half in last_word(key)), "encoder") for key in own}
    return {key: value for key, value in own.items() if named[key] == word}


def followed(own: Mapping[str, Any], old: int, layers: Sequence[int]) -> dict[str, Any]:
    """Those fields of a part of a config that say something of each layer, with what they say of the new layers."""
    made: dict[str, Any] = {}
    for key, value in own.items():
        name = last_word(key)
        if name in _STAGES:
            made[key] = _stages(value, old, layers)
        elif _TAKEN.search(name) and lists_numbers(name, value, old):
            made[key] = [max(new for new, layer in enumerate(layers) if layer == taken) for taken in value]
        elif lists_numbers(name, value, old):
            made[key] = [new for new, layer in enumerate(layers) if layer in value]
        elif isinstance(value, list | tuple) and len(value) == old and not _SIDES.search(name):
            made[key] = [value[layer] for layer in layers]
        elif is_by_number(value, old):
            said = {int(number): facts for number, facts in value.items()}
            made[key] = {f"{new:02d}": said[layer] for new, layer in enumerate(layers) if layer in said}
        elif type(value) is int and 0 < value <= old and list(layers) == sorted(layers):
            if name in FROM_THE_START - _STAYS:
                made[key] = sum(layer < value for layer in layers)
            elif name in TO_THE_END:
                made[key] = sum(layer >= old - value for layer in layers)
    return made


def _stages(value: Any, old: int, layers: Sequence[int]) -> Any:
    """What names the outputs of layers: 0 is the first one's input, `stage4` and 4 the output of the fourth."""

    def moved(stage: Any) -> Any:
        name, number = ("stage", stage[5:]) if isinstance(stage, str) and stage.startswith("stage") else ("", stage)
        if not str(number).isdigit() or not 0 < int(number) <= old:
            return stage
        new = len(layers) if int(number) == old else layers.index(int(number) - 1) + 1
        return f"{name}{new}" if name else new

    return [moved(stage) for stage in value] if isinstance(value, list | tuple) else value


def kinds_said(own: Mapping[str, Any], count: int) -> list[tuple[str, ...]]:
    """What the fields of a part of a config say about each of its `count` layers."""
    said: list[list[str]] = [[] for _ in range(count)]
    for key, value in ((last_word(name), value) for name, value in own.items()):
        for layer, facts in enumerate(said if key not in _STAGES else []):
            if _TAKEN.search(key):
                facts.append(f"{key}: {[layer < end for end in _ends(key, value, count)]}")
            elif lists_numbers(key, value, count):
                facts.append(f"{key}: {layer in value}")
            elif isinstance(value, list | tuple) and len(value) == count and not _SIDES.search(key):
                facts.append(f"{key}: {value[layer]}")
            elif is_by_number(value, count):
                facts.append(f"{key}: {next((v for n, v in value.items() if int(n) == layer), None)}")
            elif key in FROM_THE_START and type(value) is int:
                facts.append(f"{key}: {layer < value}")
            elif key in TO_THE_END and type(value) is int:
                facts.append(f"{key}: {layer >= count - value}")
    return [tuple(facts) for facts in said]


def _ends(key: str, value: Any, count: int) -> list[int]:
    """How many of `count` layers stand before each place where the output is taken."""
    places = [v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int]
    if key.startswith("deepstack"):
        return [place + 1 for place in places]
    return [place if place >= 0 else count + 1 + place for place in places]


def taken_elsewhere(fields: Mapping[str, Any], counted: str) -> dict[str, Any]:
    """The fields around a part that say which of its layers' outputs are taken: `vision_feature_layer`."""
    word = last_word(part_in(counted)).partition("_")[0]
    named = {key: v for key, v in fields.items() if part_in(key) != part_in(counted) and _TAKEN.search(last_word(key))}
    return {key: v for key, v in named.items() if word and last_word(key).startswith(f"{word}_feature_layer")}


def says_the_same(key: str, old: Any, new: Any, layers: LayerMap) -> bool:
    """Whether a field says of each layer that acts what it said of its source."""
    before, after = kinds_said({key: old}, layers.old), kinds_said({key: new}, len(layers.source))
    if not (before and before[0] and after[0]):
        return False
    return all(i or after[t] == before[s] for t, (s, i) in enumerate(zip(layers.source, layers.identity, strict=True)))


def lists_numbers(key: str, value: Any, count: int) -> bool:
    """Whether a field lists some of `count` layers by their numbers, or all or none of them."""
    if not (_NUMBERS.search(key) and isinstance(value, list | tuple)):
        return False
    return all(type(layer) is int and 0 <= layer < count for layer in value) and list(value) == sorted(set(value))


def is_by_number(value: Any, count: int) -> bool:
    """Whether a field says something of some layers, by their numbers: {"05": {"head_dim": 512}}."""
    if not (isinstance(value, Mapping) and value and all(isinstance(facts, Mapping) for facts in value.values())):
        return False
    return all(str(number).isdigit() and int(number) < count for number in value)
