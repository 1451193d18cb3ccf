"""The exact growth that is nearest to one that is not: for whoever cannot have the sizes that they asked for."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growlib import operators
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.loading import Source
from growlib.config import NO_FUNCTION, Target
from growlib.errors import GrowError
from growlib.growth import plan, table_for, target_of
from growlib.growth_plan import GrowthPlan
from growlib.operators import Method
from growlib.parts import flat, flattened, last_word

TURNS = 6  # of the search, a plan each
Fields = dict[str, Any]


def nearest_exact(small_ckpt: Source | PreTrainedConfig, target_config: Target, method: str | Method) -> Fields | None:
    """The fields in which the nearest exact target differs from the one that is asked for; None: none was found.

    What would shrink stays. A size that cannot be exact becomes the next whole multiple of the source's, or stays; a
    setting stays. Then each change that was not needed is taken back. The arguments are those of `growlib.plan`.
    """
    model_class, skeleton = checkpoint.describe(small_ckpt)
    try:
        if isinstance(target_config, Mapping):
            target_config = flattened(skeleton.config, target_config)
        table = table_for(skeleton.config, model_class, target_config)
        target = target_of(skeleton.config, table, target_config, operators.method(method))
    except GrowError:
        return None
    if target.model_type != skeleton.config.model_type:
        return None
    before, after = flat(skeleton.config), flat(target)
    wanted = {
        key: value for key, value in after.items() if last_word(key) not in NO_FUNCTION and before.get(key) != value
    }
    # Lists of layers follow the number of layers, which may become another one here.
    wanted = {key: value for key, value in wanted.items() if not _is_longer(before.get(key), value)}
    found = {key: before[key] if _shrinks(before.get(key), value) else value for key, value in wanted.items()}
    tried: list[Fields] = []
    for _ in range(TURNS):
        made = _planned(small_ckpt, found, method)
        if isinstance(made, GrowthPlan) and made.exact:
            grows = not wanted or any(value != before[key] for key, value in found.items())
            return _without_needless(small_ckpt, wanted, found, method) if grows else None
        tried.append(found)
        said = str(made) if isinstance(made, GrowError) else "; ".join(made.reasons)
        found = _repaired(before, found, said)
        if found in tried:
            return None
    return None


def _shrinks(old: Any, new: Any) -> bool:
    return type(old) is int and type(new) is int and new < old


def _is_longer(old: Any, new: Any) -> bool:
    return isinstance(old, list) and isinstance(new, list) and len(old) != len(new)


def _planned(small_ckpt: Source | PreTrainedConfig, target: Mapping[str, Any], method: str | Method) -> Any:
    try:
        return plan(small_ckpt, target, method)
    except GrowError as error:
        return error


def _repaired(before: Fields, found: Fields, said: str) -> Fields:
    """What is said against a target mended in the fields that it names, or else in all of them."""
    words = set(re.findall(r"\w+", said))
    named = {key for key in found if key in words and found[key] != before[key]}
    repaired = dict(found)
    for key in named or {key for key in found if found[key] != before[key]}:
        old, new = before[key], found[key]
        is_size = type(old) is int and type(new) is int and 0 < old < new
        repaired[key] = -(-new // old) * old if is_size and new % old else old
    return repaired


def _without_needless(
    small_ckpt: Source | PreTrainedConfig, wanted: Fields, found: Fields, method: str | Method
) -> Fields:
    """The changes that an exact growth needs."""
    for key in [key for key in found if found[key] != wanted[key]]:
        tried = _planned(small_ckpt, {**found, key: wanted[key]}, method)
        if isinstance(tried, GrowthPlan) and tried.exact:
            found = {**found, key: wanted[key]}
    return {key: value for key, value in found.items() if value != wanted[key]}
