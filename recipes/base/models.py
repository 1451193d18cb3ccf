"""The architectures that the recipes build from scratch, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from base.setting import Sizes
from growlib import GrowError


@dataclass(frozen=True)
class Model:
    """An architecture: its classes, and what its config calls each size."""

    config: Callable[..., PreTrainedConfig]
    language_model: type[PreTrainedModel]
    sizes: Mapping[str, str]  # the recipe's word -> the config's field
    length: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reserved: int = 0  # positions in front of the first token's


_HF_NAMES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

MODELS = {
    "llama": Model(
        LlamaConfig,
        LlamaForCausalLM,
        {**_HF_NAMES, "kv_heads": "num_key_value_heads", "head_dim": "head_dim"},
        "max_position_embeddings",
        {"tie_word_embeddings": True},
    ),
    "gpt2": Model(
        GPT2Config,
        GPT2LMHeadModel,
        {"hidden": "n_embd", "layers": "n_layer", "heads": "n_head", "ffn": "n_inner"},
        "n_positions",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bert": Model(
        BertConfig,
        BertForMaskedLM,
        _HF_NAMES,
        "max_position_embeddings",
        _NO_DROPOUT,
    ),
    "roberta": Model(
        RobertaConfig,
        RobertaForMaskedLM,
        _HF_NAMES,
        "max_position_embeddings",
        {**_NO_DROPOUT, "pad_token_id": 0},  # the class needs one: the separator's place says nothing then
        reserved=1,  # its positions are counted from pad_token_id + 1
    ),
}


def model_row(name: str) -> Model:
    """The row of an architecture. Raises GrowError where there is none."""
    if name not in MODELS:
        raise GrowError(f"model {name!r}", "the recipes have no such architecture", f"one of {', '.join(MODELS)}")
    return MODELS[name]


def size_fields(row: Model, sizes: Sizes) -> dict[str, int]:
    """The sizes under the names that the architecture's config gives them."""
    return {name: getattr(sizes, word) for word, name in row.sizes.items()}


def build_config(
    row: Model, sizes: Sizes, *, vocab_size: int, length: int, initializer_range: float, separator: int
) -> PreTrainedConfig:
    """The config of a model from scratch; `separator` is the id of the token between two documents."""
    fields = {
        "vocab_size": vocab_size,
        "initializer_range": initializer_range,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": None,  # nothing is padded; as padding a token would get no gradient
        row.length: length + row.reserved,
        **size_fields(row, sizes),
    }
    return row.config(**{**fields, **row.fixed})
