"""What makes a tiny model still too large, and smaller values for it: found by building the class without memory."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.media import PLACEHOLDER
from growlib.parts import flat, part_in, rebuilt, text_part

LEAST = 16  # smaller numbers are counts, which decide what is built
SMALL = 40
TAKEN = {64, 101}  # the width and the vocabulary: nothing else should look like them


def count_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """The parameters of a class, built without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())


def lessened(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, limit: int, fixed: Collection[str]
) -> dict[str, Any]:
    """Smaller values of the fields that make a model large, those that save most first, until it is below the limit.

    The fields in `fixed` stay. Those with one value, in the text or outside it, get smaller together: what one writes
    another may read. Where nothing more can be saved, what was found so far.
    """
    saving: list[tuple[int, dict[str, Any]]] = []
    for options in _options(flat(config), text_part(config), fixed):
        built = ((_count_with(model_class, config, fields), fields) for fields in options)
        saving += [found for found in built if found[0]][:1]
    chosen: dict[str, Any] = {}
    least = count_of(model_class, config)
    for count, fields in sorted(saving, key=lambda found: found[0]):
        if least <= limit:
            break
        if count < least or chosen:
            together = _count_with(model_class, config, {**chosen, **fields})
            if 0 < together < least:
                least, chosen = together, {**chosen, **fields}
    return chosen


def _options(fields: Mapping[str, Any], text: str, fixed: Collection[str]) -> Iterator[list[dict[str, Any]]]:
    """For each number, and each list of numbers, that may be made smaller: powers of two below it."""
    equal: dict[tuple[bool, str], list[str]] = {}
    for name, value in fields.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if name in fixed or PLACEHOLDER.search(name) or not numbers:
            continue
        if all(type(number) is int for number in numbers) and max(numbers) > SMALL and min(numbers) > 0:
            equal.setdefault((part_in(name) == text, str(value)), []).append(name)
    for names in equal.values():
        value = fields[names[0]]
        numbers = value if isinstance(value, list | tuple) else [value]
        smaller = [[number >> bits for number in numbers] for bits in _bits(max(numbers))]
        right = [made for made in smaller if min(made) > 0 and not TAKEN & set(made)]
        yield [dict.fromkeys(names, made if isinstance(value, list | tuple) else made[0]) for made in right]


def _bits(largest: int) -> Iterator[int]:
    """By how many bits to shift, the ones that come out near SMALL first."""
    enough = next(bits for bits in range(40) if largest >> bits <= SMALL)
    yield from (bits for bits in (enough, enough - 1, enough - 2) if bits > 0 and largest >> bits >= LEAST)


def _count_with(model_class: type[PreTrainedModel], config: PreTrainedConfig, fields: Mapping[str, Any]) -> int:
    """The parameters with some fields changed; 0 where the class cannot be built so."""
    try:
        return count_of(model_class, rebuilt(config, {**flat(config), **fields}))
    except Exception:  # whatever a class of transformers raises
        return 0


def derived(config: PreTrainedConfig, small: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Values of the fields that the config's class computes of the known ones, where it did so for this config."""
    own = config.to_dict()
    named = [name for name in own if name in known and name in small]
    try:
        before, after = (type(config)(**{n: fields[n] for n in named}).to_dict() for fields in (own, small))
    except Exception:  # whatever a class of transformers raises
        return {}
    numbers = [n for n, v in own.items() if type(v) is int and type(after.get(n)) is int and n not in named]
    return {n: after[n] for n in numbers if before.get(n) == own[n] != after[n]}
