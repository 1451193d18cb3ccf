"""A tiny model of a class: the config's own switches, small sizes that can be told apart, every parameter random."""

import copy
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.config import DERIVED_FIELDS
from growlib.errors import GrowError
from growlib.inference import smaller, tiny_parts
from growlib.inference.tiny_layers import few_layers, layer_counts, small_by_number, with_all_kinds, without_derived
from growlib.inference.tiny_parts import PART_SIZE_OF
from growlib.media import media_in, wanted
from growlib.outputs import every_input, outputs
from growlib.parts import flat, last_word, part_in, parts_of, rebuilt, text_of, text_part

# Small sizes, distinct where two of them could stand in one tensor, by the names that configs give them.
SIZES = {
    64: "hidden_size n_embd d_model n_embed dim embed_dim emb_dim model_dim",
    48: "word_embed_proj_dim embedding_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "linear_num_heads",
    2: "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token moe_topk",
    24: "head_dim d_kv kv_channels attention_head_size qk_nope_head_dim",
    36: "linear_key_head_dim linear_head_dim",
    44: "linear_value_head_dim",
    20: "v_head_dim",
    16: "d_head mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size",
    8: "qk_rope_head_dim num_local_experts num_experts n_routed_experts rotary_dim moe_num_experts patch_size",
    12: "kv_lora_rank",
    28: "q_lora_rank",
    80: "intermediate_size ffn_dim d_ff n_inner d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim hidden_dim",
    40: "moe_intermediate_size expert_ffn_hidden_size",
    56: "shared_expert_intermediate_size shared_intermediate_size block_ff_dim",
    96: "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len",
    3: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
    101: "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input",
    32: "image_size hidden_size_per_layer_input qk_head_dim",
    5: "num_shared_experts n_shared_experts moe_num_shared_experts",
    7: "num_register_tokens",
    6: "attention_window",
    1: "first_k_dense_replace n_group num_expert_group topk_group num_dense_layers moe_layer_start_index "
    "num_sparse_encoder_layers num_sparse_decoder_layers",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
SCANNED = {"num_heads": 4, "head_dim": 32, "mamba_n_heads": 8, "mamba_d_head": 16, "n_groups": 2}
LAYERS = tuple(SIZES[3].split())
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
REPORTING = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")  # not what is computed
LARGEST = 3_000_000  # parameters of a model that is still tiny


class Unfit(Exception):
    """A small model can be built, and is of no use: in growlib's own words."""


def tiny_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config with small sizes. Everything else, per-layer lists aside, stays: it may decide what a tensor is.

    Raises GrowError where no small model of the class can be built and run.
    """
    asked = f"building a tiny {model_class.__name__}"
    wrong: Exception | None = None
    less: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    for fields in _small_fields(config):
        if fields in tried:
            continue
        tried.append(fields)
        try:
            small = rebuilt(config, {**fields, **less})
            count = smaller.count_of(model_class, small)
            if count > LARGEST and not less:
                less = smaller.lessened(model_class, small, LARGEST, _said(small))
                small = rebuilt(config, {**fields, **less})
                count = smaller.count_of(model_class, small)
            small = with_all_kinds(model_class, small, LAYERS)
            if count <= LARGEST:
                model = tiny_model(model_class, small)
                inputs = every_input(model)
                if parts_of(small) and "pixel_values" in inputs[0]:
                    raise Unfit(
                        "it runs on images alone; grow its tower as a model of its own, such as its VisionModel"
                    )
                outputs(model, inputs[0])
                if unseen := wanted(model) - media_in(model):
                    raise Unfit(f"no {' and no '.join(sorted(unseen))} could be made on which it runs")
                return small
            wrong = wrong or Unfit(f"its small model has {count:,} parameters")
        except Exception as error:  # whatever a class of transformers raises
            wrong = wrong or error
    raise GrowError(
        asked, _reason(wrong), "a class that can be built at small sizes, or a table in growlib/architectures"
    )


def _said(config: PreTrainedConfig) -> set[str]:
    """The fields that the tables of small sizes name: those of the text, and those of the other parts."""
    text = text_part(config)
    return {n for n in flat(config) if last_word(n) in (SIZE_OF if part_in(n) in ("", text) else PART_SIZE_OF)}


def _reason(wrong: Exception | None) -> str:
    """What is wrong with the last small model that was tried: growlib's own words, or those of the class as such."""
    lines = str(wrong).strip().splitlines()
    if isinstance(wrong, Unfit):
        return lines[-1]
    said = type(wrong).__name__ if lines in ([], ["None"]) else lines[-1].strip()
    return f"the class does not run at small sizes, nor do its defaults fit them: {said}"


def same_width(config: PreTrainedConfig) -> dict[str, str]:
    """Fields of a tiny config, outside its text, that say the text's width again; each with the one that says it."""
    return tiny_parts.same_width(config, SIZES[64].split()) if parts_of(config) else {}


def _small_fields(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Flat fields to try, until a model can be built of them and runs."""
    text = text_part(config)
    own = text_of(config)
    before = {**own.to_dict()}
    counts, parts = layer_counts(own, LAYERS), bool(parts_of(config))
    once, twice = (_small(before, counts, of_each) for of_each in (1, 2))
    tried = [(once, more) for more in _variants(own, once, parts)]
    tried += [(twice, more) for more in _variants(own, twice, parts) if once != twice]
    for fields, more in tried:
        small = small_by_number({**fields, **more}, before)
        if not parts_of(config):
            yield from (without_derived(config, small, SIZE_OF, optional) for optional in (False, True))
            continue
        heads = [
            [each.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")] for each in (before, small)
        ]
        old, new = (head or (wide or 0) // (count or 1) for head, wide, count in heads)
        if old:
            tiny_parts.fit_rotary(small, old, new)
        width = next((n for n in SIZES[64].split() if type(before.get(n)) is int), "hidden_size")
        prefix = text + "." if text else ""
        named = {prefix + name: value for name, value in small.items() if name not in parts_of(own)}
        yield from tiny_parts.small_parts(config, named, before.get(width, 0), small.get(width, 0))


def _variants(own: PreTrainedConfig, fields: Mapping[str, Any], parts: bool) -> list[dict[str, Any]]:
    """What else some classes need: another head_dim, no groups of heads, fields that are not set or follow others."""
    head_dim: dict[str, Any] = {"head_dim": 16} if "head_dim" in fields else {}
    no_groups: dict[str, Any] = {name: 4 for name in KV_HEADS if name in fields}
    unset = {name: SIZE_OF[name] for name, value in fields.items() if value is None and name in SIZE_OF}
    unset |= {name: 0 for name in ("pad_token_id", "mask_token_id") if fields.get(name, 0) is None}
    # A scan's state is often twice as wide as hidden.
    scanned = {name: size for name, size in SCANNED.items() if name in fields}
    # Some classes split their rotary pairs into sections of a fixed size unless told otherwise.
    rope = fields.get("rope_parameters")
    sections: dict[str, Any] = (
        {"rope_parameters": {**rope, "mrope_section": [2, 3, 3]}} if isinstance(rope, dict) else {}
    )
    return [
        {},
        head_dim,
        no_groups,
        no_groups | head_dim,
        unset,
        unset | head_dim,
        scanned,
        *([sections | head_dim] if sections and parts else []),
        *_several([smaller.derived(own, fields, SIZE_OF), no_groups, unset, scanned, _first_of_many(fields)]),
    ]


def _several(variants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One of them, or several together."""
    for count in range(1, 4):
        for chosen in combinations([variant for variant in variants if variant], count):
            yield {name: value for variant in chosen for name, value in variant.items()}


def _first_of_many(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A default that is not set, of a list of possible ones: the language of a model of several (X-MOD)."""
    unset = [name for name, value in fields.items() if value is None and name.startswith("default_")]
    lists = {name: fields.get(name.removeprefix("default_") + "s") for name in unset}
    return {name: values[0] for name, values in lists.items() if isinstance(values, list | tuple) and values}


def _small(before: Mapping[str, Any], counts: Mapping[str, int], of_each: int) -> dict[str, Any]:
    fields = {name: value for name, value in before.items() if name not in DERIVED_FIELDS}
    fields |= {name: name == "return_dict" for name in REPORTING if name in fields}
    few_layers(fields, LAYERS, counts, of_each)
    wide = {fields[n] for n in SIZES[64].split() if isinstance(fields.get(n), int)}
    for name, value in list(fields.items()):
        if isinstance(value, bool) or value == 0 or name.startswith("_"):
            continue  # 0 switches a part off: shared experts, or layers of a kind
        if isinstance(value, int) and SIZE_OF.get(name) == 48 and value in wide:
            fields[name] = 64  # a field that says the hidden size again goes on to do so
        elif value == 1 and name in KV_HEADS:
            fields[name] = 2  # one for all query heads: what it moves cannot be told from what the whole layer writes
        elif isinstance(value, int) and SIZE_OF.get(name, 3) != 3:
            fields[name] = min(value, SIZE_OF[name]) if SIZE_OF[name] < 4 else SIZE_OF[name]
        elif isinstance(value, list) and SIZE_OF.get(name, 3) != 3:
            fields[name] = [SIZE_OF[name]] * len(value)  # a size of each layer
        elif name.endswith("_token_id") and value is not None:
            fields[name] = 0
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # latent attention calls its rotated share so
    return fields


def tiny_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, spread: float = 0.1) -> PreTrainedModel:
    """A model in eval mode, every parameter drawn anew: a table that only works at initialisation must fail."""
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = spread if parameter.ndim > 1 else 0.4
            centre = parameter.mean().round().item() if parameter.ndim == 1 else 0.0
            if not torch.isfinite(parameter).all() or name.endswith("A_log"):
                continue
            parameter.copy_(centre + width * torch.randn(parameter.shape, generator=generator))
    model.config.use_cache = False
    return model.float().eval()
