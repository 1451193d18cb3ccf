"""Every method's maps against their formula, written out as dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny

import growlib
from growlib.architectures.schema import Axis
from growlib.operators import Method, copies, lemon, lossless, method, stack

sizes = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 4 * n)))


def matrices(axis_map):
    """E (N x n) and C (n x N) of a map, with what a norm over the axis does in between taken as `gain`."""
    writes = np.zeros((axis_map.new, axis_map.old))
    reads = np.zeros((axis_map.old, axis_map.new))
    for j, i in enumerate(axis_map.source):
        if i >= 0:
            writes[j, i] = axis_map.write
            reads[i, j] = axis_map.read[j]
        elif axis_map.new_writes == "mean":
            writes[j] = axis_map.write / axis_map.old
    return writes, reads


def grow(role, old, new, rule=copies, **axis):
    return rule.width("axis", Axis("size", role, **axis), {"axis": old}, {"axis": new}, 0)


@pytest.mark.parametrize("role", ["lookup", "linear", "elementwise", "key", "key_heads"])
@pytest.mark.parametrize("rule", [copies, lossless])
@given(size=sizes)
def test_readers_invert_writers(rule, role, size):
    axis_map = grow(role, *size, rule)
    writes, reads = matrices(axis_map)
    np.testing.assert_allclose(reads @ writes, np.eye(size[0]), atol=1e-12)
    # Where writers are free, readers are zero, and the other way round: nothing new reaches an old entry.
    new = axis_map.source < 0
    assert not (new.any() and axis_map.new_writes == "free" and axis_map.new_reads == "free") or role == "lookup"


@pytest.mark.parametrize("role", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("rule", [copies, lossless])
@given(size=sizes, seed=st.integers(0, 99))
def test_a_norm_over_the_axis_sees_the_same_statistics(rule, role, size, seed):
    n, N = size
    x, weight = np.random.default_rng(seed).normal(size=(2, n)) * 3 + 1
    axis_map = grow(role, n, N, rule)
    writes, reads = matrices(axis_map)
    wide, eps = writes @ x, 1e-3

    def normalised(v):
        centred = v - v.mean() if role == "layer_norm" else v
        return centred / np.sqrt((centred**2).mean() + eps)

    copied = np.where(axis_map.source >= 0, weight[axis_map.source], 0.7)
    np.testing.assert_allclose(reads @ (axis_map.gain * copied * normalised(wide)), weight * normalised(x), rtol=1e-9)
    new = axis_map.source < 0
    np.testing.assert_allclose(normalised(wide)[new], 0, atol=1e-9)


@pytest.mark.parametrize("role", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("rule", [copies, lossless])
@given(size=sizes, seed=st.integers(0, 99))
def test_a_tied_head_reads_what_the_embedding_writes(rule, role, size, seed):
    n, N = size
    embedding, state = np.random.default_rng(seed).normal(size=(2, n))
    axis_map = grow(role, n, N, rule)
    writes, _ = matrices(axis_map)
    copied = np.where(axis_map.source >= 0, state[axis_map.source], 0.0)  # what the final norm puts out
    np.testing.assert_allclose((writes @ embedding) @ (axis_map.tied_gain * copied), embedding @ state, rtol=1e-9)


@given(n=st.integers(2, 20), times=st.integers(1, 4))
def test_post_norm_takes_whole_copies_only(n, times):
    axis_map = grow("post_layer_norm", n, n * times)
    writes, reads = matrices(axis_map)
    np.testing.assert_allclose(reads @ writes, np.eye(n), atol=1e-12)
    assert axis_map.gain == 1.0
    assert not axis_map.inexact
    assert "not a whole multiple" in grow("post_layer_norm", n, n * times + 1).inexact


@given(pairs=st.integers(1, 16), times=st.integers(1, 4), rotary=st.booleans(), distance=st.integers(0, 50))
def test_attention_scores_stay(pairs, times, rotary, distance):
    """q · R(distance) k / sqrt(head_dim), with the rotation as complex numbers on pairs."""
    rng = np.random.default_rng(pairs)
    q, k = rng.normal(size=(2, pairs)) + 1j * rng.normal(size=(2, pairs))
    kind = "rotary_" if rotary else ""

    def score(q, k):
        n = len(q)
        turn = np.exp(1j * distance * 10000.0 ** (-np.arange(n) / n)) if rotary else 1.0
        return (q.conj() * turn * k).sum().real / np.sqrt(2 * n)

    query, key = (grow(f"{kind}{side}", pairs, pairs * times) for side in ("query", "key"))
    wide_k = matrices(key)[0] @ k
    wide_q = np.where(query.source < 0, 9.9, matrices(query)[0] @ q)  # new query rows are free
    np.testing.assert_allclose(score(wide_q, wide_k), score(q, k), rtol=1e-9, atol=1e-12)


@given(k=st.integers(1, 4), group=st.integers(1, 4), new_k=st.integers(1, 8), new_group=st.integers(1, 8))
def test_query_heads_stay_with_their_kv_head(k, group, new_k, new_group):
    old, new = {"heads": k * group, "kv": k}, {"heads": new_k * new_group, "kv": new_k}
    assume(new_k >= k and new["heads"] >= old["heads"])
    heads = copies.width("heads", Axis("h", "query_heads", groups="kv"), old, new, 0)
    kv_heads = copies.width("kv", Axis("k", "key_heads"), old, new, 0)
    kv_of_new_head = kv_heads.source[np.arange(new["heads"]) // new_group]
    np.testing.assert_array_equal(kv_of_new_head, heads.source // group)
    every_head_survives = set(heads.source) == set(range(old["heads"]))
    assert bool(heads.inexact) != every_head_survives
    assert every_head_survives == (new_k >= k * -(-group // new_group))


@given(old=st.integers(1, 12), more=st.integers(0, 30))
def test_depth_maps(old, more):
    layers = lossless.depth(old, old + more)
    acting = [s for s, identity in zip(layers.source, layers.identity, strict=True) if not identity]
    assert acting == list(range(old))
    assert layers.source == tuple(sorted(layers.source))
    stacked = stack.depth(old, old + more)
    assert stacked.source == (tuple(range(old)) * (more // old + 2))[: old + more]
    assert bool(stacked.inexact) == (more > 0)


def test_methods_compose_by_name_and_by_hand():
    both = method("lemon+stack")
    assert (both.width, both.depth) == (lemon.width, stack.depth)
    small, growth = tiny("llama"), {"hidden_size": 84, "num_attention_heads": 6, "num_key_value_heads": 3}
    by_hand = Method(width=lemon.width, depth=stack.depth)
    assert growlib.plan(small, growth, by_hand).maps == growlib.plan(small, growth, "lemon+stack").maps
    assert growlib.plan(small, growth, Method(width=lemon.width)).exact
    for wrong, lacking in (("stack+lemon", "stack has no width"), ("lemon+hypercloning", "hypercloning has no depth")):
        with pytest.raises(growlib.GrowError, match=lacking):
            method(wrong)


def test_a_stacked_model_repeats_its_layers():
    small = tiny("llama")
    big = growlib.expand(small, {"num_hidden_layers": 5}, "lossless+stack", exact=False)
    for layer in range(5):
        for new, old in zip(
            big.model.layers[layer].parameters(), small.model.layers[layer % 2].parameters(), strict=True
        ):
            assert torch.equal(new, old)


def test_the_default_grows_fresh_parts_where_they_are_exact_and_copies_elsewhere():
    wide = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 4}
    plan = growlib.plan(tiny("llama"), wide)
    fresh = {name for name, axis_map in plan.maps.items() if (axis_map.source < 0).any()}
    assert fresh == {"hidden", "ffn", "heads", "kv_heads"}
    assert plan.maps["hidden"].new_gain == lossless.NEW_GAIN
    post_norm = growlib.plan(tiny("bert"), {"hidden_size": 96, "intermediate_size": 224})
    assert {name for name, axis_map in post_norm.maps.items() if (axis_map.source < 0).any()} == {"ffn", "heads"}
    fewer = growlib.plan(tiny("llama"), {"hidden_size": 96, "num_key_value_heads": 4})  # 2 query heads each, then 1
    assert {name for name, axis_map in fewer.maps.items() if (axis_map.source < 0).any()} == {"hidden"}
    assert fewer.exact
    assert plan.exact
    assert post_norm.exact


def test_where_only_whole_copies_are_exact_the_default_makes_them():
    """BLOOM normalises its embeddings: a LayerNorm that sees new entries."""
    from transformers import BloomConfig, BloomForCausalLM

    small = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_head=3, n_layer=2)).eval()
    plan = growlib.plan(small, {"hidden_size": 48, "n_head": 6})
    assert not (plan.maps["hidden"].source < 0).any()
    assert growlib.plan(small, {"hidden_size": 48, "n_head": 6}, "composable").reasons


def test_the_norms_weight_on_new_entries_is_twice_the_mean():
    small = tiny("llama")
    norm, grown = (
        m.model.layers[0].input_layernorm.weight for m in (small, growlib.expand(small, {"hidden_size": 84}))
    )
    torch.testing.assert_close(grown[48:], (2 * norm.mean() * (48 / 84) ** 0.5).expand(36))
    torch.testing.assert_close(grown[:48], norm * (48 / 84) ** 0.5)
