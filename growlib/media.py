"""Inputs with an image or a sound for models that take them beside text, found by trying.

What a class takes is read off its forward's signature; how many tokens an image stands for, off the features that the
model itself makes of it. A form counts where the model runs on it and another image gives another output.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.parts import flat, parts_of, text_of

Given = dict[str, Tensor]
BEFORE, AFTER = 7, 3  # tokens of text on both sides
PLACEHOLDER = re.compile(r"_token_(id|index)$")
KINDS = {"image": ("image", "img", "pixel", "vision"), "audio": ("audio", "sound", "speech", "input_features")}
Words = Callable[[int], Tensor]  # token ids [rows, length]


class Form(NamedTuple):
    """How a model takes an image: which of the forms, the tokens that stand for it, and what is told beside them."""

    number: int
    tokens: int  # in each row
    placeholder: int
    named: dict[str, int]  # masks and kinds of tokens: what they say at the image


_forms: "WeakKeyDictionary[PreTrainedModel, dict[str, Form | None]]" = WeakKeyDictionary()


def wanted(model: PreTrainedModel) -> set[str]:
    """The kinds of input beside text that a model of several parts takes, by its forward's signature."""
    if not parts_of(model.config):
        return set()
    takes, parts = _parameters(model), parts_of(model.config)
    seen = any("pixel" in name or name == "flattened_patches" for name in takes)
    kinds = {"image"} if seen and not _is_left_out(model.config, KINDS["image"]) else set()
    heard = any(re.search("input_features|input_values|audio", name) for name in takes)
    return kinds | ({"audio"} if heard and any(re.search("audio|encoder|speech|semantic", p) for p in parts) else set())


def _is_left_out(config: PreTrainedConfig, words: tuple[str, ...]) -> bool:
    """Whether the config has a place for a part of this kind, and none there."""
    named = [v for n, v in vars(config).items() if n.endswith("_config") and any(word in n for word in words)]
    return bool(named) and all(part is None for part in named)


def media_in(model: PreTrainedModel) -> set[str]:
    """The kinds of input beside text that were found for a model."""
    return {kind for kind, form in _forms.get(model, {}).items() if form}


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """The ids that stand for something else than a word, where the config has parts."""
    if not parts_of(config):
        return set()
    return {v for k, v in flat(config).items() if PLACEHOLDER.search(k) and type(v) is int}


def with_media(model: PreTrainedModel, words: Words, rows: int, seed: int) -> dict[str, Given]:
    """Inputs of text with an image and of text with a sound, of those that the model takes.

    `words` makes token ids [rows, length]. Each row has an image of its own.
    """
    if not parts_of(model.config):
        return {}
    found = _forms.setdefault(model, {})
    for kind in KINDS:
        if kind not in found:
            found[kind] = _first_that_runs(model, kind, words, rows)
    return {
        kind: _whole(list(_candidates(model, kind, rows, seed))[form.number], form, words(BEFORE + AFTER))
        for kind, form in found.items()
        if form
    }


def _first_that_runs(model: PreTrainedModel, kind: str, words: Words, rows: int) -> Form | None:
    """The first form that the model runs on and that it looks at; None where there is none."""
    others, text = list(_candidates(model, kind, rows, 99)), words(BEFORE + AFTER)
    for number, pixels in enumerate(_candidates(model, kind, rows, 1)):
        for form in _forms_of(model, kind, number, pixels, text):
            here = _run(model, _whole(pixels, form, text))
            there = None if here is None else _run(model, _whole(others[number], form, text))
            if here is not None and there is not None and not torch.equal(here, there):
                return form
    return None


def _forms_of(model: PreTrainedModel, kind: str, number: int, pixels: Given, text: Tensor) -> Iterator[Form]:
    takes = _parameters(model)
    named: dict[str, int] = {
        name: 1 if kind == "image" else 3 for name in ("mm_token_type_ids", "token_type_ids") if name in takes
    }
    for count in _counts(model, kind, pixels, text):
        for placeholder in _placeholders(model.config, kind):
            for more in (named, {}, {"attention_mask": 1}):
                yield Form(number, count, placeholder, more)


def _whole(pixels: Given, form: Form, text: Tensor) -> Given:
    """An image with its tokens between those of a text."""
    tokens = torch.full((len(text), form.tokens), form.placeholder, dtype=text.dtype, device=text.device)
    ids = torch.cat([text[:, :BEFORE], tokens, text[:, BEFORE:]], 1)
    given = {"input_ids": ids, **pixels}
    for name, value in form.named.items():
        given[name] = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
        given[name][:, BEFORE : BEFORE + form.tokens] = value
    return given


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _placeholders(config: PreTrainedConfig, kind: str) -> list[int]:
    """The token ids that may stand for an image, the likeliest first."""
    named = {k.rpartition(".")[2]: v for k, v in flat(config).items() if PLACEHOLDER.search(k) and type(v) is int}
    own = [name for name in named if any(word in name for word in KINDS[kind])]
    own.sort(key=lambda name: (not re.match(rf"({'|'.join(KINDS[kind])})_token_", name), name))
    return [named[name] for name in own[:3]] or [0]


def _counts(model: PreTrainedModel, kind: str, form: Given, text: Tensor) -> list[int]:
    """How many tokens each row's image may stand for."""
    width, rows = text_width(model), len(text)
    name = f"get_{kind}_features"
    for module in (model, *model.children()):
        if not hasattr(module, name):
            continue
        if features := _features(_call(getattr(module, name), form)):
            count, rest = divmod(sum(each.numel() // each.shape[-1] for each in features), rows)
            return [] if rest or any(each.shape[-1] != width for each in features) else [count]
    numbers: set[int] = set()
    for placeholder in _placeholders(model.config, kind):  # a wrong number of tokens: the class says which is right
        ids = text.clone()
        ids[:, 2:4] = placeholder
        told = _call(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **form}, told=True)
        numbers |= {int(n) for n in re.findall(r"\d+", told)} if isinstance(told, str) else set()
    split = [n // d for n in sorted(numbers) for d in (1, rows, rows * max(width, 1)) if n % d == 0]
    return [0, *dict.fromkeys(n for n in split if 0 < n < 3000)][:12]


def text_width(model: PreTrainedModel) -> int:
    """The width of what the embedding of tokens gives; 0 where there is none."""
    try:
        embedding: Any = model.get_input_embeddings()
    except NotImplementedError:
        return 0
    return embedding.weight.shape[-1] if hasattr(embedding, "weight") else 0


def _features(made: Any) -> list[Tensor]:
    """What stands for an image among the embedded tokens."""
    made = made.get("pooler_output", made) if hasattr(made, "get") else made
    several = made if isinstance(made, tuple | list) else [made]
    return list(several) if all(isinstance(each, Tensor) and each.ndim > 1 for each in several) else []


@torch.no_grad()
def _call(function: Any, given: Given, told: bool = False) -> Any:
    """What a function returns; None where it fails, or what it then says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(**given)
        except Exception as error:  # whatever a class of transformers raises on inputs that are not its own
            return str(error) if told else None


def _run(model: PreTrainedModel, given: Given) -> Tensor | None:
    """The first output of at least two dimensions."""
    made = _call(model, given)
    named = made if hasattr(made, "values") else {}
    return next((v for v in named.values() if isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point()), None)


def _candidates(model: PreTrainedModel, kind: str, rows: int, seed: int) -> Iterator[Given]:
    generator = torch.Generator().manual_seed(seed)
    takes = _parameters(model)
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # a model that is read while it runs

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, model.dtype)

    def whole(values: list[Any]) -> Tensor:
        return torch.tensor([values] * rows, device=device)

    for form in (_images if kind == "image" else _sounds)(model.config, takes, rows, drawn, whole):
        yield {name: value for name, value in form.items() if name in takes}


Drawn = Callable[..., Tensor]  # of a shape
Whole = Callable[[list[Any]], Tensor]  # the same numbers in each row


def _images(config: Any, takes: set[str], rows: int, drawn: Drawn, whole: Whole) -> Iterator[Given]:
    """Images as their classes take them: whole, in patches, with their grid or their sizes."""
    seen = _part(config, "vision", "image")
    side = _first(seen, "image_size", "input_size", "img_size", default=32)
    channels = _first(seen, "num_channels", "in_channels", "in_chans", default=3)
    patch, frames = _first(seen, "patch_size", default=8), _first(seen, "temporal_patch_size", default=1)
    merge = _first(seen, "spatial_merge_size", default=0) or _first(config, "spatial_merge_size", default=0)
    merge = merge or _first(seen, "downsample_factor", "pooling_kernel_size", default=2)
    across = 2 * merge
    count, grid = across * across, whole([1, across, across])
    if "image_grid_thw" in takes:
        for values in (
            drawn(rows * count, channels * frames * patch * patch),
            drawn(rows * count, channels, patch, patch),
        ):
            merges = torch.full((rows,), merge, device=values.device)
            yield {"pixel_values": values, "image_grid_thw": grid, "image_merge_sizes": merges}
    if "image_grid_hw" in takes:
        yield {"pixel_values": drawn(rows * count, channels, patch, patch), "image_grid_hw": grid[:, 1:]}
    if "image_position_ids" in takes:
        places = torch.cartesian_prod(torch.arange(across), torch.arange(across)).flip(-1)
        for values in (drawn(rows, count, channels * patch * patch),):
            yield {"pixel_values": values, "image_position_ids": whole(places.tolist())}
    if "aspect_ratio_ids" in takes:  # tiles of one image
        tiles = _first(seen, "max_num_tiles", default=4)
        values, first = drawn(rows, 1, tiles, channels, side, side), whole([1])
        yield {"pixel_values": values, "aspect_ratio_ids": first, "aspect_ratio_mask": whole([[1] + [0] * (tiles - 1)])}
    if "spatial_shapes" in takes:
        mask = whole([1] * count)
        values = drawn(rows, count, channels * patch * patch)
        yield {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": whole([across, across])}
    sides = dict.fromkeys([side, across * patch])
    for name in sorted(n for n in takes if n.endswith("pixel_values") and "high" not in n):
        for s in sides:
            sizes, more = whole([s, s]), {"high_res_pixel_values": drawn(rows, channels, 4 * s, 4 * s)}
            for values in (drawn(rows, channels, s, s),):
                yield {name: values, **more}
                yield {name: values, "image_sizes": sizes}
            yield {name: drawn(rows, 2, channels, s, s), "image_sizes": sizes}
            yield {name: drawn(rows, 1, channels, s, s), "image_sizes": sizes}
            yield {name: drawn(rows, 5, channels, s, s), "image_sizes": whole([2 * s, 2 * s])}


def _sounds(config: Any, takes: set[str], rows: int, drawn: Drawn, whole: Whole) -> Iterator[Given]:
    """Spectrograms [rows, bins, frames] or [rows, frames, bins], with the masks that a class may want."""
    heard = _part(config, "audio", "encoder", "speech")
    bins = _first(heard, "num_mel_bins", "input_dim", "input_feat_size", "n_mels", default=80)
    most = 2 * _first(heard, "max_source_positions", default=48)
    masks = [n for n in takes if n.endswith("mask") and ("feature" in n or "audio" in n)]
    for name in sorted(n for n in takes if n.endswith("input_features")):
        for frames in dict.fromkeys((most, 96, 100)):
            mask = {n: whole([1] * frames) for n in masks}
            more = {"audio_feature_lengths": whole([frames])[:, 0]}
            for values in (drawn(rows, bins, frames), drawn(rows, frames, bins)):
                yield {name: values, **mask, **more}
                yield {name: values}


def _part(config: Any, *words: str) -> Any:
    """The part of a config whose name has one of the words, or the config itself."""
    parts = parts_of(config)
    named = [part for word in words for name, part in parts.items() if word in name.rpartition(".")[2]]
    return next((part for part in named if part is not text_of(config)), config)


def _first(config: Any, *names: str, default: int) -> int:
    """The first of the fields that is there; of a height and a width, the height."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        value = value.get("height") if isinstance(value, dict) else value
        if type(value) is int and value > 0:
            return value
    return default
