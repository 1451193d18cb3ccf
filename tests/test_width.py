"""Every width method: what it claims on each family; its paper's formula stands in test_width_formulas.py."""

import pytest
import torch
from test_exact import relative_error
from tiny import randomise, tiny, token_ids
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import growlib
from growlib.operators import method

RELATIVE = 1e-5
GROWTHS = {
    "whole": {
        "llama": {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 4},
        "gpt2": {"n_embd": 96, "n_head": 8},
        "bert": {"hidden_size": 96, "intermediate_size": 224},
    },
    "between": {
        "llama": {"hidden_size": 84, "intermediate_size": 113, "num_attention_heads": 6, "num_key_value_heads": 3},
        "gpt2": {"n_embd": 84, "n_head": 6, "n_positions": 40},
        "bert": {"hidden_size": 84, "num_attention_heads": 6, "intermediate_size": 113},
    },
}
# What each growth is, by family and size: = exact, ~ close, x refused.
CLAIMS = {
    #                 llama       gpt2        bert
    "lossless":      ("=", "=",   "=", "=",   "=", "~"),
    "copies":        ("=", "=",   "=", "=",   "=", "~"),
    "net2net":       ("=", "=",   "=", "=",   "=", "~"),
    "bert2bert-fpi": ("=", "~",   "=", "~",   "=", "~"),
    "bert2bert-aki": ("~", "~",   "~", "~",   "~", "~"),
    "bert2bert":     ("~", "~",   "~", "~",   "~", "~"),
    "lemon":         ("=", "=",   "=", "=",   "=", "~"),
    "hypercloning":  ("=", "x",   "=", "x",   "=", "x"),
    "composable":    ("=", "=",   "=", "=",   "~", "~"),
    "staged":        ("=", "x",   "=", "x",   "=", "x"),
    "sparkling":     ("=", "~",   "=", "~",   "=", "~"),
    "random":        ("~", "~",   "~", "~",   "~", "~"),
}  # fmt: skip
COLUMNS = [(family, size) for family in ("llama", "gpt2", "bert") for size in ("whole", "between")]
CASES = [(name, *column, claim) for name, row in CLAIMS.items() for column, claim in zip(COLUMNS, row, strict=True)]


def test_the_table_has_every_width_method():
    assert set(CLAIMS) == {row.name for row in growlib.methods() if row.width and not (row.reset or row.learned)}


@pytest.mark.parametrize(("name", "family", "size", "claim"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_each_claim_holds(name, family, size, claim, tied):
    small, growth = tiny(family, tie_word_embeddings=tied), GROWTHS[size][family]
    if claim == "x":
        with pytest.raises(growlib.GrowError, match=r"equally often.*or method 'lossless'"):
            growlib.plan(small, growth, name)
        return
    plan = growlib.plan(small, growth, name)
    error = relative_error(small, growlib.expand(small, growth, name, exact=False), input_ids=token_ids(small))
    assert plan.exact == (claim == "=")
    assert error <= RELATIVE if plan.exact else error > 1e-3
    assert all(reason for reason in plan.reasons)
    assert not (plan.exact and method(name).exact == "never")


@pytest.mark.parametrize("name", [n for n in CLAIMS if n not in ("lossless", "bert2bert")])
def test_each_width_goes_with_each_kind_of_depth(name):
    small = tiny("llama")
    growth = {**GROWTHS["whole"]["llama"], "num_hidden_layers": 4}
    for depth in ("llama-pro", "stack", "interpolate"):
        plan = growlib.plan(small, growth, f"{name}+{depth}")
        assert plan.exact == (depth == "llama-pro" and CLAIMS[name][0] == "=")
        big = growlib.expand(small, growth, f"{name}+{depth}", exact=False)
        error = relative_error(small, big, input_ids=token_ids(small))
        assert (error <= RELATIVE) == plan.exact


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_width_without_growth_changes_nothing(name, family):
    small = tiny(family)
    growth = {"vocab_size": 70}
    assert growlib.plan(small, growth, name).exact
    big = growlib.expand(small, growth, name, exact=True)
    for key, value in small.state_dict().items():
        if big.state_dict()[key].shape == value.shape:
            assert torch.equal(big.state_dict()[key], value), key


SINGLE = {
    "hidden": {"hidden_size": 96},
    "ffn": {"intermediate_size": 224},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "query heads": {"num_attention_heads": 8},
    "head_dim": {"head_dim": 24},
    "vocab": {"vocab_size": 70},
}


@pytest.mark.parametrize("axis", SINGLE)
@pytest.mark.parametrize("name", CLAIMS)
def test_one_axis_alone(name, axis):
    """The paper's aim holds on each axis by itself; only ids are safe from the methods that are never exact."""
    small = tiny("llama", tie_word_embeddings=True)
    plan = growlib.plan(small, SINGLE[axis], name)
    copies_nothing = name in ("bert2bert-aki", "bert2bert") and axis == "head_dim"
    assert plan.exact == (CLAIMS[name][0] == "=" or axis == "vocab" or copies_nothing)
    big = growlib.expand(small, SINGLE[axis], name, exact=False)
    assert (relative_error(small, big, input_ids=token_ids(small)) <= RELATIVE) == plan.exact


INFERRED = {
    "olmo": {},  # its norms have no weight: the stream before and after them are two axes
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12},
    "qwen3": {"head_dim": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("model_type", ["olmo", *(pytest.param(t, marks=pytest.mark.slow) for t in list(INFERRED)[1:])])
def test_inferred_families(model_type, monkeypatch, tmp_path):
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path))
    sizes = {
        **{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIG_MAPPING[model_type]())]
    small = model_class(model_class.config_class(**sizes, **INFERRED[model_type]))
    randomise(small, 0, 0.2).eval()
    growth = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 4}
    for name, claims in CLAIMS.items():
        assert growlib.plan(small, growth, name).exact == (claims[0] == "=")
        big = growlib.expand(small, growth, name, exact=False)
        assert (relative_error(small, big, input_ids=token_ids(small)) <= RELATIVE) == (claims[0] == "="), name
