"""Inference: the spine's tables come out of it, classes that nobody has seen grow, and nothing grows silently wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomise, token_ids
from unknown import LoomConfig, LoomForCausalLM

import architectures
import growlib
from growlib import inference
from growlib.architectures import table_of
from growlib.architectures.schema import Growth, from_table, to_table
from growlib.errors import GrowError
from growlib.inference import infer
from growlib.inference.tiny import tiny_config, tiny_model
from growlib.inference.verifier import verdicts
from growlib.layouts import layout_text

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SPINE = {"llama": T.LlamaForCausalLM, "gpt2": T.GPT2LMHeadModel, "bert": T.BertForPreTraining}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Verdicts of this run only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def loom(**options):
    model = LoomForCausalLM(LoomConfig(**options))
    return randomise(model, 0).eval()


def error(small, big, **inputs):
    with torch.no_grad():
        old, new = small(**inputs).logits, big(**inputs).logits
    return ((new[..., : old.shape[-1]] - old).abs().max() / (old.max() - old.min())).item()


@pytest.mark.parametrize("model_type", SPINE)
def test_the_tables_of_the_spine_come_out(model_type):
    model_class = SPINE[model_type]
    options = {"num_key_value_heads": 8} if model_type == "llama" else {}
    table, found = table_of(model_type), infer(model_class.config_class(**options), model_class)
    rows = {name: layout_text(layout) for name, layout in found.tensors.items()}
    assert rows == {name: layout_text(table.tensors[name]) for name in rows}
    # A switch that the table names is on here: the inference knows one position of it.
    axes = {name: replace(axis, scaled_by="") for name, axis in table.axes.items()}
    assert {name: replace(axis, only_copies=False) for name, axis in found.axes.items()} == axes  # that is a verdict
    assert (found.stacks, found.head_norm, found.follows) == (table.stacks, table.head_norm, table.follows)
    assert dict(found.ties) == dict(table.ties)


def test_a_switch_is_seen_where_it_stands():
    found = infer(T.GPT2Config(scale_attn_weights=False), T.GPT2LMHeadModel)
    assert found.axes["query"].scaled_by == "never"


@pytest.mark.parametrize("model_type", SPINE)
def test_the_tables_of_the_spine_are_verified_too(model_type):
    model_class = SPINE[model_type]
    model = tiny_model(model_class, tiny_config(model_class.config_class(), model_class))
    wrong = {growth for growth, verdict in verdicts(table_of(model_type), model).items() if not verdict.exact}
    fractions = {
        "llama": {"query", "key", "value"},
        "bert": {"hidden", "heads", "query", "key", "value"},
        "gpt2": set(),
    }
    assert wrong <= {Growth(axis, "x1.5") for axis in fractions[model_type]}


def test_a_wrong_table_is_not_proven():
    model_class = T.LlamaForCausalLM
    model = tiny_model(model_class, tiny_config(T.LlamaConfig(), model_class))
    table = table_of("llama")
    axes = {**table.axes, "query": replace(table.axes["query"], role="query")}
    assert verdicts(replace(table, axes=axes), model)["query", "x2"].kind == "inexact"
    axes = {**table.axes, "hidden": replace(table.axes["hidden"], role="elementwise")}
    assert verdicts(replace(table, axes=axes), model)["hidden", "x1.5"].kind == "inexact"


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 60), st.integers(0, 3))
@settings(max_examples=10)
def test_a_class_that_exists_nowhere_grows(strands, thicker, pit, storeys):
    small = loom()
    breadth = 12 * (4 + strands) + (4 + strands) * 2 * thicker
    growth = {"breadth": breadth, "strands": 4 + strands, "pit": 72 + pit, "storeys": 2 + storeys, "lexicon": 60}
    ids = torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(1))
    assert error(small, growlib.expand(small, growth, exact=True), input_ids=ids) < 1e-5


def test_its_fused_layout_is_read_off():
    found = infer(LoomConfig(), LoomForCausalLM)
    assert layout_text(found.tensors["tower.*.warp.weight"]) == (
        "(heads value + heads key + heads query by heads) <- hidden"
    )
    assert layout_text(found.tensors["tower.*.calm_a.tilt"]) == "1 + scale hidden"


def test_an_axis_that_misleads_is_refused():
    small = loom(squash="softmax")
    with pytest.raises(GrowError, match=r"descend.*would change from .* and inference cannot tell how"):
        growlib.expand(small, {"pit": 144}, exact=True)
    ids = torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(1))
    wider = {"breadth": 96, "strands": 8}
    assert error(small, growlib.expand(small, wider, exact=True), input_ids=ids) < 1e-5


CAUSAL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64}
SHAPE = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
WIDER = {"hidden_size": 54, "intermediate_size": 77, "num_attention_heads": 9, "num_key_value_heads": 3}
CASES = {  # sizes that the verifier never sees
    "qwen3": (
        T.Qwen3ForCausalLM,
        {**CAUSAL, **SHAPE, **GQA, "head_dim": 10},
        {**WIDER, "head_dim": 20, "num_hidden_layers": 5},
    ),
    "gemma3, one KV head": (
        T.Gemma3ForCausalLM,
        {**CAUSAL, **SHAPE, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10},
        {**WIDER, "head_dim": 20, "num_hidden_layers": 4},
    ),
    "gemma2": (T.Gemma2ForCausalLM, {**CAUSAL, **SHAPE, **GQA, "head_dim": 8}, {**WIDER, "num_hidden_layers": 4}),
    "gemma3": (
        T.Gemma3ForCausalLM,
        {
            **CAUSAL,
            **SHAPE,
            **GQA,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {**WIDER, "num_hidden_layers": 7, "vocab_size": 70},
    ),
    "olmo": (T.OlmoForCausalLM, {**CAUSAL, **SHAPE, **GQA}, {**WIDER, "num_hidden_layers": 5}),
    "phi": (
        T.PhiForCausalLM,
        {**CAUSAL, **SHAPE, "num_attention_heads": 3},
        {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5},
    ),
    "gpt_neox": (
        T.GPTNeoXForCausalLM,
        {**CAUSAL, **SHAPE, "hidden_size": 48, "num_attention_heads": 3},
        {"hidden_size": 64, "num_attention_heads": 4},
    ),
    "mixtral": (
        T.MixtralForCausalLM,
        {**CAUSAL, **SHAPE, **GQA, "num_local_experts": 3, "num_experts_per_tok": 2},
        {"hidden_size": 72, "intermediate_size": 76, "num_attention_heads": 12, "num_key_value_heads": 4},
    ),
    "olmo2": (  # a norm over all heads at once
        T.Olmo2ForCausalLM,
        {**CAUSAL, **SHAPE, **GQA},
        {"hidden_size": 78, "num_attention_heads": 13, "num_key_value_heads": 13},
    ),
    "helium": (T.HeliumForCausalLM, {**CAUSAL, **SHAPE, **GQA, "head_dim": 6}, WIDER),
    "bloom": (
        T.BloomForCausalLM,
        {"vocab_size": 61, "hidden_size": 24, "n_head": 3, "n_layer": 2},
        {"hidden_size": 72},
    ),
}


@pytest.mark.parametrize("model_type", CASES)
def test_inferred_types_grow_exactly_at_any_size(model_type, tmp_path):
    model_class, options, growth = CASES[model_type]
    torch.manual_seed(0)
    small = randomise(model_class(model_class.config_class(**options)), 0, 0.2).eval()
    big = growlib.expand(small, growth, exact=True)
    ids = token_ids(small)
    assert error(small, big, input_ids=ids) < 1e-5
    big.save_pretrained(tmp_path)  # on disk some classes have other names for their tensors
    assert error(small, model_class.from_pretrained(tmp_path), input_ids=ids) < 1e-5


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "olmo2", "gpt_neox"])
def test_one_eps_serves_norms_of_any_width(model_type):
    """The mean square stays what it was, so that eps weighs what it did."""
    model_class, options, growth = CASES[model_type]
    default = model_class.config_class().to_dict()
    eps = {name: 0.02 for name in ("rms_norm_eps", "layer_norm_eps") if name in default}
    small = randomise(model_class(model_class.config_class(**options, **eps)), 0, 0.2).eval()
    assert eps
    assert growlib.verify(small, growlib.expand(small, growth, exact=True)).exact


@torch.no_grad()
def test_new_layers_have_their_own_place_in_the_cache():
    model_class, options, growth = CASES["gemma3"]
    small = randomise(model_class(model_class.config_class(**options)), 0, 0.2).eval()
    big = growlib.expand(small, growth, exact=True)
    ids = token_ids(small)
    first = big(input_ids=ids[:, :9], use_cache=True)
    second = big(input_ids=ids[:, 9:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)[..., : small.config.vocab_size]
    whole = small(input_ids=ids).logits
    assert (logits - whole).abs().max() / (whole.max() - whole.min()) < 1e-5


def test_an_encoder_decoder_with_tied_embeddings_grows():
    sizes = {
        "d_model": 24,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 30,
        "decoder_ffn_dim": 40,
    }
    config = T.BartConfig(vocab_size=61, encoder_layers=2, decoder_layers=3, max_position_embeddings=32, **sizes)
    small = randomise(T.BartForConditionalGeneration(config), 0).eval()
    growth = {"d_model": 48, "encoder_layers": 3, "decoder_layers": 5, "decoder_ffn_dim": 55}
    big = growlib.expand(small, growth, exact=True)
    inputs = {"input_ids": torch.arange(20, 32)[None], "decoder_input_ids": torch.arange(30, 38)[None]}
    assert error(small, big, **inputs) < 1e-5
    assert big.lm_head.weight is big.model.shared.weight


@torch.no_grad()
def test_what_reads_all_layers_reads_those_that_act():
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    config = T.EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=40, **sizes)
    small = randomise(T.EsmForMaskedLM._from_config(config, attn_implementation="eager"), 0).eval()
    big = growlib.expand(small, {"hidden_size": 48, "num_hidden_layers": 5}, exact=True)
    ids = torch.randint(4, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    old, new = (model.predict_contacts(ids, torch.ones_like(ids)) for model in (small, big))
    assert (new - old).abs().max() < 1e-5


@torch.no_grad()
def test_the_pooled_output_of_torch_attention_grows():
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    small = randomise(T.SiglipVisionModel(T.SiglipVisionConfig(image_size=16, patch_size=8, **sizes)), 0).eval()
    big = growlib.expand(small, {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}, exact=True)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    old, new = small(image).pooler_output, big(image).pooler_output[:, :24]
    assert (new - old).abs().max() / (old.max() - old.min()) < 1e-5


def test_of_a_model_of_several_configs_the_parts_grow():
    text = {**CAUSAL, **SHAPE, **GQA, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = T.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    whole = randomise(T.Gemma3ForConditionalGeneration(config), 0, 0.2).eval()
    assert growlib.plan(whole, {"text_config": {"num_hidden_layers": 5}}).exact  # tests/test_composites.py
    small = whole.model.language_model
    big = growlib.expand(small, {"num_hidden_layers": 5, "intermediate_size": 64}, exact=True)
    assert growlib.verify(small, big).exact


def test_as_many_layers_as_heads_are_not_taken_for_heads():
    options = {**CAUSAL, **SHAPE, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = randomise(T.Qwen3ForCausalLM(T.Qwen3Config(**options, head_dim=8)), 0, 0.2).eval()
    big = growlib.expand(small, {"num_attention_heads": 8, "num_key_value_heads": 4}, exact=True)
    assert growlib.verify(small, big).exact


def test_layers_of_another_kind_keep_their_place():
    """glm4_moe's first layer is dense: new layers are copies of layers with the same tensors."""
    options = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    shape = {**SHAPE, **GQA, "head_dim": 8, "n_group": 1, "topk_group": 1}
    config = T.Glm4MoeConfig(**{**CAUSAL, **shape, **options})
    small = randomise(T.Glm4MoeForCausalLM(config), 0, 0.2).eval()
    plan = growlib.plan(small, {"num_hidden_layers": 6})
    assert plan.layers["num_hidden_layers"].source[:2] == (0, 1)
    big = growlib.expand(small, {"num_hidden_layers": 6}, exact=True)
    assert error(small, big, input_ids=token_ids(small)) < 1e-5


def test_what_is_not_proven_is_said():
    small = randomise(T.BloomForCausalLM(T.BloomConfig(vocab_size=61, hidden_size=24, n_head=3, n_layer=2)), 0)
    plan = growlib.plan(small, {"hidden_size": 36})
    assert not plan.exact
    assert "growth of hidden_size is not proven for bloom: a LayerNorm writes the residual stream" in plan.reasons[0]
    with pytest.raises(GrowError, match="not proven for bloom"):
        growlib.expand(small, {"hidden_size": 36}, exact=True)


def test_what_the_plan_says_itself_is_said_once_and_of_the_sizes_that_were_asked():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    small = T.RobertaForMaskedLM(T.RobertaConfig(vocab_size=61, max_position_embeddings=20, **sizes))
    (reason,) = growlib.plan(small, {"hidden_size": 36, "num_attention_heads": 6}).reasons
    assert reason.startswith("hidden_size 24 -> 36 is not a whole multiple")


def test_a_backbone_goes_on_to_put_out_its_last_layer():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    small = randomise(T.Dinov2Model(T.Dinov2Config(**sizes)), 0, 0.2).eval()
    assert growlib.plan(small, {"num_hidden_layers": 4, "out_features": ["stage4"], "out_indices": [4]}).exact
    reasons = growlib.plan(small, {"out_features": ["stage1"], "out_indices": [1]}).reasons
    assert any(reason.startswith("out_indices changes") for reason in reasons)


def test_a_config_field_that_nobody_understands_is_named():
    small = randomise(T.Qwen3ForCausalLM(T.Qwen3Config(**{**CAUSAL, **SHAPE, **GQA})), 0)
    assert growlib.plan(small, {"rms_norm_eps": 0.1}).reasons == (
        "rms_norm_eps changes from 1e-06 to 0.1, which changes the function",
    )


def test_a_verdict_is_kept_and_a_broken_one_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(inference, "_inferred", {})
    first = infer(T.OlmoConfig())
    (kept,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(inference, "_inferred", {})
    monkeypatch.setattr(inference, "examine", None)  # not called a second time
    assert to_table(infer(T.OlmoConfig())) == to_table(first)
    monkeypatch.undo()
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(inference, "_inferred", {})
    kept.write_text("{")
    assert to_table(infer(T.OlmoConfig())) == to_table(first)
    assert json.loads(kept.read_text())["table"] == json.loads(json.dumps(to_table(first)))


def test_a_table_survives_being_written():
    found = infer(T.Qwen3Config(), T.Qwen3ForCausalLM)
    assert to_table(from_table("qwen3", json.loads(json.dumps(to_table(found))), "")) == to_table(found)


@pytest.mark.slow  # what could make it smaller is searched for
def test_a_class_that_cannot_be_tiny_is_refused():
    with pytest.raises(GrowError, match=r"building a tiny VibeVoiceAsr.* its small model has"):
        infer(T.VibeVoiceAsrConfig())


@pytest.mark.slow
def test_a_class_that_fails_on_the_way_is_refused():
    """T5Gemma runs at small sizes, and raises while its maps are looked at."""
    with pytest.raises(GrowError, match=r"T5GemmaForConditionalGeneration: its tensors cannot be told apart"):
        infer(T.T5GemmaConfig())


def page():
    """The rows of docs/architectures.md: type -> growth -> word."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: dict(zip(lines[0][1:], cells[1:], strict=True)) for cells in lines[1:]}


def test_the_page_holds_the_floor():
    rows = page().values()
    count = {column: sum(row[column] == "●" for row in rows) for column in ("depth", "hidden ×2", "hidden ×1.5")}
    assert count["depth"] >= 100
    assert count["hidden ×2"] >= 80
    assert count["hidden ×1.5"] >= 60


def reproved(name):
    return {
        growth: architectures.mark(verdict)
        for growth, verdict in architectures.verdicts(architectures.proven(name)).items()
    }


@pytest.mark.parametrize("name", sorted(page())[20::40] if PAGE.exists() else [])
def test_a_share_of_the_page_is_proven_again(name):
    assert reproved(name) == page()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(page()) if PAGE.exists() else [])
def test_the_whole_page_is_proven_again(name):
    assert reproved(name) == page()[name]


def test_check_shows_the_table_the_candidates_and_the_verdict(capsys):
    from growlib.cli import main

    assert main(["families", "--check", "gpt_neox"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # cells may be wrapped
    assert "attention.query_key_value.weight (heads " in shown
    assert re.search(r"no rotation, scores.* a tiny model differs.*by halves, .* of it, .* exact", shown)
    assert re.search(r"query x1.5 +.*rotary frequencies match only", shown)
    assert main(["families", "--check", "lama"]) == 2


def test_tiny_leaves_the_models_own_sizes_out():
    """The verdict is one per class and switches: two sizes of it share one tiny config."""
    first, second = T.Qwen3Config(**{**CAUSAL, **SHAPE, **GQA}), T.Qwen3Config(hidden_size=4096)
    sizes = [tiny_config(c, T.Qwen3ForCausalLM).to_dict() for c in (first, second)]
    assert sizes[0]["hidden_size"] == sizes[1]["hidden_size"]
