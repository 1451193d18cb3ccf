"""A config of several parts (text, vision, ...) as one flat set of fields, such as `text_config.hidden_size`.

A config without parts is its own flat form: nothing here changes it.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growlib.errors import GrowError


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configs inside a config, by their dotted names."""
    found: dict[str, PreTrainedConfig] = {}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and not name.startswith("_"):
            found |= {name: part, **{f"{name}.{inner}": c for inner, c in parts_of(part).items()}}
    return found


def flat(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields, those of parts under dotted names."""
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        inside = flat(part) if isinstance(part, PreTrainedConfig) else None
        fields |= {name: value} if inside is None else {f"{name}.{inner}": v for inner, v in inside.items()}
    return fields


def rebuilt(like: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The inverse of `flat`: a config of the same class."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        *outer, last = name.split(".")
        inside = nested
        for word in outer:
            inside = inside.setdefault(word, {})
        inside[last] = value
    return type(like).from_dict(nested)


def value_of(config: Any, field: str) -> Any:
    """The value of a field, dotted where it is one of a part; None where there is none."""
    for word in field.split("."):
        config = config.get(word) if isinstance(config, Mapping) else _attribute(config, word)
    return config


def _attribute(config: Any, word: str) -> Any:
    """A field, also one that a config says for single layers too, and warns of where it is read for all."""
    try:
        return getattr(config, word, None)
    except Exception:  # transformers' error is none of AttributeError
        return vars(config).get(word)


def part_in(field: str) -> str:
    """The part that a field belongs to: `text_config` for `text_config.hidden_size`, "" for `hidden_size`."""
    return field.rpartition(".")[0]


def last_word(field: str) -> str:
    """A field's name in its own part."""
    return field.rpartition(".")[2]


def beside(fields: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Those of the fields that belong to the same part as one of them."""
    return {name: value for name, value in fields.items() if part_in(name) == part_in(field)}


def text_part(config: PreTrainedConfig) -> str:
    """The dotted name of the part that says what the language model is; "" where the config itself does."""
    try:
        text = config.get_text_config()
    except ValueError:  # an encoder and a decoder
        return ""
    return next((name for name, part in parts_of(config).items() if part is text), "")


def towers(config: PreTrainedConfig) -> list[str]:
    """The dotted names of the parts that are neither the text nor around it: what sees and what hears."""
    text = text_part(config)
    return [name for name in parts_of(config) if not f"{text}.".startswith(f"{name}.")] if text else []


def own_part(config: PreTrainedConfig, part: str) -> tuple[str, ...]:
    """The parts whose fields say the sizes of one: of the text ("") the top level's too."""
    return (part,) if part else ("", text_part(config))


def text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model."""
    return value_of(config, text_part(config)) if text_part(config) else config


def known_name(config: PreTrainedConfig, field: str) -> str:
    """The name under which a config keeps a field that may have a second one."""
    part = value_of(config, part_in(field)) if part_in(field) else config
    names = part.attribute_map if isinstance(part, PreTrainedConfig) else {}
    known = names.get(last_word(field), last_word(field))
    return f"{part_in(field)}.{known}" if part_in(field) else known


def flattened(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with dotted names: {"text_config": {"hidden_size": 96}} says text_config.hidden_size.

    Raises GrowError for a part that the config does not have, and for a part that is given as a number.
    """
    parts = parts_of(config)
    if not parts:
        return dict(overrides)
    made: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, PreTrainedConfig):
            value = value.to_dict()
        if isinstance(value, Mapping) and (key in parts or key.endswith("_config")):
            inner = {f"{key}.{name}": v for name, v in value.items()}
            made |= inner
        else:
            made[key] = value
    if any(isinstance(value, Mapping) and key in parts for key, value in made.items()):
        made = flattened(config, made)
    for key in made:
        asked = "growing {} to {}".format(config.model_type, ", ".join(f"{k}={v!r}" for k, v in made.items()))
        if key in parts:
            example = f"a dict of its fields, such as {{{key!r}: {{'hidden_size': ...}}}}"
            raise GrowError(asked, f"{key} is a config of its own, and {made[key]!r} is none", example)
        outer = part_in(key)
        if outer and outer not in parts and not isinstance(value_of(config, outer), Mapping):
            raise GrowError(asked, f"a {config.model_type} has no part {outer!r}", f"its parts are {', '.join(parts)}")
    return made
