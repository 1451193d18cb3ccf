"""Every depth method against its paper's formula, written out as a dense matrix over layers (LiGO's w)."""

from functools import partial
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, token_ids

import growlib
from growlib.operators import Method, gopher, interleave, llama_pro, method, midas, solar

RELATIVE = 1e-5
DEPTHS = [row.name for row in growlib.methods() if row.depth and not (row.reset or row.learned)]
FIELD = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bert": "num_hidden_layers"}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
WRITERS = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "bert": ("attention.output.dense", "output.dense"),
}


def rows(places, old):
    """w (L' x L) with the weight of one layer, or of two neighbours, in each row."""
    w = np.zeros((len(places), old))
    for t, place in enumerate(places):
        w[t, int(place)] += 1 - place % 1
        if place % 1:
            w[t, int(place) + 1] += place % 1
    return w


def blocks_around_the_middle(old, new):
    """MIDAS, one stage after the other: the middle block is written down twice."""
    size = max(d for d in range(1, old // 2 + 1) if old % d == new % d == 0)
    stack = [list(range(b, b + size)) for b in range(0, old, size)]
    while sum(map(len, stack)) < new:
        c = ceil(len(stack) / 2)
        stack = [*stack[:c], stack[c - 1], *stack[c:]]
    return [layer for block in stack for layer in block]


# The layers that stand at each place of the new stack, as the papers write them.
FORMULA = {
    "stack": lambda old, new: (list(range(old)) * new)[:new],
    "gstack": lambda old, new: list(range(old)) * (new // old),
    "interleave": lambda old, new: [int(t * old / new + 1e-9) for t in range(new)],
    "solar": lambda old, new: [*range(ceil(new / 2)), *range(old - new // 2, old)],
    "midas": blocks_around_the_middle,
    "gopher": lambda old, new: [min(int(np.rint(t * old / new)), old - 1) for t in range(new)],
    "interpolate": lambda old, new: list(np.linspace(0, old - 1, new)),
}
ALWAYS_ACTING = sorted(FORMULA)


@pytest.mark.parametrize("name", ALWAYS_ACTING)
@pytest.mark.parametrize("family", FIELD)
@pytest.mark.parametrize("new", [5, 8])
def test_layers_are_the_papers_mixture_of_layers(name, family, new):
    small = tiny(family, **{FIELD[family]: 4}).double()
    if name == "gstack" and new % 4:
        with pytest.raises(growlib.GrowError, match=r"4 or 8 layers"):
            growlib.plan(small, {FIELD[family]: new}, "gstack")
        return
    plan = growlib.plan(small, {FIELD[family]: new}, name)
    big = growlib.expand(small, {FIELD[family]: new}, name, exact=False)
    assert "acts again" in plan.reasons[0]
    w = torch.from_numpy(rows(FORMULA[name](4, new), 4))
    old, grown = (dict(model.get_submodule(LAYERS[family]).named_parameters()) for model in (small, big))
    for name in [n for n in old if n.startswith("0.")]:
        tensors = torch.stack([old[name.replace("0.", f"{layer}.", 1)] for layer in range(4)])
        expected = torch.einsum("tl,l...->t...", w, tensors)
        for t in range(new):
            torch.testing.assert_close(grown[name.replace("0.", f"{t}.", 1)], expected[t], rtol=1e-12, atol=1e-12)


def error(small, big):
    with torch.no_grad():
        old, new = (model(input_ids=token_ids(small)).logits for model in (small, big))
    return ((new - old).abs().max() / (old.max() - old.min())).item()


@pytest.mark.parametrize("family", FIELD)
@pytest.mark.parametrize(("name", "new"), [(n, new) for n in DEPTHS for new in (6, 8) if (n, new) != ("gstack", 6)])
def test_what_claims_exact_is_and_what_does_not_is_not(name, family, new):
    small = tiny(family, **{FIELD[family]: 4})
    growth = {FIELD[family]: new}
    plan = growlib.plan(small, growth, name)
    assert plan.exact == (method(name).exact != "never")
    assert (error(small, growlib.expand(small, growth, name, exact=False)) <= RELATIVE) == plan.exact


@pytest.mark.parametrize("family", FIELD)
def test_new_blocks_of_llama_pro_are_copies_with_zeroed_writers(family):
    small = tiny(family, **{FIELD[family]: 4})
    big = growlib.expand(small, {FIELD[family]: 6}, "llama-pro")
    for new, old in ((2, 1), (5, 3)):  # groups of two layers, and a block after each
        old_layer, new_layer = (m.get_submodule(LAYERS[family])[i] for m, i in ((small, old), (big, new)))
        for (name, grown), source in zip(new_layer.named_parameters(), old_layer.parameters(), strict=True):
            if name.rpartition(".")[0].endswith(WRITERS[family]):
                assert not grown.any(), name
            elif "LayerNorm" not in name:  # the norms of a post-norm block are (1, 0)
                assert torch.equal(grown, source), name


@given(old=st.integers(1, 12), more=st.integers(0, 30))
def test_new_blocks_stand_at_the_end_of_equal_groups(old, more):
    layers = llama_pro.depth(old, old + more)
    acting = [s for s, identity in zip(layers.source, layers.identity, strict=True) if not identity]
    assert acting == list(range(old))
    assert len(layers.source) == old + more
    if more and old % more == 0:  # the scripts of the paper
        split = old // more
        assert [t for t, new in enumerate(layers.identity) if new] == [(g + 1) * (split + 1) - 1 for g in range(more)]


@given(old=st.integers(1, 12), more=st.integers(0, 30))
def test_each_depth_covers_the_old_layers_in_range(old, more):
    for depth in (interleave.depth, gopher.depth, midas.depth):
        layers = depth(old, old + more)
        assert len(layers.source) == old + more
        assert set(layers.source) == set(range(old))
        assert bool(layers.inexact) == (more > 0)


def test_solar_as_published():
    assert solar.depth(32, 48).source == (*range(24), *range(8, 32))
    with pytest.raises(growlib.GrowError, match="up to 64 layers"):
        solar.depth(32, 65)


def test_a_list_of_source_layers():
    small = tiny("llama", num_hidden_layers=3)
    chosen = Method("merge", depth=partial(solar.depth, layers=(0, 1, 1, 0, 2)))
    big = growlib.expand(small, {"num_hidden_layers": 5}, chosen, exact=False)
    for new, old in enumerate((0, 1, 1, 0, 2)):
        assert torch.equal(big.model.layers[new].mlp.up_proj.weight, small.model.layers[old].mlp.up_proj.weight)
    for wrong in ((0, 1, 2), (0, 1, 2, 3, 0)):
        with pytest.raises(growlib.GrowError, match="5 layers between 0 and 2"):
            solar.depth(3, 5, layers=wrong)


def test_midas_in_blocks():
    assert midas.depth(6, 8, block=2).source == (0, 1, 2, 3, 2, 3, 4, 5)
    with pytest.raises(growlib.GrowError, match="a divisor of 2"):
        midas.depth(6, 8, block=3)


def test_noise_on_the_second_copies_of_layers_alone():
    small = tiny("llama", num_hidden_layers=3)
    noisy = Method("noisy", depth=partial(interleave.depth, noise=0.1))
    big = growlib.expand(small, {"num_hidden_layers": 6}, noisy, exact=False)
    for new, layer in enumerate(big.model.layers):
        for grown, source in zip(layer.parameters(), small.model.layers[new // 2].parameters(), strict=True):
            if new % 2 == 0:
                assert torch.equal(grown, source)
            elif source.ndim == 2:
                ratio = (grown - source).std() / source.std()
                assert 0.09 < ratio < 0.11


def test_per_layer_lists_follow_the_layers():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    small = Qwen2ForCausalLM(config).eval()
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    for name in ("stack", "interleave", "llama-pro"):
        plan = growlib.plan(small, {"num_hidden_layers": 4}, name)
        source = plan.layers["num_hidden_layers"].source
        assert plan.config.layer_types == [small.config.layer_types[layer] for layer in source]
