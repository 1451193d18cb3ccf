"""LiGO: its formula, written out; its gradients; what learning gains; what it refuses."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from test_training import GROWTHS
from tiny import randomise, tiny, token_ids
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

import growlib
from growlib import GrowError
from growlib.checkpoint import loading as checkpoint
from growlib.inference import architecture_of
from growlib.learning import _loss_through, _to_factors
from growlib.operators import ligo, method


def rows_of(small, plan):
    return ligo.rows(plan, architecture_of(small.config, type(small)), checkpoint.skeleton(small))


def factors_of(small, growth, name="ligo"):
    """The factors of a growth in float64, moved off their start so that no factor is zero or one."""
    plan = growlib.plan(small, growth, method(name))
    rows = rows_of(small, plan)
    tensors = {name: tensor.detach().double() for name, tensor in small.state_dict().items()}
    factors = ligo.Factors(plan, rows, tensors)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return factors, rows


def matrices(factors, stack):
    """The matrix of each axis as numpy: `of(axis)` of the whole model, `of(axis, k)` of a source layer."""

    def of(axis, k=None):
        known = {a: m.detach().numpy() for (a, s), m in factors.width.items() if s in ("", stack)}
        if axis not in known:
            return np.eye(factors.plan.old_sizes[axis])
        return known[axis] if known[axis].ndim == 2 else known[axis][k]

    return of


def grown_by(factors, rows):
    with torch.no_grad():
        return {name: t.numpy() for row in rows for name, t in factors.grow(row).items()}


def mix(factors, rows, name):
    """w of the row that has a tensor."""
    return next(factors.depth[row].detach().numpy() for row in rows if name in {e.name for e in row.grown})


def test_llama_against_dense_matrices():
    small = tiny("llama", attention_bias=True)
    factors, rows = factors_of(small, GROWTHS["llama"])
    of, big = matrices(factors, "num_hidden_layers"), grown_by(factors, rows)
    source = {name: tensor.double().numpy() for name, tensor in small.state_dict().items()}
    hidden, two = of("hidden"), np.eye(2)
    for part, heads, inner in (("q", "heads", "query"), ("k", "kv_heads", "key")):
        name = "model.layers.{}.self_attn." + part + "_proj.{}"
        w, b = (mix(factors, rows, name.format(0, kind)) for kind in ("weight", "bias"))
        out = [np.kron(of(heads, k), np.kron(two, of(inner, k))) for k in range(2)]
        for t in range(5):
            weight = sum(w[t, k] * out[k] @ source[name.format(k, "weight")] @ hidden.T for k in range(2))
            bias = sum(b[t, k] * out[k] @ source[name.format(k, "bias")] for k in range(2))
            np.testing.assert_allclose(big[name.format(t, "weight")], weight, atol=1e-12)
            np.testing.assert_allclose(big[name.format(t, "bias")], bias, atol=1e-12)
    o, down, norm = (f"model.layers.{{}}.{n}.weight" for n in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm"))
    for t in range(5):
        w = mix(factors, rows, o.format(0))
        value = [np.kron(of("heads", k), of("value", k)) for k in range(2)]
        expected = sum(w[t, k] * hidden @ source[o.format(k)] @ value[k].T for k in range(2))
        np.testing.assert_allclose(big[o.format(t)], expected, atol=1e-12)
        w = mix(factors, rows, down.format(0))
        expected = sum(w[t, k] * hidden @ source[down.format(k)] @ of("ffn", k).T for k in range(2))
        np.testing.assert_allclose(big[down.format(t)], expected, atol=1e-12)
        w = mix(factors, rows, norm.format(0))
        expected = sum(w[t, k] * hidden @ source[norm.format(k)] for k in range(2))
        np.testing.assert_allclose(big[norm.format(t)], expected, atol=1e-12)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = source[name]
        more = np.repeat(old.mean(0, keepdims=True), 70 - 61, axis=0)
        np.testing.assert_allclose(big[name], np.concatenate([old, more]) @ hidden.T, atol=1e-12)


def test_the_fused_matrix_of_gpt2():
    small = tiny("gpt2")
    factors, rows = factors_of(small, GROWTHS["gpt2"])
    of, big = matrices(factors, "n_layer"), grown_by(factors, rows)
    name = "transformer.h.{}.attn.c_attn.weight"  # Conv1D: [in, out]
    w, fused = mix(factors, rows, name.format(0)), {k: small.state_dict()[name.format(k)].double() for k in range(2)}
    for t in range(5):
        expected = 0.0
        for k in range(2):
            out = [np.kron(of("heads", k), of(axis, k)) for axis in ("query", "key", "value")]
            parts = fused[k].numpy().reshape(48, 3, 48)
            wide = [of("hidden") @ parts[:, i] @ out[i].T for i in range(3)]
            expected = expected + w[t, k] * np.concatenate(wide, axis=1)
        np.testing.assert_allclose(big[name.format(t)], expected, atol=1e-12)


@pytest.mark.parametrize("family", GROWTHS)
def test_it_starts_at_the_identity_beside_small_new_rows(family):
    small = tiny(family)
    plan = growlib.plan(small, GROWTHS[family], "ligo")
    assert not plan.exact
    factors, rows = factors_of(small, GROWTHS[family])
    fresh = ligo.Factors(plan, rows, factors.tensors)
    for (axis, _), matrix in fresh.width.items():
        source = plan.maps[axis].source
        assert sorted(source[source >= 0]) == list(range(plan.old_sizes[axis]))
        old = matrix.detach()[..., source >= 0, :]
        assert ((old != 0).sum(-1) == 1).all()
        if axis in ("hidden", "ffn") and (source < 0).any():
            norm = matrix.detach()[..., source < 0, :].norm(dim=-1).mean()
            assert norm.item() == pytest.approx(ligo.NEW_ROW, rel=0.1)
    for w in fresh.depth.values():
        assert w.detach().argmax(1).tolist() == [0, 0, 0, 1, 1]
        assert w.detach().sum(1).tolist() == [1.0] * 5


def test_new_blocks_can_start_silent():
    small = tiny("llama")
    big = growlib.learn(small, {"num_hidden_layers": 4}, [], "ligo+lossless", steps=0)
    assert growlib.verify(small, big).exact  # no width grows, so that only w has to be right
    plan = growlib.plan(small, {"num_hidden_layers": 4}, "ligo+lossless")
    factors = ligo.Factors(plan, rows_of(small, plan), dict(small.state_dict()))
    zero = {row.grown[0].name.split(".")[-2] for row, w in factors.depth.items() if (w[1] == 0).all()}
    assert zero == {"o_proj", "down_proj"}


def test_the_gradient_in_two_phases_is_that_of_one_graph():
    small = tiny("llama", scale=0.1, tie_word_embeddings=True).double()
    factors, rows = factors_of(small, GROWTHS["llama"])
    large = checkpoint.empty_model(small, factors.plan.config, torch.float64)
    ids = token_ids(small)
    batch = {"input_ids": ids, "labels": ids}
    whole = {name: tensor for row in rows for name, tensor in factors.grow(row).items()}
    functional_call(large, whole, (), batch, tie_weights=True).loss.backward()
    expected = [parameter.grad.clone() for parameter in factors.parameters()]
    for parameter in factors.parameters():
        parameter.grad = None
    with torch.no_grad():
        weights = {name: tensor for row in rows for name, tensor in factors.grow(row).items()}
    _loss_through(large, weights, batch)
    _to_factors(factors, rows, weights)
    for parameter, gradient in zip(factors.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert gradient.abs().max() > 0


def bytes_of_text(length=32, batch=8):
    """Batches of bytes of the standard library, for training and held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    blocks = torch.from_numpy(text[: len(text) // length * length].astype(np.int64)).reshape(-1, length)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    cut = [blocks[i : i + batch] for i in range(0, len(blocks) - batch, batch)]
    batches = [{"input_ids": b, "labels": b} for b in cut]
    return batches[16:], batches[:16]


def held_out_loss(model, batches):
    with torch.no_grad():
        return sum(model(**batch).loss.item() for batch in batches) / len(batches)


@pytest.fixture(scope="module")
def trained():
    """A small byte-level Llama, trained for a few seconds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.06, tie_word_embeddings=True, **sizes))
    optimizer = torch.optim.AdamW(small.parameters(), lr=5e-3)
    train, _ = bytes_of_text()
    for batch in train[:200]:
        optimizer.zero_grad()
        small(**batch).loss.backward()
        optimizer.step()
    return small.eval()


WIDER = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 3, "num_key_value_heads": 3}
WIDER |= {"num_hidden_layers": 3}


def test_what_is_learned_beats_its_start_and_the_small_model(trained):
    train, held_out = bytes_of_text()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    start, learned = (growlib.learn(trained, WIDER, train[200:], steps=steps) for steps in (0, 100))
    losses = [held_out_loss(model, held_out) for model in (trained, start, learned)]
    assert losses[2] < losses[0] - 0.02, losses
    assert losses[2] < losses[1] - 0.1, losses
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    again = growlib.learn(trained, WIDER, train[200:], steps=100)
    assert all(torch.equal(again.state_dict()[n], tensor) for n, tensor in learned.state_dict().items())


@pytest.mark.parametrize("method", ["ligo", "ligo+stack", "ligo+lossless"])
@pytest.mark.parametrize("family", GROWTHS)
def test_every_family_learns_and_reloads(family, method, tmp_path):
    small = tiny(family, scale=0.1)
    ids = token_ids(small)
    batches = [{"input_ids": ids, "labels": ids}]
    start, big = (growlib.learn(small, GROWTHS[family], batches, method, steps=steps) for steps in (0, 8))
    assert held_out_loss(big, batches) < held_out_loss(start, batches)
    assert not big.training
    big.save_pretrained(tmp_path)
    again = type(big).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, big(ids).logits)


def test_half_precision_is_learned_in_float32():
    small = tiny("llama", scale=0.1).bfloat16()
    ids = token_ids(small)
    big = growlib.learn(small, {"hidden_size": 72}, [{"input_ids": ids, "labels": ids}], steps=2)
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    assert big.model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_is_refused():
    small, growth = tiny("llama"), {"hidden_size": 72}
    ids = token_ids(small)
    batch = {"input_ids": ids, "labels": ids}
    for says, call in {
        r"growlib.learn\(small": lambda: growlib.expand(small, growth, "ligo"),
        "nothing to learn": lambda: growlib.learn(small, growth, [batch], "lossless"),
        "no loss": lambda: growlib.learn(small, growth, [{"input_ids": ids}]),
        "none left": lambda: growlib.learn(small, growth, iter([batch]), steps=3),
        "out of range": lambda: growlib.learn(small, growth, [batch], steps=-1),
        "loss is nan": lambda: growlib.learn(small, growth, [batch], steps=9, learning_rate=1e30),
        "dtype": lambda: growlib.learn(small, growth, [batch], dtype="int8"),
        "no method 'logi'": lambda: growlib.learn(small, growth, [batch], "logi"),
    }.items():
        with pytest.raises(GrowError, match=says):
            call()


INFERRED = {
    "Qwen3": ({"num_key_value_heads": 2, "head_dim": 8}, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "Gemma2": ({"num_key_value_heads": 2, "head_dim": 8}, {}),
    "GPTNeoX": ({}, {"num_attention_heads": 6}),
    "Mixtral": ({"num_key_value_heads": 2, "num_local_experts": 2}, {"head_dim": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INFERRED, "T5"])
def test_inferred_families_learn(name):
    more, growth = INFERRED.get(name, ({}, {}))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    growth = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | growth
    options, model_class = {**sizes, "num_attention_heads": 4, **more}, f"{name}ForCausalLM"
    if name == "T5":
        model_class = "T5ForConditionalGeneration"
        options = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        options |= {"decoder_start_token_id": 0, "pad_token_id": 0}
        growth = {"d_model": 48, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 4}
    small = randomise(getattr(T, model_class)(getattr(T, f"{name}Config")(**options)), 0, 0.1).eval()
    ids = token_ids(small)
    batches = [{"input_ids": ids, "labels": ids}]
    start, big = (growlib.learn(small, growth, batches, steps=steps) for steps in (0, 10))
    assert held_out_loss(big, batches) < held_out_loss(start, batches) - 0.05


def test_a_mixture_is_not_learned():
    with pytest.raises(GrowError, match=r"a mixture of experts.*then expand it"):
        growlib.learn(tiny("llama"), {"model_type": "mixtral"}, [])


SEEDED = """
import hashlib, torch, growlib
from tiny import tiny
small = tiny("llama")
big = growlib.learn(small, {"hidden_size": 84, "num_attention_heads": 6, "num_key_value_heads": 3}, [], steps=0, seed=2)
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in big.parameters())).hexdigest())
"""


@pytest.mark.slow
def test_the_seed_decides_the_map_in_every_process():
    """Sets of names have another order in each process."""
    found = set()
    for hash_seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent)}
        run = [sys.executable, "-c", SEEDED]
        found.add(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1
