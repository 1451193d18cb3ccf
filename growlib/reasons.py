"""Why a growth is not known to preserve the function: growths without a proof, and config fields that change it."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growlib.axes import LayerMap
from growlib.families.schema import Family, growth_name

# Config fields that do not change what a model computes in eval mode (dropout aside, see `_config_reasons`).
_NEUTRAL_FIELDS = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "problem_type", "id2label", "label2id"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    "stage_names",
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "pretraining_tp", "tie_word_embeddings"),
}


def of_family(
    family: Family,
    old: Mapping[str, int],
    new: Mapping[str, int],
    grows: set[str],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
) -> list[str]:
    """What the family says against a growth: its conditions, and growths of an inferred table without a proof."""
    reasons = [
        f"{c.field}={c.value(target)!r}: {c.why}" for c in family.conditions if c.grows in grows and not c.holds(target)
    ]
    if not family.proven:  # a table that tests hold, or one that the judge is hearing
        return reasons
    names = {name: growth_name(name, old[name], new[name]) if name in family.axes else name for name in grows}
    wrong = {name: family.proven.get(growth, "it was not tried") for name, growth in names.items()}
    sizes = family.size_fields() - family.follows.keys()
    if sum(getattr(source, field, None) != getattr(target, field, None) for field in sizes) > 1:
        wrong["several sizes at once"] = family.proven.get("together", "")
    return reasons + [
        f"growth of {name} is not proven for {family.model_type}: {why}" for name, why in wrong.items() if why
    ]


def _follows_layers(old: Any, new: Any, stack: LayerMap) -> bool:
    """A per-layer list that says for each layer that acts what it said for its source, or a name of the last layer."""
    depths = stack.old, len(stack.source)
    if (old, new) in (tuple([n] for n in depths), tuple([f"stage{n}"] for n in depths)):
        return True
    if not (isinstance(old, list) and isinstance(new, list) and (len(old), len(new)) == depths):
        return False
    return all(i or new[t] == old[s] for t, (s, i) in enumerate(zip(stack.source, stack.identity, strict=True)))


def of_config(
    family: Family, layers: Mapping[str, LayerMap], source: PreTrainedConfig, target: PreTrainedConfig
) -> list[str]:
    before, after = source.to_dict(), target.to_dict()
    known = _NEUTRAL_FIELDS | family.size_fields() | family.free_fields
    known |= {key for key in before for stack in layers.values() if _follows_layers(before[key], after.get(key), stack)}
    return [
        f"{key} changes from {before.get(key)!r} to {after.get(key)!r}, which changes the function"
        for key in sorted(before.keys() | after.keys())
        if key not in known and "drop" not in key and before.get(key) != after.get(key)
    ]
