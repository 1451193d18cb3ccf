"""The promise of the weights half: the grown model computes what the source computes, at any size."""

import copy

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny, token_ids

import growlib

RELATIVE = 1e-5


def relative_error(small, big, **inputs):
    """max |Δlogit| on the old tokens over the spread of the source's logits."""
    with torch.no_grad():
        old, new = small(**inputs).logits, big(**inputs).logits
    return ((new[..., : old.shape[-1]] - old).abs().max() / (old.max() - old.min())).item()


def assert_exact(small, growth, inputs=None, **arguments):
    before = copy.deepcopy(small.state_dict())
    plan = growlib.plan(small, growth)
    big = growlib.expand(small, growth, exact=True, **arguments)
    assert plan.exact
    assert plan.reasons == ()
    assert not big.training
    assert relative_error(small, big, **(inputs or {"input_ids": token_ids(small)})) <= RELATIVE
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    return big


@st.composite
def llama_cases(draw):
    """A tiny Llama and a target with every size drawn: (options of the source, growth)."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    unit = kv_heads * group
    source = {
        "hidden_size": unit * draw(st.integers(2, 9)),
        "intermediate_size": draw(st.integers(3, 40)),
        "num_attention_heads": unit,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    # Any group at least as large serves; a smaller one needs enough KV heads for all old query heads.
    new_group = draw(st.integers(1, 2 * group))
    least = kv_heads * -(-group // new_group)
    new_kv = draw(st.integers(least, least + 3))
    heads = new_kv * new_group
    if heads < unit:
        new_kv = -(-unit // new_group)
        heads = new_kv * new_group
    hidden = -(-source["hidden_size"] // heads) * heads + heads * draw(st.integers(0, 8))
    growth = {
        "hidden_size": hidden,
        "intermediate_size": source["intermediate_size"] + draw(st.integers(0, 50)),
        "num_attention_heads": heads,
        "num_key_value_heads": new_kv,
        "head_dim": head_dim * draw(st.integers(1, 3)),
        "num_hidden_layers": source["num_hidden_layers"] + draw(st.integers(0, 4)),
        "vocab_size": 61 + draw(st.integers(0, 20)),
    }
    return source, growth


@given(llama_cases(), st.integers(0, 3))
@settings(max_examples=40)
def test_llama_at_any_size(case, seed):
    source, growth = case
    assert_exact(tiny("llama", seed=seed, **source), growth, seed=seed)


@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(8, 11),  # LayerNorm over fewer than 8 channels amplifies any rounding
    more_heads=st.integers(0, 3),
    more_head_dim=st.integers(0, 6),
    inner=st.one_of(st.none(), st.integers(5, 60)),
    more_inner=st.integers(0, 30),
    more=st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 20)),
    tied=st.booleans(),
)
@settings(max_examples=40)
def test_gpt2_at_any_size(heads, head_dim, more_heads, more_head_dim, inner, more_inner, more, tied):
    width = heads * head_dim
    source = {"n_embd": width, "n_head": heads, "n_inner": inner, "tie_word_embeddings": tied}
    growth = {
        "n_head": heads + more_heads,
        "n_embd": (heads + more_heads) * (width // heads + more_head_dim),
        "n_layer": 2 + more[0],
        "vocab_size": 61 + more[1],
        "n_positions": 32 + more[2],
    }
    if inner is not None:
        growth["n_inner"] = inner + more_inner
    assert_exact(tiny("gpt2", **source), growth)


@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(8, 11),
    times=st.integers(1, 4),
    inner=st.integers(3, 40),
    more=st.tuples(st.integers(0, 50), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)),
    more_heads=st.booleans(),
    tied=st.booleans(),
)
@settings(max_examples=40)
def test_bert_at_any_whole_multiple(heads, head_dim, times, inner, more, more_heads, tied):
    width = heads * head_dim
    source = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }
    growth = {
        "hidden_size": times * width,
        "num_attention_heads": heads * times if more_heads else heads,
        "intermediate_size": inner + more[0],
        "num_hidden_layers": 2 + more[1],
        "vocab_size": 61 + more[2],
        "max_position_embeddings": 32 + more[3],
        "type_vocab_size": 3,
    }
    small = tiny("bert", **source)
    ids = token_ids(small)
    inputs = {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": torch.ones_like(ids).tril(9)}
    assert_exact(small, growth, inputs)


EVERYTHING = {
    "llama": {
        "hidden_size": 84,
        "intermediate_size": 113,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "num_hidden_layers": 5,
        "vocab_size": 70,
    },
    "gpt2": {"n_embd": 84, "n_head": 6, "n_layer": 5, "n_inner": 300, "vocab_size": 70, "n_positions": 40},
    "bert": {"hidden_size": 96, "num_hidden_layers": 5, "intermediate_size": 113, "vocab_size": 70},
}


@pytest.mark.parametrize("family", EVERYTHING)
def test_reloaded_from_disk(family, tmp_path):
    small = tiny(family)
    big = assert_exact(small, EVERYTHING[family])
    big.save_pretrained(tmp_path)
    again = type(big).from_pretrained(tmp_path).eval()
    assert relative_error(small, again, input_ids=token_ids(small)) <= RELATIVE
    assert growlib.verify(small, tmp_path).exact
    assert again.config.tie_word_embeddings == small.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_a_kv_cache(family):
    small = tiny(family)
    big = growlib.expand(small, EVERYTHING[family])
    ids = token_ids(small)
    for model in (small, big):
        past = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        steps = [model(input_ids=ids[:, t : t + 1], past_key_values=past).logits for t in range(10, 20)]
        model.cached = torch.cat(steps, dim=1)
    new = big.cached[..., : small.cached.shape[-1]]
    assert (new - small.cached).abs().max() <= RELATIVE * (small.cached.max() - small.cached.min())


def test_greedy_generation_is_the_same():
    small = tiny("llama", tie_word_embeddings=True)
    growth = {**EVERYTHING["llama"], "vocab_size": small.config.vocab_size}
    big = growlib.expand(small, growth)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(token_ids(small))
    assert torch.equal(big.generate(token_ids(small), **options), small.generate(token_ids(small), **options))


@pytest.mark.parametrize(
    ("family", "model_class"), [("llama", T.LlamaModel), ("gpt2", T.GPT2Model), ("bert", T.BertModel)]
)
def test_base_models_keep_each_channel_unscaled(family, model_class):
    small = tiny(family, model_class)
    big = growlib.expand(small, EVERYTHING[family], exact=True)
    assert growlib.verify(small, big).exact
    ids = token_ids(small)
    source = torch.from_numpy(growlib.plan(small, EVERYTHING[family]).maps["hidden"].source)
    with torch.no_grad():
        old, new = small(ids).last_hidden_state, big(ids).last_hidden_state
    copied = old[..., source.clip(0)] * (source >= 0)
    assert (new - copied).abs().max() <= RELATIVE * (old.max() - old.min())


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llama", T.LlamaForSequenceClassification),
        ("gpt2", T.GPT2ForSequenceClassification),
        ("gpt2", T.GPT2ForTokenClassification),
        ("bert", T.BertForSequenceClassification),
        ("bert", T.BertForPreTraining),
        ("bert", T.BertForQuestionAnswering),
        ("bert", T.BertLMHeadModel),
    ],
)
def test_other_heads_of_a_family(family, model_class):
    options = {"is_decoder": True} if model_class is T.BertLMHeadModel else {}
    small = tiny(family, model_class, **options)
    big = growlib.expand(small, EVERYTHING[family], exact=True)
    assert growlib.verify(small, big).exact


def test_a_tied_source_grows_into_an_untied_target():
    small = tiny("llama", tie_word_embeddings=True)
    big = assert_exact(small, {**EVERYTHING["llama"], "tie_word_embeddings": False})
    assert big.lm_head.weight is not big.model.embed_tokens.weight


def test_new_bias_flags_start_at_zero():
    assert_exact(tiny("llama"), {**EVERYTHING["llama"], "attention_bias": True, "mlp_bias": True})


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_head_dim_under_scaled_rotary_embeddings(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    assert_exact(tiny("llama", rope_parameters=rope), {"head_dim": 24})


def test_unscaled_attention_scores():
    assert_exact(tiny("gpt2", scale_attn_weights=False), {"n_embd": 84, "n_head": 6})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", EVERYTHING)
def test_half_precision_stays_in_its_dtype(family, dtype):
    wide = tiny(family, scale=0.1)
    small = copy.deepcopy(wide).to(dtype)
    rounding = relative_error(copy.deepcopy(small).float(), small, input_ids=token_ids(small))
    big = growlib.expand(small, EVERYTHING[family])
    assert {p.dtype for p in big.parameters()} == {dtype}
    assert relative_error(small, big, input_ids=token_ids(small)) <= 4 * rounding
    assert growlib.verify(small, big).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_of_the_result_can_be_chosen(dtype):
    assert growlib.expand(tiny("llama"), {"hidden_size": 96}, dtype=dtype).dtype == torch.bfloat16


def test_growing_twice_is_exact():
    small = tiny("gpt2")
    middle = growlib.expand(small, {"n_embd": 84, "n_head": 6, "n_layer": 3})
    big = growlib.expand(middle, {"n_embd": 140, "n_head": 10, "n_layer": 4}, exact=True)
    assert relative_error(small, big, input_ids=token_ids(small)) <= RELATIVE


def test_the_seed_decides_every_bit():
    small = tiny("llama")
    first, again = (growlib.expand(small, EVERYTHING["llama"], seed=3).state_dict() for _ in range(2))
    other = growlib.expand(small, EVERYTHING["llama"], seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])
