"""Every width method's formula in its paper, as dense float64 matrices."""

from functools import partial

import numpy as np
import pytest
import torch
from test_width import CLAIMS, GROWTHS
from tiny import tiny

import growlib
from growlib.operators import Method, hypercloning, lemon, net2net, sparkling

# Formulas: E (N x n) is what writers put on an axis, C (n x N) what readers take from it.


def copies(g, n):
    """E of a map g, new entry j -> old entry g(j)."""
    return np.eye(n)[g]


def circular(n, N):
    return np.array([j % n for j in range(N)])


def shared(E):
    """C of copies whose readers divide by their number."""
    return (E / E.sum(0)).T


def padded(n, N, q):
    """[x, .., x, 0] and its even readers, q copies."""
    E = np.concatenate([np.eye(n)] * q + [np.zeros((N - q * n, n))])
    return E, E.T / q


CIRCULAR = ("copies", "lemon", "hypercloning", "staged", "sparkling")


def index_map(name, n, N, grown, source, axis="hidden"):
    """g of the paper, new entry -> old entry, -1 where it is new; the plan has no say in it.

    Random copies are recognised by their values: `grown` [N, ..] and `source` [n, ..] hold a vector for each entry.
    """
    if name in CIRCULAR:
        return circular(n, N)
    if name in ("composable", "lossless"):
        return np.where(np.arange(N) < n, np.arange(N), -1)
    distance = abs(grown[:, None] - source[None]).max(-1)
    g = distance.argmin(1)
    assert distance.min(1).max() < 1e-10  # each is a copy of an old one
    return g


def formula(name, n, N, g, axis):
    """E, C and the factor on a norm's weight as the papers have them; the norm's eps is rescaled into E (see docs)."""
    E = copies(g, n) * (g >= 0)[:, None]
    if name in ("bert2bert-fpi", "bert2bert-aki") or (name == "net2net" and axis != "hidden"):
        return E, shared(E), 1.0
    if name == "sparkling":
        scale = np.sqrt(n / (3 * N - 2 * n)) if 2 * n >= N else n / N
        return E, scale * E.T, 1.0
    if name in ("composable", "lossless"):
        E, C = padded(n, N, 1)
        root = np.sqrt(n / N) if axis == "hidden" else 1.0  # g sqrt(h / h')
        return E / root, C, root
    if axis == "hidden":
        q = N // n
        E, C = padded(n, N, q)
        root = np.sqrt(q * n / N)
        return E / root, C, root
    return E, shared(E), 1.0


def llama_maps(small, big, sizes, name):
    """The papers' maps of each axis, (n, N) in `sizes`."""
    n, N = sizes["hidden"]
    old, new = ({key: tensor.numpy() for key, tensor in state.items()} for state in (small.state_dict(), big))
    embedded = (state["model.embed_tokens.weight"].T for state in (new, old))
    g = circular(n, N) if name == "net2net" else index_map(name, n, N, *embedded)
    made = {"hidden": formula(name, n, N, g, "hidden")}
    E, _, gain = made["hidden"]
    for axis, kind in (("ffn", "mlp.gate_proj"), ("kv_heads", "self_attn.v_proj"), ("heads", "self_attn.q_proj")):
        n, N = sizes[axis]
        row = f"model.layers.0.{kind}.weight"
        seen, source = (new[row] @ (gain * E)).reshape(N, -1), old[row].reshape(n, -1)  # of an old entry of hidden
        made[axis] = formula(name, n, N, index_map(name, n, N, seen, source, axis), axis)
    return made


def llama_by_formula(small, made):
    """Each tensor of the grown Llama as (name, E_out W C_in, what it reads of an old entry, E_out W)."""
    (E, C, gain), (Ef, Cf, _) = made["hidden"], made["ffn"]
    wide = np.eye(small.config.head_dim)
    Eh, Ch, Ek = np.kron(made["heads"][0], wide), np.kron(made["heads"][1], wide), np.kron(made["kv_heads"][0], wide)
    out = {"q_proj": Eh, "k_proj": Ek, "v_proj": Ek, "o_proj": E, "gate_proj": Ef, "up_proj": Ef, "down_proj": E}
    into = {"o_proj": (Ch, Eh), "down_proj": (Cf, Ef)}
    for key, tensor in small.state_dict().items():
        kind, W = key.split(".")[-2], tensor.numpy()
        if W.ndim == 1:
            yield key, gain * (E > 0) @ W, None, None
        elif kind == "embed_tokens":
            yield key, W @ E.T, None, None
        else:
            inward, seen = into.get(kind, (C, gain * E))
            written = out.get(kind, np.eye(len(W))) @ W
            yield key, written @ inward, seen, written


def old_rows(made, key):
    """The rows of a Llama tensor that are no new units."""
    axis = {"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads", "gate_proj": "ffn", "up_proj": "ffn"}
    kind = key.split(".")[-2]
    if kind not in axis:
        return slice(None)
    return np.repeat(made[axis[kind]][0].any(1), 1 if axis[kind] == "ffn" else 12)


LLAMA = {
    "whole": GROWTHS["whole"]["llama"],
    "between": {"hidden_size": 80, "intermediate_size": 113, "num_attention_heads": 8, "num_key_value_heads": 4},
}
BY_MATRICES = sorted(set(CLAIMS) - {"bert2bert", "bert2bert-aki", "random", "staged"})
NO_FREE_VALUES = {("bert2bert-fpi", "whole"), ("bert2bert-fpi", "between"), ("net2net", "whole")}
NO_FREE_VALUES |= {("sparkling", "whole"), ("sparkling", "between")}


SIZES = {
    "whole": {"hidden": (48, 96), "ffn": (112, 224), "heads": (4, 8), "kv_heads": (2, 4)},
    "between": {"hidden": (48, 80), "ffn": (112, 113), "heads": (4, 8), "kv_heads": (2, 4)},
}
WHOLE_ONLY = ("hypercloning",)


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in BY_MATRICES for s in LLAMA if s == "whole" or n not in WHOLE_ONLY]
)
def test_llama_grows_by_the_papers_matrices(name, size):
    small = tiny("llama").double()
    big = growlib.expand(small, LLAMA[size], name, exact=False).state_dict()
    equal = {"rtol": 1e-10, "atol": 1e-10}
    made = llama_maps(small, big, SIZES[size], name)
    for key, expected, seen, written in llama_by_formula(small, made):
        grown = big[key].numpy()
        if grown.ndim == 1:  # norm weights on new entries are free
            np.testing.assert_allclose(grown[expected != 0], expected[expected != 0], **equal)
        elif seen is None or (name, size) in NO_FREE_VALUES:
            np.testing.assert_allclose(grown, expected, **equal)
        else:  # what a reader computes from the copies is what it computed: W' E = E W
            rows = old_rows(made, key)
            np.testing.assert_allclose(grown[rows] @ seen, written[rows], **equal)


@pytest.mark.parametrize("size", LLAMA)
@pytest.mark.parametrize("name", ["net2net", "bert2bert-fpi"])
def test_random_copies_in_the_tensors_are_the_papers(name, size):
    """Of the values, not of the plan: old entries first, every one of them copied once more before any twice more."""
    small = tiny("llama").double()
    made = llama_maps(small, growlib.expand(small, LLAMA[size], name, exact=False).state_dict(), SIZES[size], name)
    for axis, (n, N) in SIZES[size].items():
        if axis == "hidden" and name == "net2net":
            continue  # takes the map of `copies`
        g = made[axis][0].argmax(1)
        if axis in ("hidden", "ffn"):
            assert (g[:n] == np.arange(n)).all()
        if name != "net2net" or axis != "ffn":
            assert set(np.bincount(g, minlength=n)) <= {N // n, -(-N // n)}
    heads, kv = made["heads"][0].argmax(1), made["kv_heads"][0].argmax(1)
    assert (heads // 2 == kv[np.arange(len(heads)) // (len(heads) // len(kv))]).all()


@pytest.mark.parametrize("name", ["net2net", "bert2bert-fpi"])
def test_random_copies_are_the_papers(name):
    small = tiny("llama")
    plans = [growlib.plan(small, {"intermediate_size": 250}, name, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (plan.maps["ffn"].source for plan in plans)
    assert (first == again).all()
    assert (first != other).any()
    assert (first[:112] == np.arange(112)).all()
    counts = np.bincount(first)
    assert counts.max() > 3 if name == "net2net" else set(counts) == {2, 3}


def test_net2net_noise_is_on_the_copies_alone():
    small, growth = tiny("llama"), {"intermediate_size": 200}
    noisy = Method("noisy", width=partial(net2net.width, noise=0.1))
    plan = growlib.plan(small, growth, noisy)
    assert "noise on the copied units" in plan.reasons[0]
    g = plan.maps["ffn"].source
    W, big = small.model.layers[0].mlp.up_proj.weight, growlib.expand(small, growth, noisy, exact=False)
    difference = big.model.layers[0].mlp.up_proj.weight - W[g]
    assert not difference[:112].any()
    assert 0.09 < difference[112:].std() / W.std() < 0.11


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_aki_takes_new_rows_from_the_next_layer(family):
    """In float64 and dense: rows j >= n of layer l are rows g(j) of layer l + 1, with columns as in FPI."""
    sizes = {"gpt2": {"n_layer": 3}}.get(family, {"num_hidden_layers": 3})
    small = tiny(family, **sizes).double()
    growth = GROWTHS["whole"][family]
    plan = growlib.plan(small, growth, "bert2bert-aki")
    fpi = growlib.expand(small, growth, "bert2bert-fpi").state_dict()
    aki = growlib.expand(small, growth, "bert2bert-aki", exact=False).state_dict()
    assert plan.maps["ffn"] != growlib.plan(small, growth, "bert2bert-fpi").maps["ffn"]
    hidden, ffn = (np.arange(plan.new_sizes[a]) >= plan.old_sizes[a] for a in ("hidden", "ffn"))
    heads = np.arange(plan.new_sizes["heads"]) >= plan.old_sizes["heads"]
    if family == "llama":  # a new query head stands beside its KV head: 2 and 3 are copies of none before
        assert plan.maps["heads"].source[:4].tolist() == [0, 1, 2, 3]
    checked = 0
    for key, grown in aki.items():
        layer = next((int(word) for word in key.split(".") if word.isdigit()), None)
        if layer is None or "norm" in key.lower() or "ln_" in key:
            assert torch.equal(grown, fpi[key])
            continue
        following = fpi[key.replace(f".{layer}.", f".{min(layer + 1, 2)}.")]
        rows = {len(hidden): hidden, len(ffn): ffn}
        side = 1 if family == "gpt2" and grown.ndim == 2 else 0
        length = grown.shape[side]
        if "c_attn" in key:
            mask = np.tile(np.repeat(heads, 12), 3)
        elif any(part in key for part in ("q_proj", "query", "k_proj", "key", "v_proj", "value")):
            count = length // 12
            mask = np.repeat(np.arange(count) >= count // 2, 12)
        else:
            mask = rows[length]
        mask = torch.from_numpy(mask)
        mask = mask[:, None] if grown.ndim == 2 and side == 0 else mask
        torch.testing.assert_close(grown, torch.where(mask, following, fpi[key]), rtol=1e-12, atol=1e-12)
        checked += 1
    assert checked > 10


def test_staged_is_block_diagonal():
    small = tiny("llama", tie_word_embeddings=True).double()
    big = growlib.expand(small, GROWTHS["whole"]["llama"], "staged", exact=True).state_dict()
    for key, W in small.state_dict().items():
        grown = big[key]
        if W.ndim == 1:
            expected = torch.cat([W, W]) / (2 if key == "model.norm.weight" else 1)
        elif "embed" in key or "lm_head" in key:
            expected = torch.cat([W, W], dim=1)
        else:
            expected = torch.block_diag(W, W)
        torch.testing.assert_close(grown, expected, rtol=1e-12, atol=1e-12)
    fused = tiny("gpt2").double()
    grown = growlib.expand(fused, GROWTHS["whole"]["gpt2"], "staged", exact=True).transformer.h[0].attn.c_attn.weight
    parts = fused.transformer.h[0].attn.c_attn.weight.split(48, dim=1)
    torch.testing.assert_close(grown, torch.cat([torch.block_diag(p, p) for p in parts], dim=1))


def test_staged_shares_evenly_where_the_sides_differ():
    small = tiny("llama").double()
    for growth in ({"intermediate_size": 336}, {"hidden_size": 96, "intermediate_size": 336}):
        big = growlib.expand(small, growth, "staged", exact=True)
        W = small.model.layers[0].mlp.down_proj.weight
        copies = growth.get("hidden_size", 48) // 48
        expected = torch.cat([torch.cat([W] * 3, dim=1) / 3] * copies)
        torch.testing.assert_close(big.model.layers[0].mlp.down_proj.weight, expected)


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_hypercloning_noise_cancels_at_its_level(times, snr_db):
    small = tiny("llama").double()
    chosen = Method("noisy", width=partial(hypercloning.width, snr_db=snr_db))
    big = growlib.expand(small, {"intermediate_size": 112 * times}, chosen, exact=True)
    W = small.model.layers[0].mlp.down_proj.weight / times
    noise = (big.model.layers[0].mlp.down_proj.weight - torch.cat([W] * times, dim=1)).unflatten(1, (times, 112))
    torch.testing.assert_close(noise.sum(1), torch.zeros_like(W), rtol=0, atol=1e-12)
    measured = 10 * torch.log10(W.var() / noise.var())
    assert abs(measured - snr_db) < 0.5


def test_hypercloning_without_noise():
    small = tiny("llama").double()
    quiet = Method("quiet", width=partial(hypercloning.width, snr_db=float("inf")))
    big = growlib.expand(small, GROWTHS["whole"]["llama"], quiet, exact=True)
    W = small.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(big.model.layers[1].mlp.up_proj.weight, torch.cat([torch.cat([W, W], 1)] * 2) / 2)


@pytest.mark.parametrize("split", ["comp", "projection"])
def test_lemon_splits_its_readers_unequally(split):
    small = tiny("llama").double()
    chosen = Method("lemon", width=partial(lemon.width, split=split, noise=0.2))
    big = growlib.expand(small, {"intermediate_size": 280}, chosen, exact=True)  # 2.5: three copies of half the units
    W, grown = (m.model.layers[0].mlp.down_proj.weight for m in (small, big))
    first, second, third = grown.split([112, 112, 56], dim=1)
    torch.testing.assert_close(first + second + torch.cat([third, torch.zeros(48, 56)], dim=1), W)
    assert (first - second).abs().min() > 0
    share = (second[:, 56:] * W[:, 56:]).sum() / (W[:, 56:] ** 2).sum()  # of W in the second of two copies
    assert abs(share - (0.5 if split == "projection" else 0.0)) < 0.02
    noise = (second - share * W)[:, 56:].std() / W.std()
    assert 0.9 < noise / (0.2 / 2 * 0.5**0.5) < 1.1


def test_lemon_puts_new_layers_behind_the_last_ones():
    assert lemon.depth(6, 9).source == (0, 1, 2, 3, 3, 4, 4, 5, 5)
    assert lemon.depth(2, 7).source == (0, 0, 0, 1, 1, 1, 1)
    assert sum(lemon.depth(2, 7).identity) == 5


@pytest.mark.parametrize(("n", "N"), [(400, 500), (400, 640), (400, 800), (300, 1200)])
def test_sparkling_keeps_the_variance(n, N):
    """y = W x with rows of W and x independent; whole copies keep y itself."""
    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(2000, n)), rng.normal(size=n)
    wide = sparkling.scale(n, N) * W[:, np.arange(N) % n] @ x[np.arange(N) % n]
    reference = W @ x
    if N % n == 0:
        np.testing.assert_allclose(wide, reference)
    expected = np.sqrt(sparkling.scale(n, N) ** 2 * ((n - N % n) * (N // n) ** 2 + N % n * (N // n + 1) ** 2) / n)
    assert abs(wide.std() / reference.std() - expected) < 0.1
    assert abs(expected - 1) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_random_keeps_the_corner(family):
    small = tiny(family).double()
    big = growlib.expand(small, GROWTHS["whole"][family], "random", exact=False).state_dict()
    for key, W in small.state_dict().items():
        if "c_attn" in key or "heads" in key or W.shape == big[key].shape:
            continue
        corner = big[key][tuple(slice(length) for length in W.shape)]
        torch.testing.assert_close(corner, W)
        if W.ndim == 2 and len(W) < len(big[key]):
            assert 0.9 < big[key][len(W) :].std() / W.std() < 1.25


def test_composable_keeps_the_corner_and_its_new_parts_silent():
    small = tiny("llama").double()
    plan = growlib.plan(small, LLAMA["between"], "composable")
    big = growlib.expand(small, LLAMA["between"], "composable", exact=True).model.layers[0]
    assert not big.mlp.down_proj.weight[:, 112:].any()
    new_heads = np.flatnonzero(plan.maps["heads"].source < 0)
    assert len(new_heads) == 4
    assert not big.self_attn.o_proj.weight.unflatten(1, (8, 12))[:, new_heads].any()
    for silent in (big.mlp.down_proj, big.self_attn.o_proj):
        assert not silent.weight[48:].any()  # the residual stream is padded with zeros
    for spoken in (big.mlp.up_proj.weight[112:], big.mlp.up_proj.weight[:, 48:], big.self_attn.v_proj.weight[24:]):
        assert 0.8 < spoken.std() / small.model.layers[0].mlp.up_proj.weight.std() < 1.2


def test_composable_refuses_smaller_groups():
    growth = {"num_attention_heads": 4, "num_key_value_heads": 4}
    assert "fewer than the old 2" in growlib.plan(tiny("llama"), growth, "composable").reasons[0]
    assert growlib.plan(tiny("llama"), growth, "lossless").exact


def test_query_heads_follow_shuffled_kv_heads():
    small = tiny("llama", hidden_size=96, num_attention_heads=8, num_key_value_heads=4)
    for seed in range(4):
        for name in ("net2net", "bert2bert-fpi"):
            growth = {"num_attention_heads": 12, "num_key_value_heads": 12}
            plan = growlib.plan(small, growth, name, seed=seed)
            heads, kv = plan.maps["heads"].source, plan.maps["kv_heads"].source
            assert (heads // 2 == kv).all()
            assert plan.exact == (set(heads) == set(range(8)))
            assert plan.exact
