"""Small configs of models of several parts: each part small by itself, and what joins them set to fit."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from transformers import PreTrainedConfig

from growlib.media import KINDS, PLACEHOLDER
from growlib.parts import beside, flat, last_word, parts_of, text_part

# Small sizes of parts that are not the text. No small multiple of their width is one of the text's, which is 64.
PART_SIZES = {
    40: "hidden_size d_model embed_dim dim",
    32: "image_size img_size input_size",
    2: "num_attention_heads num_key_value_heads num_heads encoder_attention_heads attention_heads n_heads",
    3: "num_hidden_layers depth encoder_layers num_layers n_layers layers",
    20: "head_dim",
    16: "num_position_embeddings",
    8: "patch_size",
    4: "mm_tokens_per_image",
    44: "max_source_positions max_position_embeddings",
}
PART_SIZE_OF = {name: size for size, names in PART_SIZES.items() for name in names.split()}
WIDTHS = ("hidden_size", "d_model", "embed_dim", "dim")
INNER = re.compile(r"intermediate|ffn|mlp_dim|mlp_hidden")
PUT_OUT = re.compile(r"out_hidden_size|output_dim|out_dim|projection_dim")
WORDS = re.compile(r"(pad|bos|eos|sep|cls|mask|unk|start)_token_")  # ids that stand for no image


def same_width(config: PreTrainedConfig, names: list[str]) -> dict[str, str]:
    """Fields outside the text that say its width again, and the field that says it first. Of a tiny config."""
    text, fields = text_part(config), flat(config)
    width = next((f"{text}.{n}" for n in names if type(fields.get(f"{text}.{n}")) is int), "")
    if not text or not width:
        return {}
    return dict.fromkeys(_saying(fields, text, fields[width]), width)


def _saying(fields: Mapping[str, Any], text: str, width: int) -> list[str]:
    """Fields outside the text with a value, those first whose names say that it is put out."""
    inside = [n for n, v in fields.items() if type(v) is int and v == width and not PLACEHOLDER.search(n)]
    outside = [name for name in inside if name != text and not name.startswith(text + ".")]
    return sorted(outside, key=lambda name: not re.search("out|proj", last_word(name)))


def small_parts(
    config: PreTrainedConfig, small_text: Mapping[str, Any], text_width: int, new_width: int
) -> Iterator[dict[str, Any]]:
    """Flat fields to try: the text's as given, the other parts small or as they are, the text's width said or not."""
    fields, text = flat(config), text_part(config)
    others = [name for name in ("", *parts_of(config)) if name != text]
    small = {**fields}
    for part in others:
        prefix = part + "." if part else ""
        own = {last_word(name): v for name, v in beside(fields, prefix + "x").items()}
        small |= {prefix + name: value for name, value in _small_part(own).items()}
    small |= _resolutions(fields, small) | _feature_layers(fields)
    saying = _saying(fields, text, text_width)
    put_out = [name for name in saying if re.search("out|proj", last_word(name))]
    links = dict.fromkeys([(), *((name,) for name in saying), tuple(put_out), tuple(saying)])
    named = [name for name, v in fields.items() if type(v) is int and PUT_OUT.fullmatch(last_word(name))]
    links |= dict.fromkeys([(name,) for name in named] if not put_out else [])  # of a config whose parts do not fit
    for base, linked in product((small, fields), links):
        tried = {**base, **small_text, **_placeholders(fields, text), **dict.fromkeys(linked, new_width)}
        by_chance = set(_saying(tried, text, new_width)) - set(linked)
        if not by_chance:
            yield tried


def _small_part(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A vision tower's config, or a sound's, with small sizes; inner widths stay whole multiples of the width."""
    made = dict(fields)
    width = next((fields[n] for n in WIDTHS if type(fields.get(n)) is int), 0)
    layers = next((fields[n] for n in PART_SIZES[3].split() if type(fields.get(n)) is int), 0)
    for name, value in fields.items():
        size = PART_SIZE_OF.get(name)
        if size == 3 and type(value) is int:
            made[name] = min(value, 3)
        elif size and type(value) is int:
            made[name] = size
        elif size and isinstance(value, list | tuple) and all(type(v) is int for v in value):
            made[name] = [size] * len(value)
        elif INNER.search(name) and type(value) is int:
            ratio, rest = divmod(value, width or value + 1)
            made[name] = 72 if rest or not ratio else ratio * 40
        elif isinstance(value, list) and value and all(type(v) is int and 0 <= v < layers for v in value):
            if value == sorted(set(value)):
                made[name] = list(range(min(len(value), 3, layers)))
        elif isinstance(value, list) and len(value) == layers > 3:
            made[name] = value[:3]
    return made | _side_by_side(fields, made, width)


def _side_by_side(fields: Mapping[str, Any], made: Mapping[str, Any], width: int) -> dict[str, int]:
    """What puts out the last layer and those that a list names, one beside the other (Mllama's `vision_output_dim`)."""
    named = {1 + len(v): 1 + len(made[n]) for n, v in fields.items() if isinstance(v, list) and len(v) != len(made[n])}
    counts = {n: v // width for n, v in fields.items() if PUT_OUT.search(n) and type(v) is int and width}
    return {n: 40 * named[count] for n, count in counts.items() if count in named and fields[n] == count * width}


def _feature_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The layers whose output is taken (`vision_feature_layer`), among three."""

    def near(layer: int) -> int:
        return layer if -3 <= layer < 3 else -2 if layer < 0 else 1

    made: dict[str, Any] = {}
    for name, value in fields.items():
        if "feature_layer" in last_word(name) and type(value) is int:
            made[name] = near(value)
        elif "feature_layer" in last_word(name) and isinstance(value, list) and all(type(v) is int for v in value):
            made[name] = [near(layer) for layer in value]
    return made


def _resolutions(fields: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of an image's possible sizes (`image_grid_pinpoints`), in the same multiples of a small tile."""
    side = next((name for name, value in fields.items() if last_word(name) == "image_size" and type(value) is int), "")
    made = {}
    for name, value in fields.items():
        pairs = isinstance(value, list) and value and all(isinstance(v, list | tuple) and len(v) == 2 for v in value)
        if side and pairs and all(type(v) is int and v % fields[side] == 0 for pair in value for v in pair):
            made[name] = [[v // fields[side] * small[side] for v in pair] for pair in value]
    return made


def _placeholders(fields: Mapping[str, Any], text: str) -> dict[str, int]:
    """Token ids that a small vocabulary has, one for each name; also for an image or a sound that has none yet."""
    kinds = [word for words in KINDS.values() for word in words]
    unset = [n for n, v in fields.items() if v is None and any(word in last_word(n) for word in kinds)]
    named = [n for n, v in fields.items() if PLACEHOLDER.search(n) and (type(v) is int or n in unset)]
    known = sorted({last_word(n) for n in named if not WORDS.search(last_word(n)) or "vision_start" in n})
    return {n: known.index(last_word(n)) + 1 if last_word(n) in known else 0 for n in named}


def fit_rotary(fields: dict[str, Any], old_head_dim: int, new_head_dim: int) -> None:
    """Lists of rotary pairs, such as those for time, height and width, sum to half of a head's size."""
    for name, value in fields.items():
        if isinstance(value, dict):
            inner = dict(value)
            fit_rotary(inner, old_head_dim, new_head_dim)
            fields[name] = inner
        elif (
            isinstance(value, list) and value and all(type(v) is int for v in value) and 2 * sum(value) == old_head_dim
        ):
            scaled = [max(v * new_head_dim // old_head_dim, 1) for v in value]
            scaled[-1] += new_head_dim // 2 - sum(scaled)
            fields[name] = scaled
