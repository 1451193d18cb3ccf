"""The config of the grown model: what the user named, what stays, and what the table ties to it."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, gcd
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from growlib.architectures.schema import RESIDUAL, Architecture, fields_in
from growlib.errors import GrowError
from growlib.layer_fields import follow_layers
from growlib.parts import beside, flat, known_name, last_word, part_in, parts_of, rebuilt, towers, value_of

# What building or reading a config raises when its values make no sense.
_INVALID = (StrictDataclassError, OSError, ValueError, TypeError, KeyError)

# Fields that say whose config it is, and those that a config derives from its layers.
OWN_FIELDS = frozenset({"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"})
DERIVED_FIELDS = frozenset({"stage_names", "out_features", "out_indices"})
ALL_LAYERS = "num_hidden_layers"
TRIED = 256  # sizes of a field, in the search for one that is valid
# Fields that do not change what a model computes in eval mode (dropout aside).
NO_FUNCTION = OWN_FIELDS | {
    *("problem_type", "id2label", "label2id", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "stage_names", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
    *("pretraining_tp", "tie_word_embeddings"),
}

Target = PreTrainedConfig | Mapping[str, Any] | str | Path


# (the field that counts them, old number of layers, new number) -> the source layer of each new layer
LayerSources = Callable[[str, int, int], Sequence[int]]


def resolve(
    source: PreTrainedConfig, target: Target, table: Architecture, layer_sources: LayerSources
) -> PreTrainedConfig:
    """The target's config, of the source's class or of a mixture of experts. The source's config stays as it is.

    Per-layer lists that the target does not name (`layer_types`, ...) grow with the layers.

    Raises GrowError for another model type, a field that the config does not have, and sizes that the
    table forbids.
    """
    asked = f"growing {source.model_type} to {_describe(target)}"
    if isinstance(target, PreTrainedConfig):
        config = copy.deepcopy(target)
    elif isinstance(target, Mapping) and target.get("model_type", source.model_type) != source.model_type:
        config = _of_type(asked, source, target)
    elif isinstance(target, Mapping):
        config = _override(asked, source, target, table, layer_sources)
    elif not isinstance(target, str | Path):
        raise GrowError(asked, f"it is a {type(target).__name__}", "a config, a folder, or a dict of overrides")
    else:
        try:
            config = AutoConfig.from_pretrained(target, trust_remote_code=False)
        except _INVALID as error:
            raise GrowError(asked, _cause(error), "a folder with a config.json") from error
    _same_parts(asked, source, config)
    if config.model_type != source.model_type:
        if is_mixture(config):
            return config
        valid = f"a {source.model_type} config, or that of a mixture of experts"
        raise GrowError(asked, f"the target is a {config.model_type} model", valid)
    try:
        table.sizes(config)
    except (ValueError, ZeroDivisionError) as error:
        raise GrowError(asked, str(error), _dividing(source, config, table) or "sizes that divide") from error
    return config


def towers_changed(source: PreTrainedConfig, target: Target, table: Architecture) -> list[str]:
    """The parts beside the text of which a target changes a number, other than those that the text's table knows."""
    if isinstance(target, str | Path) and parts_of(source):
        try:
            target = AutoConfig.from_pretrained(target, trust_remote_code=False)
        except _INVALID:  # `resolve` says so
            return []
    before = flat(source)
    after = flat(target) if isinstance(target, PreTrainedConfig) else target if isinstance(target, Mapping) else {}
    named = {known_name(source, key): value for key, value in after.items()}
    changed = {key for key, value in named.items() if type(value) is int and before.get(key, value) != value}
    fields = changed - NO_FUNCTION - table.size_fields()
    return [part for part in towers(source) if any(part_in(field) == part for field in fields)]


def _dividing(source: PreTrainedConfig, config: PreTrainedConfig, table: Architecture) -> str:
    """The sizes next to those asked for with which each axis is a multiple of the one that shares it."""
    for axis in table.axes.values():
        if axis.groups and isinstance(size := value_of(config, axis.size), int):
            shared = table.axes[axis.groups].size
            part, least = value_of(config, shared), value_of(source, shared)
            if isinstance(part, int) and part > 0 and size % part:
                divisors = sorted((n for n in range(least, size + 1) if size % n == 0), key=lambda n: abs(n - part))
                return " or ".join([*(f"{shared}={n}" for n in divisors[:1]), f"{axis.size}={size + -size % part}"])
    return ""


def scaled(source: PreTrainedConfig, table: Architecture, factors: Mapping[str, Any]) -> dict[str, int]:
    """The overrides that scale a model: `width` scales hidden, FFN, heads and KV heads, `depth` the layers.

    Raises GrowError for another part, a factor below 1, and factors that make no whole number.
    """
    wide = (*RESIDUAL, "elementwise", "query_heads", "key_heads")
    words = {name for axis in table.axes.values() if axis.role in wide for name in fields_in(axis.size)}
    parts = {"width": words & table.size_fields(), "depth": set(table.layer_counts(source))}
    overrides: dict[str, int] = {}
    for part, factor in factors.items():
        asked = f"scaling {source.model_type} with {part}={factor!r}"
        if part not in parts:
            raise GrowError(asked, f"there is no part {part!r}", "width or depth")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < float("inf"):
            raise GrowError(asked, "it is no factor", "a number of at least 1, such as 1.5")
        sizes = {field: size for field in sorted(parts[part]) if type(size := value_of(source, field)) is int}
        odd = {field: size for field, size in sizes.items() if size * factor != int(size * factor)}
        if odd:
            common = gcd(*sizes.values())
            near = sorted({floor(common * factor) / common, ceil(common * factor) / common} - {0.0})
            wrong = ", ".join(f"{field}={size} would be {size * factor:g}" for field, size in odd.items())
            valid = " or ".join(f"{part}={factor:g}" for factor in near if factor >= 1)
            raise GrowError(asked, wrong, f"{valid}, or each field by itself")
        overrides |= {field: int(size * factor) for field, size in sizes.items()}
    return overrides


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether a config says anything about experts."""
    return any("expert" in field for field in flat(config))


def _same_parts(asked: str, source: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Raise GrowError where a part of the target is of another type than the source's."""
    theirs = parts_of(config)
    for name, part in parts_of(source).items():
        if name in theirs and theirs[name].model_type != part.model_type:
            wrong = f"its {name} is a {theirs[name].model_type} config"
            raise GrowError(asked, wrong, f"a {name} of the source's type, {part.model_type}")


def _of_type(asked: str, source: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of another type that says what the source's says, save what is named."""
    try:
        default = AutoConfig.for_model(overrides["model_type"])
    except _INVALID as error:
        raise GrowError(asked, f"there is no model type {overrides['model_type']!r}", "one of transformers") from error
    known = default.to_dict()
    overrides = {default.attribute_map.get(key, key): value for key, value in overrides.items()}
    unknown = [key for key in overrides if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known) or sorted(known)
        raise GrowError(asked, f"a {overrides['model_type']} config has no field {unknown[0]!r}", ", ".join(close))
    # A class may read a field that its config does not list, as Qwen3Moe reads head_dim.
    fields = {key: value for key, value in source.to_dict().items() if key not in OWN_FIELDS and value is not None}
    try:
        return AutoConfig.for_model(**{**fields, **overrides})
    except _INVALID as error:
        raise GrowError(asked, _cause(error), f"a {overrides['model_type']} config that can be built") from error


def _override(
    asked: str,
    source: PreTrainedConfig,
    overrides: Mapping[str, Any],
    table: Architecture,
    layer_sources: LayerSources,
) -> PreTrainedConfig:
    fields = flat(source)
    overrides = {key: value for key, value in overrides.items() if key not in ("dtype", "torch_dtype")}  # the plan's
    overrides = settled(source, overrides)
    derived = {layers: count for layers, count in table.layer_counts(source).items() if layers not in fields}
    fields |= derived  # a number of layers that the config counts in a list
    if type(overrides.get(ALL_LAYERS)) is int and ALL_LAYERS not in {
        **table.layer_counts(source),
        **source.attribute_map,
    }:
        same = value_of(source, ALL_LAYERS)  # a second field that says how many layers there are
        overrides |= {n: overrides[ALL_LAYERS] for n, count in table.layer_counts(source).items() if count == same}
    named = [known_name(source, key) for key in overrides]
    for key, known in zip(overrides, named, strict=True):
        if last_word(known) in OWN_FIELDS and overrides[key] != fields.get(known):
            raise GrowError(asked, f"{key} would have no effect", "a field that says a size or a setting")
        outer, dot, inner = known.rpartition(".")
        if known in fields:
            fields[known] = overrides[key]
        elif dot and isinstance(fields.get(outer), dict) and inner in fields[outer]:
            fields[outer] = {**fields[outer], inner: overrides[key]}
        else:
            raise _no_field(asked, source, table, fields, key)
    for heads, width in table.follows.items():
        if width in named and heads not in named and isinstance(fields[width], int):
            if part_in(heads) != part_in(width) and fields[heads] != value_of(source, width):
                continue  # another part's field that does not say this width
            count, rest = divmod(fields[heads] * fields[width], value_of(source, width))
            if rest == 0:
                fields[heads] = count
            elif width in {axis.size for name, axis in table.axes.items() if name.endswith("hidden")}:
                fields[heads] = _more_heads(asked, source, heads, width, fields[width])
    for layers, old in table.layer_counts(source).items():
        if type(fields[layers]) is int and fields[layers] > old:
            sources = layer_sources(layers, old, fields[layers])
            follow_layers(fields, layers, old, sources, named)
    try:
        return rebuilt(source, fields)
    except _INVALID as error:
        raise GrowError(asked, _cause(error), _valid_sizes(source, fields, named)) from error


def settled(source: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, those of what a config derives from its fields as the fields that setting it changes."""
    made: dict[str, Any] = {}
    fields = flat(source)
    for key, value in overrides.items():
        own = not hasattr(PreTrainedConfig, key)  # not num_labels, which all configs derive
        if key not in fields and own and isinstance(getattr(type(source), key, None), property):
            made |= _moved(source, fields, key, value) or {key: value}
        else:
            made[key] = value
    return made


def _moved(source: PreTrainedConfig, fields: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The fields that change where a derived one is set; none where it cannot be set, or stays."""
    config = copy.deepcopy(source)
    try:
        setattr(config, key, value)
    except (*_INVALID, AttributeError, NotImplementedError):  # ProphetNet names the fields to set instead
        return {}
    changes = {name: new for name, new in flat(config).items() if fields.get(name) != new}
    return changes if getattr(config, key) == value else {}


def _no_field(
    asked: str, source: PreTrainedConfig, table: Architecture, fields: Mapping[str, Any], key: str
) -> GrowError:
    """What to raise for a field that a config does not have: where it stands, or which one may have been meant."""
    inside = [f"{outer}.{key}" for outer, value in fields.items() if isinstance(value, dict) and key in value]
    if part_in(key) in parts_of(source):  # of a part: what that part has
        within = beside(fields, key)
        near = difflib.get_close_matches(last_word(key), map(last_word, within))
        close = [f"{part_in(key)}.{name}" for name in near]
        sizes = [name for name in within if name in table.size_fields()]
        wrong = f"{part_in(key)} has no field {last_word(key)!r}"
        return GrowError(asked, wrong, ", ".join(close or sizes or sorted(within)))
    inside += [name for name in fields if last_word(name) == key]
    close = inside or difflib.get_close_matches(key, fields) or sorted(table.size_fields())
    if key == "num_labels":
        close = ["id2label={0: ..., 1: ...}, which says how many"]
    return GrowError(asked, f"{type(source).__name__} has no field {key!r}", ", ".join(close))


def _valid_sizes(source: PreTrainedConfig, fields: dict[str, Any], named: list[str]) -> str:
    """For each size that was asked for, the next larger one with which the config can be built."""
    valid = []
    for key in named:
        size, least = fields.get(key), value_of(source, key)
        if type(least) is not int:
            continue
        first = max(size + 1, least) if type(size) is int else least
        # Each try builds a config. A size that has to be a multiple is found among the next ones, or is one of `least`.
        multiples = range(-(-first // least) * least, 2 * first, least) if least else range(0)
        for larger in (*range(first, 2 * first)[:TRIED], *multiples[:TRIED]):
            try:
                rebuilt(source, {**fields, key: larger})
            except _INVALID:
                continue
            valid.append(f"{key}={larger}")
            break
    return ", or ".join(valid) or f"a {type(source).__name__} that can be built"


def _cause(error: Exception) -> str:
    # transformers wraps what a config's own check says into several lines of its own.
    lines = str(error.__cause__ or error).split("\n")
    return " ".join(line.strip() for line in lines).rstrip(".!")


def _more_heads(asked: str, source: PreTrainedConfig, heads: str, width: str, wide: int) -> int:
    """Heads for a wider model: of the same head_dim where it divides the width, else of the next larger one."""
    count, old = value_of(source, heads), value_of(source, width)
    for head_dim in range(old // count, wide // count + 1):
        if wide % head_dim == 0:
            return wide // head_dim
    valid = f"a multiple of the head_dim {old // count}, or {heads} named with it"
    raise GrowError(asked, f"{width}={wide} does not divide into at least {count} heads", valid)


def _describe(target: Target) -> str:
    if isinstance(target, Mapping):
        return ", ".join(f"{key}={value!r}" for key, value in target.items()) or "no change"
    return f"a {type(target).__name__}" if isinstance(target, PreTrainedConfig) else repr(str(target))
