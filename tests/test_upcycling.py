"""Experts: a dense model becomes a mixture, a mixture gets more of them, and what is exact says so."""

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomise, tiny

import growlib
from growlib.cli import main
from growlib.errors import GrowError

BASE = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 4}
SUMS_TO_ONE = {"norm_topk_prob": True}
CASES = {
    "mixtral": (T.MistralForCausalLM, {"num_local_experts": 8, "intermediate_size": 64, **WIDER}),
    "qwen2_moe": (
        T.Qwen2ForCausalLM,
        {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, **SUMS_TO_ONE},
    ),
    "qwen3_moe": (T.Qwen3ForCausalLM, {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}),
    "granitemoe": (T.GraniteForCausalLM, {"num_local_experts": 4}),
}
CASES["qwen3_moe"][1].update(SUMS_TO_ONE)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Verdicts of this run only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def dense(model_class=T.LlamaForCausalLM, **fields):
    return randomise(model_class(model_class.config_class(**{**BASE, **SIZES, **fields})), 0).eval()


def mixture(**fields):
    config = T.MixtralConfig(**{**BASE, **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **fields})
    return randomise(T.MixtralForCausalLM(config), 0).eval()


def experts_of(model, layer=0):
    return dict(model.model.layers[layer].mlp.experts.named_parameters())


@pytest.mark.parametrize("model_type", CASES)
def test_a_dense_model_becomes_a_mixture(model_type):
    model_class, fields = CASES[model_type]
    small = dense(model_class, **({"head_dim": 16} if model_type == "qwen3_moe" else {}))
    big = growlib.expand(small, {"model_type": model_type, **fields}, exact=True)
    assert big.config.model_type == model_type
    assert growlib.verify(small, big).max_rel < 1e-5


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 20), st.integers(0, 99))
@settings(max_examples=12)
def test_shards_of_copies_at_any_number(shards, copies, chosen, more, seed):
    small, experts = dense(), 4 * shards * copies
    fields = {"num_local_experts": experts, "num_experts_per_tok": min(shards * chosen, experts)}
    fields["intermediate_size"] = 4 * -(-(48 + more) // (4 * shards))  # grouped matrix products take whole fours
    growth = growlib.plan(small, {"model_type": "mixtral", **fields}, seed=seed)
    assert growth.exact
    assert more or f"{copies * 4} copies of" in str(growth)
    big = growlib.expand(small, {"model_type": "mixtral", **fields}, seed=seed)
    assert growlib.verify(small, big).max_rel < 1e-5


def test_the_shards_of_a_copy_have_one_router_row_and_the_copies_their_own():
    fields = {"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 24}
    big = growlib.expand(dense(), {"model_type": "mixtral", **fields})
    rows = big.model.layers[1].mlp.gate.weight.reshape(4, 2, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.cdist(rows[:, 0], rows[:, 0]).add(torch.eye(4)).min() > 0.01


def test_the_experts_drift_apart():
    big = growlib.expand(dense(), {"model_type": "mixtral", "num_local_experts": 4}).train()
    optimizer = torch.optim.SGD(big.parameters(), lr=0.1)
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        big(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, weight in experts_of(big).items():
        flat = weight.detach().flatten(1)
        assert (torch.cdist(flat, flat) + torch.eye(4)).min() > 1e-6, name


def test_weights_that_do_not_sum_to_one_are_a_reason():
    small = dense(T.Qwen2ForCausalLM)
    fields = {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2}
    fields |= {"moe_intermediate_size": 48, "norm_topk_prob": False}
    growth = growlib.plan(small, fields)
    assert "norm_topk_prob=False" in growth.reasons[0]
    assert growlib.verify(small, growlib.expand(small, fields, exact=False)).max_rel > 0.01
    with pytest.raises(GrowError, match="norm_topk_prob=False"):
        growlib.expand(small, fields, exact=True)


def test_norms_that_the_source_does_not_have_are_a_reason():
    small = dense(T.OlmoForCausalLM)
    growth = growlib.plan(small, {"model_type": "olmoe", "num_experts": 4})
    assert "it has no model.layers.*.input_layernorm.weight" in growth.reasons[0]
    assert growlib.expand(small, {"model_type": "olmoe", "num_experts": 4}, exact=False).config.num_experts == 4


def test_drop_upcycling_starts_half_of_the_units_anew():
    small, fields = dense(), {"model_type": "mixtral", "num_local_experts": 4}
    plain = experts_of(growlib.expand(small, fields))
    growth = growlib.plan(small, fields, "drop-upcycling")
    assert growth.reasons == ("drop-upcycling starts a share of each expert's units anew",)
    mixed = experts_of(growlib.expand(small, fields, "drop-upcycling", exact=False))
    changed = {name: plain[name] != mixed[name] for name in plain}
    gate, up = changed["gate_up_proj"].all(2).chunk(2, dim=1)  # [experts, units]
    down = changed["down_proj"].all(1)
    assert torch.equal(gate, up)
    assert torch.equal(gate, down)
    assert gate.sum(1).tolist() == [24] * 4
    assert len({tuple(row.tolist()) for row in gate}) == 4
    assert torch.equal(changed["down_proj"].any(1), down)
    new = mixed["gate_up_proj"][:, :48][gate]
    assert new.std().item() == pytest.approx(plain["gate_up_proj"][:, :48].std().item(), rel=0.1)


def test_a_mixture_gets_more_experts():
    small = mixture()
    growth = growlib.plan(small, {"num_local_experts": 12, "intermediate_size": 60, "hidden_size": 48, **WIDER})
    assert growth.exact
    assert growth.config.num_experts_per_tok == 6
    big = growlib.expand(small, growth.config)
    assert growlib.verify(small, big).max_rel < 1e-5
    down = experts_of(big)["down_proj"].detach().flatten(1)
    assert (torch.cdist(down, down) + torch.eye(12)).min() > 1e-3  # copies do not stay equal


@pytest.mark.parametrize("fields", [{"num_experts_per_tok": 3}, {"num_local_experts": 8, "num_experts_per_tok": 2}])
def test_other_numbers_of_experts_are_not_exact(fields):
    small = mixture()
    growth = growlib.plan(small, fields)
    assert any("experts of which 2 act" in reason for reason in growth.reasons)
    assert growlib.verify(small, growlib.expand(small, fields, exact=False)).max_rel > 1e-3


@pytest.mark.parametrize(
    ("fields", "method", "message"),
    [
        ({"model_type": "mixtral", "intermediate_size": 8}, "lossless", "2 experts of 8 units hold less.*at least 24"),
        ({"model_type": "mixtral", "hidden_size": 16}, "lossless", "would shrink"),
        ({"model_type": "mixtrall"}, "lossless", "no model type 'mixtrall'"),
        ({"model_type": "mixtral", "experts": 4}, "lossless", "no field 'experts'.*num_local_experts"),
        ({"model_type": "gpt2"}, "lossless", "the target is a gpt2 model"),
        ({"hidden_size": 64}, "drop-upcycling", "the target has no experts to make"),
    ],
)
def test_what_cannot_be_made_is_refused(fields, method, message):
    with pytest.raises(GrowError, match=message):
        growlib.expand(dense(), fields, method)


def test_a_target_without_a_place_for_a_tensor_is_refused():
    with pytest.raises(GrowError, match=r"no place for the source's model.layers.0.post_feedforward_layernorm.weight"):
        growlib.plan(dense(T.Olmo2ForCausalLM), {"model_type": "olmoe"})


def test_a_mixture_is_no_source_of_another():
    with pytest.raises(GrowError, match="mixtral is no dense model"):
        growlib.plan(mixture(), {"model_type": "qwen2_moe"})


def test_from_a_folder_to_a_folder(tmp_path, capsys):
    dense().save_pretrained(tmp_path / "small")
    fields = ["model_type=mixtral", "num_local_experts=4"]
    assert (
        main(["expand", str(tmp_path / "small"), str(tmp_path / "big"), *(w for f in fields for w in ("--set", f))])
        == 0
    )
    assert main(["verify", str(tmp_path / "small"), str(tmp_path / "big")]) == 0
    assert "exact" in capsys.readouterr().out


@pytest.mark.parametrize(("acting", "says"), [(1, True), (2, False)])
def test_a_router_that_cannot_learn_is_named(acting, says):
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": acting}
    plan = growlib.plan(tiny("llama", head_dim=None), mixture)
    assert bool(plan.mixture.notes) == says
    assert ("note: model.layers.*.mlp.gate.weight cannot learn" in str(plan)) == says
    assert plan.exact
