"""Tensors are made some rows at a time. Where they are cut changes no bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

import growlib
from growlib import apply, averages, operators, recycling
from growlib.averages import mean_along
from growlib.choice import PIECES, Choice, Copies
from growlib.show import split_layer

UNEVEN = {
    "llama": {"hidden_size": 72, "intermediate_size": 150, "num_attention_heads": 6, "num_key_value_heads": 3}
    | {"head_dim": 24, "num_hidden_layers": 4, "vocab_size": 70},
    "gpt2": {"n_embd": 72, "n_head": 6, "n_layer": 3, "vocab_size": 64},
    "bert": {"hidden_size": 96, "num_attention_heads": 8, "intermediate_size": 150, "num_hidden_layers": 4},
}


METHODS = (
    "lossless",
    "composable+gopher",
    "bert2bert-aki",
    "net2net+stack",
    "sparkling",
    "lemon",
    "random+interpolate",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", UNEVEN)
def test_blocks_change_nothing(family, method, monkeypatch):
    small, sizes = tiny(family), UNEVEN[family]
    if not operators.method(method).depth:
        sizes = {key: size for key, size in sizes.items() if "layer" not in key}
    plan = growlib.plan(small, sizes, method)
    kinds = {(split_layer(made.name)[0], made.constant, made.noise, made.share): made for made in plan.tensors}
    plan = replace(plan, tensors=tuple(kinds.values()))
    whole, parts = [], []
    for size, made in ((1 << 30, whole), (300, parts)):
        monkeypatch.setattr(apply, "BLOCK", size)
        made += apply.apply(plan, small.state_dict())
    for (name, one), (_, other) in zip(whole, parts, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", UNEVEN)
def test_the_source_stays_as_it_was(family):
    small = tiny(family)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    for method in ("lossless", "random+stack", "staged", "gstack"):
        sizes = UNEVEN[family] if "random" in method or method == "lossless" else {}
        for _, grown in apply.apply(growlib.plan(small, sizes, method), small.state_dict()):
            grown.add_(1.0)  # also where nothing grows, the result is a tensor of its own
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


pieces = st.one_of(
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.sampled_from([0, 1])),
    st.tuples(st.integers(9, 20), st.integers(1, 5), st.sampled_from([-1])),
)


@given(st.lists(pieces, min_size=1, max_size=PIECES + 3), st.integers(0, 2))
def test_a_choice_is_an_index_select(cut, dim):
    index = np.concatenate([first + step * np.arange(count) for first, count, step in cut])
    values = torch.randn(30, 30, 30)[:, :, ::2].contiguous() if dim < 2 else torch.randn(3, 3, 30)
    assert torch.equal(Choice(index)(values, dim), values.index_select(dim, torch.from_numpy(index)))


def test_few_pieces_are_slices():
    assert Choice(np.concatenate([np.arange(1000), np.zeros(500, np.int64), np.arange(40)]))._pieces == [
        (0, 1000, True), (0, 501, False), (1, 39, True)]  # fmt: skip
    assert not Choice(np.arange(100)[::-1])._pieces


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=20), st.integers(0, 1))
def test_noise_on_copies_cancels(source, dim):
    source = np.array(source)
    drawn = torch.randn(20, 20, dtype=torch.float64).narrow(dim, 0, len(source))
    centred = Copies(source).centred(drawn.clone(), dim)
    for entry in np.unique(source):
        members = torch.from_numpy(np.flatnonzero(source == entry))
        left, before = centred.index_select(dim, members), drawn.index_select(dim, members)
        expected = before if entry < 0 else before - before.mean(dim, keepdim=True)
        torch.testing.assert_close(left, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(1000, 7), (300, 4, 5), (999, 1), (5,), (40, 3)])
@pytest.mark.parametrize("dim", [0, -1])
def test_means_in_pieces_are_those_of_the_whole(shape, dim, monkeypatch):
    values, dim = torch.randn(shape) * 1e3 + 1e5, dim % len(shape)
    monkeypatch.setattr(averages, "CHUNK", 50)
    expected = np.add.reduce(values.double().numpy(), axis=dim, keepdims=True) / shape[dim]
    assert torch.equal(mean_along(values, dim, torch.float64), torch.from_numpy(expected))
    assert mean_along(values.bfloat16(), dim).dtype == torch.bfloat16


def test_memory_is_taken_again_and_never_shared(monkeypatch):
    monkeypatch.setattr(recycling, "SMALLEST", 1)
    monkeypatch.setattr(recycling, "KEPT", 1 << 12)
    memory, rng, living, places = recycling.Recycled(), np.random.default_rng(0), {}, set()
    for number in range(400):
        shape, dtype = rng.integers(1, 16, size=2).tolist(), (torch.float32, torch.bfloat16)[number % 2]
        made = memory.empty(shape, dtype=dtype, device=torch.device("cpu")).fill_(number % 100)
        assert (list(made.shape), made.dtype) == (shape, dtype)
        living[number] = (made.data_ptr(), made.view(-1) if number % 3 else made.t())  # what is left of it is a view
        places.add(made.data_ptr())
        del made
        for key in rng.choice(list(living), size=max(len(living) - 8, 0), replace=False).tolist():
            del living[key]
        assert all((view == key % 100).all() for key, (_, view) in living.items())
        assert len({place for place, _ in living.values()}) == len(living)
    assert sum(map(len, memory._left)) <= (1 << 12) + 8 * 15 * 15 * 4  # what lived last comes back whole
    assert len(places) < 200


def test_a_large_deviation_is_that_of_a_part(monkeypatch):
    monkeypatch.setattr(averages, "SEEN", 4 * averages.CHUNK)
    values = torch.randn(40 * averages.CHUNK + 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    assert averages.deviation(values) == pytest.approx(3, rel=5e-3)
    assert averages.deviation(values) != pytest.approx(values.double().std().item(), rel=1e-6)
    alike = torch.ones(40 * averages.CHUNK)
    assert averages.deviation(alike) == 0
    alike[averages.CHUNK] = 2  # where nothing was looked at
    assert averages.deviation(alike) == pytest.approx(alike.double().std(correction=0).item())
