"""What a model computes: inputs that any class takes, its outputs, and the distance of two models' outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from growlib.media import special_tokens, with_media
from growlib.parts import parts_of, text_of

TOLERANCE = 1e-5  # of a spread: what counts as the same in float32


class Distance(NamedTuple):
    """How far two models' outputs are apart. A NaN counts as infinitely far."""

    absolute: float
    relative: float  # the largest, in shares of the spread (maximum minus minimum) of the first one's output


def vocabulary(model: PreTrainedModel) -> int:
    """The number of rows of the embedding that reads token ids; 0 where there is none."""
    try:
        embedding: Any = model.get_input_embeddings()
    except NotImplementedError:
        return 0
    return embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else 0


def inputs_of(model: PreTrainedModel, batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Keyword arguments of the forward, the same in every row of the batch where `batch` is above 2."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if batch > 2 else batch
    config: Any = model.config
    name = model.main_input_name if vocabulary(model) == 0 or config.is_encoder_decoder else "input_ids"
    if name == "pixel_values":
        side = getattr(config, "image_size", 32)
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(config, "num_channels", 3)
        given = {name: torch.randn(rows, channels, height, width, generator=generator)}
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 32)
        given = {name: torch.randn(rows, getattr(config, "num_mel_bins", 80), frames, generator=generator)}
    else:
        given = {"input_ids": _token_ids(model, rows, length, generator)}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = _token_ids(model, rows, length, generator)
    kept = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in given.items()}
    device = "cpu" if model.device.type == "meta" else model.device  # a model that is read while it runs
    given = {name: value.to(device) for name, value in kept.items()}
    return {name: v.expand(batch, *v.shape[1:]).contiguous() if rows == 1 else v for name, v in given.items()}


def every_input(model: PreTrainedModel, length: int = 7, seed: int = 1, copies: int = 0) -> list[dict[str, Tensor]]:
    """What `inputs_of` makes, and for a model of several parts the same with an image and with a sound.

    `copies` is how many equal rows to make instead of two that differ.
    """
    given = inputs_of(model, length=length, seed=seed)
    if "input_ids" not in given:
        return [given]
    generator = torch.Generator().manual_seed(seed)
    rows, device = 1 if copies else len(given["input_ids"]), given["input_ids"].device

    def words(count: int) -> Tensor:
        return _token_ids(model, rows, count, generator).to(device)

    several = [given, *with_media(model, words, rows, seed).values()]
    return [{n: v.repeat(copies, *[1] * (v.ndim - 1)) for n, v in g.items()} for g in several] if copies else several


def _token_ids(model: PreTrainedModel, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Ids that are rarely special ones, and no more of them than the model has positions for."""
    text: Any = text_of(model.config)
    words, most = vocabulary(model), getattr(text, "max_position_embeddings", None) or -1
    length = min(length, most) if most > 0 else length  # below zero: any length (XLNet)
    first, last = min(5, words // 2), max(words - 1, 1)
    ids = torch.randint(first, last, (rows, length), generator=generator)
    if special := special_tokens(model.config):
        free = torch.tensor([word for word in range(first, last) if word not in special] or [first])
        ids = free[ids % len(free)]
    return ids


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's outputs of at least two dimensions, in eval mode."""
    was_training, config = model.training, getattr(model, "config", None)
    as_dict = getattr(config, "return_dict", True)
    if config is not None:
        config.return_dict = True  # an argument reaches the outer module alone
    try:
        named = model.eval()(**given, return_dict=True)
    finally:
        model.train(was_training)
        if config is not None:
            config.return_dict = as_dict
    kept = {k: v for k, v in named.items() if isinstance(v, Tensor) and v.ndim >= 2 and v.is_floating_point()}
    if config is not None and parts_of(config):  # beside its output, such a model returns what its parts made
        kept = next(({k: kept[k]} for k in ("logits", "last_hidden_state") if k in kept), kept)
    if not kept:
        raise ValueError("it puts out no tensor of two dimensions")
    return kept


def distance(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Distance:
    """The largest distance of two models' outputs; of the new one, what stands in the old one's places."""
    apart = []
    for name, reference in old.items():
        reference = reference.double()
        grown = new[name][tuple(slice(length) for length in reference.shape)].to(reference)
        largest = (grown - reference).abs().max()
        apart.append((largest.item(), (largest / (reference.max() - reference.min())).item()))
    return Distance(*torch.tensor(apart, dtype=torch.float64).nan_to_num(torch.inf).amax(0).tolist())
