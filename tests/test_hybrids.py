"""Depth of stacks whose layers differ: in kind, by number, or in what makes them the identity."""

import pytest
import torch
import transformers as T
from tiny import randomise

import growlib
from growlib.layer_fields import followed, kinds_said
from growlib.outputs import distance, every_input, outputs
from growlib.planner import _places

TOKENS = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64}
ENCODER = {**TOKENS, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
DECODER = {**ENCODER, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NEXT = {**DECODER, **EXPERTS, **LINEAR, "num_hidden_layers": 8, "shared_expert_intermediate_size": 24, "head_dim": 16}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 24, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
MAMBA_2 = {**TOKENS, "hidden_size": 32, "expand": 2, "num_heads": 8, "head_dim": 8, "num_hidden_layers": 2}
MAMBA_2 |= {"n_groups": 2, "state_size": 8, "chunk_size": 8}
PATTERN = ["linear_attention", "moe", "linear_attention", "full_attention", "linear_attention", "mlp"]
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]

QUICK = {  # what decides depth -> a class, its config, and depths
    "a layer's number": (
        "DiffLlamaForCausalLM",
        DECODER,
        [{"num_hidden_layers": 6}, {"num_hidden_layers": 8, "intermediate_size": 100}],
    ),
    "branches scaled by the depth": ("EsmcForMaskedLM", ENCODER, [{"num_hidden_layers": 6}, {"num_hidden_layers": 9}]),
    "scales on the stream": ("DogeForCausalLM", DECODER, [{"num_hidden_layers": 6}]),
    "a width that no field says alone": ("Mamba2ForCausalLM", MAMBA_2, [{"num_hidden_layers": 4}]),
}
SLOW = {
    "dense layers, then mixtures, some with convolutions": (
        "Lfm2MoeForCausalLM",
        {
            **{**DECODER, **EXPERTS, "num_hidden_layers": 6, "num_dense_layers": 2},
            "layer_types": ["conv", "conv", "full_attention"] * 2,
        },
        [{"num_hidden_layers": 9}, {"num_hidden_layers": 8}],
    ),
    "a period of its own for attention and for mixtures": (
        "JambaForCausalLM",
        {**DECODER, "num_hidden_layers": 8, "num_experts": 4, "mamba_dt_rank": 4},
        [{"num_hidden_layers": 12}],
    ),
    "lists and a period": ("Qwen3NextForCausalLM", {**NEXT, "decoder_sparse_step": 2}, [{"num_hidden_layers": 12}]),
    "a number of layers that is the length of a list": (
        "NemotronHForCausalLM",
        {
            **{**DECODER, **MAMBA, "layers_block_type": PATTERN, "n_routed_experts": 4, "moe_intermediate_size": 24},
            **{"moe_shared_expert_intermediate_size": 24, "head_dim": 12},
        },
        [{"num_hidden_layers": 9}],
    ),
    "numbers of layers, all of them": (
        "Llama4ForCausalLM",
        {
            **{**DECODER, "num_hidden_layers": 8, "num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 12},
            "interleave_moe_layer_step": 2,
        },
        [{"num_hidden_layers": 12}],
    ),
    "numbers of dense layers": (
        "FlintForCausalLM",
        {**DECODER, **EXPERTS, "num_hidden_layers": 6, "shared_expert_intermediate_size": 24, "head_dim": 12},
        [{"num_hidden_layers": 9}],
    ),
    "a dict by number, and an embedding of each layer": (
        "Gemma4ForCausalLM",
        {
            **{**DECODER, "num_hidden_layers": 6, "head_dim": 16, "layer_types": KINDS * 2},
            **{"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
            "per_layer_config": {2: {"head_dim": 32}, 5: {"head_dim": 32}},
        },
        [{"num_hidden_layers": 9}],
    ),
    "norms on the stream": (
        "MiniMaxForCausalLM",
        {**DECODER, "num_local_experts": 4, "head_dim": 12, "block_size": 4},
        [{"num_hidden_layers": 6}, {"num_hidden_layers": 12}],
    ),
    "a second stream, of routers": ("ZayaForCausalLM", {**DECODER, "num_experts": 4}, [{"num_hidden_layers": 6}]),
    "experts in tensors of their own": (
        "JetMoeForCausalLM",
        {**TOKENS, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_local_experts": 4}
        | {"num_key_value_heads": 2, "kv_channels": 12},
        [{"num_hidden_layers": 6}],
    ),
    "norms in lists of their own": (
        "XLMWithLMHeadModel",
        {"emb_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 97, "n_words": 97, "mask_token_id": 0}
        | {"max_position_embeddings": 64, "lang_id": 0},
        [{"n_layers": 6}, {"num_hidden_layers": 8}],
    ),
    "a norm of another layout": (
        "SqueezeBertForMaskedLM",
        {**ENCODER, "embedding_size": 48},
        [{"num_hidden_layers": 6}],
    ),
    "a norm that is none": (
        "MobileBertForMaskedLM",
        {"num_hidden_layers": 4, "vocab_size": 97, "hidden_size": 48, "embedding_size": 16, "intermediate_size": 32}
        | {"num_attention_heads": 4, "intra_bottleneck_size": 24, "true_hidden_size": 24},
        [{"num_hidden_layers": 6}],
    ),
    "layers with cross attention, every fourth a mixture": (
        "NllbMoeForConditionalGeneration",
        {**TOKENS, "d_model": 32, "encoder_layers": 8, "decoder_layers": 4, "num_experts": 4, "expert_capacity": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
        | {"decoder_start_token_id": 0},
        [{"encoder_layers": 12}, {"decoder_layers": 8}],
    ),
    "every second a mixture, of more experts than the tiny model has": (
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "num_experts": 12,
            "expert_capacity": 64,
        }
        | {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2}
        | {"pad_token_id": 0, "decoder_start_token_id": 0},
        [{"num_layers": 8}, {"num_decoder_layers": 6}],
    ),
    "outputs named by stages": (
        "BeitForImageClassification",
        {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        | {"image_size": 32, "patch_size": 16, "out_indices": [1, 2, 3, 4]},
        [{"num_hidden_layers": 6}],
    ),
    "state spaces of several heads": (
        "Mamba2ForCausalLM",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}
        | {"expand": 2, "state_size": 8, "chunk_size": 8},
        [{"num_hidden_layers": 6}, {"num_hidden_layers": 9}],
    ),
}


def built(name, options):
    model_class = getattr(T, name)
    model = model_class._from_config(model_class.config_class(**options), attn_implementation="eager")
    return randomise(model, 0, 0.15).eval()


def apart(small, big):
    return max(
        distance(outputs(small, given), outputs(big, given)).relative
        for seed in (1, 2)
        for given in every_input(small, seed=seed)
    )


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_layers_of_several_kinds_get_deeper(case):
    name, options, growths = {**QUICK, **SLOW}[case]
    small = built(name, options)
    for growth in growths:
        plan = growlib.plan(small, growth)
        assert plan.exact, plan.reasons
        assert set(growth) & {"hidden_size"} or any(len(m.source) > m.old for m in plan.layers.values())
        assert apart(small, growlib.expand(small, plan)) < 1e-5


def test_a_second_table_of_the_same_ids_grows_with_the_first():
    name, options, _ = {**QUICK, **SLOW}["a dict by number, and an embedding of each layer"]
    small = built(name, options)
    plan = growlib.plan(small, {"vocab_size": 120})
    big = growlib.expand(small, plan)
    assert plan.exact
    assert big.config.vocab_size_per_layer_input == 120
    assert big(input_ids=torch.tensor([[96, 97, 119]])).logits.shape == (1, 3, 120)


BEHIND_EXPERTS = {
    "FlexOlmoForCausalLM": {"num_experts": 6, "intermediate_size": 24},
    "Kolibri1ForCausalLM": {"num_local_experts": 6, "moe_intermediate_size": 24},
}


@pytest.mark.parametrize("name", BEHIND_EXPERTS)
def test_new_layers_begin_with_the_norm_behind_all_experts(name):
    """A norm of next to nothing, such as copies of experts that cancel but for rounding, is not nothing."""
    small = built(name, {**DECODER, **BEHIND_EXPERTS[name], "num_experts_per_tok": 2})
    experts = next(iter(BEHIND_EXPERTS[name]))
    plan = growlib.plan(small, {"num_hidden_layers": 5, experts: 12, "num_experts_per_tok": 4}, "copies")
    assert plan.exact, plan.reasons
    assert apart(small, growlib.expand(small, plan)) < 1e-5


def test_layers_that_differ_in_their_number_of_heads():
    per_layer = {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads_per_layer": [2, 6] * 2,
    }
    mixture = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "sliding_window": 3}
    options = {**DECODER, **per_layer, **mixture, "num_hidden_layers": 4, "head_dim": 16}
    small = built("LagunaForCausalLM", {**options, "shared_expert_intermediate_size": 24})
    plan = growlib.plan(small, {"num_hidden_layers": 6, "hidden_size": 72, "moe_intermediate_size": 32})
    assert plan.exact, plan.reasons
    assert sorted(plan.config.num_attention_heads_per_layer) == [2, 2, 2, 2, 6, 6]
    assert apart(small, growlib.expand(small, plan)) < 1e-5
    with pytest.raises(growlib.GrowError, match="q_proj"):
        growlib.plan(small, {"head_dim": 32})


def test_heads_of_a_published_size_are_no_quotient_of_other_fields():
    """No field says how many heads there are; two say the tiny model's number by chance."""
    for growth in ({"num_hidden_layers": 44}, {"hidden_size": 4096}, {"moe_intermediate_size": 1024}):
        assert growlib.plan(T.LagunaConfig(), growth).exact


@pytest.mark.slow
def test_layers_of_a_kind_that_the_source_lacks_are_drawn():
    small = built("JambaForCausalLM", {**DECODER, "num_experts": 4, "mamba_dt_rank": 4, "use_cache": False})
    big = growlib.expand(small, {"num_hidden_layers": 8}, exact=True)
    drawn = big.model.layers[4].self_attn
    assert drawn.q_proj.weight.std() > 0
    assert not drawn.o_proj.weight.any()
    assert apart(small, big) < 1e-5


def test_new_blocks_have_no_path_of_zeros_alone():
    small = built("DogeForCausalLM", DECODER)
    big = growlib.expand(small, {"num_hidden_layers": 6}, exact=True)
    big(input_ids=torch.arange(5, 15)[None]).logits.square().mean().backward()
    for layer in (1, 4):
        block = big.model.layers[layer]
        assert block.self_attn.q_proj.weight.any()
        assert block.self_attn.o_proj.weight.grad.any()
        assert block.mlp.down_proj.weight.grad.any()


def test_lists_counts_and_numbers_follow_the_layers():
    own = {
        "layer_types": ["a", "b", "c"],
        "moe_layers": [0, 1, 2],
        "full_attn_idxs": [2],
        "no_rope_layers": [0, 1, 1],
        "max_window_layers": 1,
        "num_kv_shared_layers": 1,
        "first_k_dense_replace": 1,
        "per_layer_config": {"1": {"head_dim": 8}},
        "out_features": ["stage1", "stage3"],
        "mrope_section": [2, 3],
    }
    assert followed(own, 3, [0, 0, 1, 1, 2]) == {
        "layer_types": ["a", "a", "b", "b", "c"],
        "moe_layers": [0, 1, 2, 3, 4],
        "full_attn_idxs": [4],
        "no_rope_layers": [0, 0, 1, 1, 1],
        "max_window_layers": 2,
        "num_kv_shared_layers": 1,
        "per_layer_config": {"02": {"head_dim": 8}, "03": {"head_dim": 8}},
        "out_features": ["stage1", "stage5"],
    }
    assert len(set(kinds_said(own, 3))) == 3


def test_old_layers_stand_at_places_of_their_kind_in_their_order():
    dense_then_sparse = [[0], [1, 2], [1, 2], [1, 2], [1, 2]]
    assert _places([0, 2, 4], dense_then_sparse) == [0, 2, 4]
    assert _places([0, 1, 2], [[0], [0], [1], [2], [1]]) == [0, 2, 3]
    assert _places([0, 1], [[1], [0]]) is None


def test_lists_that_are_given_stay_and_layers_are_placed_to_match():
    kinds = ["sliding_attention", "full_attention"]
    small = built(
        "Qwen2ForCausalLM",
        {**DECODER, "num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 3, "use_sliding_window": True},
    )
    given = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    plan = growlib.plan(small, {"num_hidden_layers": 5, "layer_types": given})
    assert plan.config.layer_types == given
    assert plan.exact
    assert apart(small, growlib.expand(small, plan)) < 1e-5
