"""Why a growth is not exact, in words: causes that are found on the tiny model, and those that a data file names."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as T
from tiny import randomise
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import architectures
import growlib
from growlib import GrowError
from growlib.architectures.schema import Growth, Verdict
from growlib.inference import infer, verifier, why
from growlib.inference.verifier import trial
from growlib.layer_fields import follow_layers

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TEXT = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
COLUMNS = {
    "hidden": {"hidden ×2", "hidden ×1.5"},
    "hidden x1.5": {"hidden ×1.5"},
    "ffn": {"FFN"},
    "vocab": {"vocabulary"},
}
WORDS = {"depth", "hidden", "hidden x1.5", "heads", "head_dim", "ffn", "experts", "table"}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("entry", why._entries(), ids=lambda entry: f"{entry['types'][0]} {entry['sizes'][0]}")
def test_a_cause_names_what_exists_and_what_is_not_exact(entry):
    """An entry whose growth has become exact, or that no type needs, must go."""
    assert entry.keys() == {"types", "sizes", "why"}
    assert set(entry["sizes"]) <= WORDS
    assert set(entry["types"]) <= set(CONFIG_MAPPING)
    page = architectures.Page.read(PAGE)
    columns = ["depth", *architectures.GROWTHS]
    wanted = set().union(*(COLUMNS.get(size, {size}) for size in entry["sizes"])) - {"table"}
    assert set(entry["types"]) & (page.marks.keys() | page.refused.keys())
    assert "table" in entry["sizes"] or not set(entry["types"]) & page.refused.keys()
    for name in page.marks.keys() & set(entry["types"]):
        marks = dict(zip(columns, page.marks[name], strict=True))
        assert any(marks[column] in "◐○" for column in wanted), name


FOUND = {
    "a norm behind the embeddings": (T.BloomConfig, Growth("hidden", "x1.5"), "word_embeddings_layernorm"),
    "a norm in the first layer": (T.RwkvConfig, Growth("hidden", "x1.5"), "blocks.0.pre_ln"),
    "a norm behind an activation": (T.EsmConfig, Growth("hidden", "x1.5"), "reads an activation (lm_head.layer_norm)"),
    "computed positions": (T.XGLMConfig, Growth("hidden", "x2"), "embed_positions computes positions from d_model"),
    "a tied head behind a norm without weights": (
        partial(T.OlmoConfig, tie_word_embeddings=True),
        Growth("hidden", "x2"),
        "its head is its embedding",
    ),
    "stretched frequencies": (T.Ministral3Config, Growth("query", "x2"), "YaRN"),
    "what the class refuses": (T.BambaConfig, Growth("hidden", "x2"), "the heads of its scan must fill the width"),
}
if hasattr(T, "MossTranscribeDiarizeConfig"):  # not in the oldest transformers that growlib supports
    found = (T.MossTranscribeDiarizeConfig, Growth("hidden", "x1.5"), "multi_modal_projector.norm")
    FOUND["a norm on a sound's way"] = found
QUICK = ("a norm behind the embeddings", "stretched frequencies")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in FOUND])
def test_the_cause_is_found(kind):
    config, growth, said = FOUND[kind]
    verdict = infer(config(**({"vocab_size": 33} if config is T.EsmConfig else {}))).proven[growth]
    assert not verdict.exact
    assert said in verdict.why


def test_a_plan_that_says_why_is_not_overruled():
    table, known = infer(T.BloomConfig()), Verdict("inexact", "the plan says why")
    assert why.told(known, Growth("heads", "x2"), {"n_head": 8}, table, None) == known


def test_what_a_class_raises_is_said_with_the_sizes_that_it_does_not_take():
    config = T.LlamaConfig(hidden_size=64)
    told = why.of_class(RuntimeError("a line\nThe size of tensor a (8) must match"), {"hidden_size": 128}, config)
    assert told.startswith("its class does not take hidden_size 64 -> 128 with its other sizes as they are")
    assert told.endswith("The size of tensor a (8) must match")


def small_bloom():
    torch.manual_seed(0)
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4)).eval()


def test_a_fault_behind_the_building_of_the_class_is_not_called_the_classs(monkeypatch):
    def broken(request):
        raise ValueError("a fault of the plan")

    table = infer(T.BloomConfig())
    assert trial(table, small_bloom(), {"hidden_size": 48}).verdict.exact
    monkeypatch.setattr(verifier, "make_plan", broken)
    verdict = trial(table, small_bloom(), {"hidden_size": 48}).verdict
    assert verdict == Verdict("refused", "it cannot be grown: a fault of the plan")


def test_tensors_of_one_name_that_differ_in_their_dimensions_are_said_to():
    table = infer(T.BloomConfig())
    row = "h.*.mlp.dense_h_to_4h.weight"
    other = replace(table, tensors={**table.tensors, row: table.tensors[row][:1]})
    verdict = trial(other, small_bloom(), {"hidden_size": 48}).verdict
    assert verdict.kind == "refused"
    assert "mlp.dense_h_to_4h.weight has 2 dimensions and its row 1" in verdict.why


@pytest.mark.parametrize(
    ("counted", "follow"),
    [("encoder_layers", {"window", "encoder_kinds"}), ("decoder_layers", {"decoder_kinds"}), ("n_layer", None)],
)
def test_a_list_follows_the_layers_of_its_own_half(counted, follow):
    both = {"encoder_layers": 2, "decoder_layers": 2} if follow else {"n_layer": 2}
    fields = {**both, "window": [1, 2], "encoder_kinds": ["a", "b"], "decoder_kinds": ["a", "b"]}
    follow_layers(fields, counted, 2, [0, 0, 1, 1])
    longer = {name for name, value in fields.items() if isinstance(value, list) and len(value) == 4}
    assert longer == (follow or {"window", "encoder_kinds", "decoder_kinds"})


EXACT = {  # what one forward pass or one shape does not tell
    "a norm behind the rotation": (
        T.HunYuanDenseV1ForCausalLM,
        {**TEXT, **IDS, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 36},
        {"head_dim": 12},
    ),
    "a norm over one part of a fused map": (
        T.Qwen3NextForCausalLM,
        {
            **TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 36,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 10,
            "linear_value_head_dim": 10,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
        },
        {"head_dim": 16},
    ),
    "experts whose weights are each their own": (
        T.Dots1ForCausalLM,
        {
            **TEXT,
            "num_key_value_heads": 2,
            "intermediate_size": 36,
            "moe_intermediate_size": 20,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        {"n_routed_experts": 8, "num_experts_per_tok": 4},
    ),
    "experts that see no token, of numbered maps": (
        T.NllbMoeForConditionalGeneration,
        {"vocab_size": 61, "d_model": 24, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "encoder_layers": 4}
        | {"decoder_layers": 4, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "num_experts": 8}
        | {"max_position_embeddings": 64}
        | {"decoder_start_token_id": 2, **IDS},
        {"encoder_ffn_dim": 60, "decoder_ffn_dim": 60},
    ),
    "a map whose product is multiplied by a power of the width": (
        T.Gemma4ForCausalLM,
        {**TEXT, **IDS, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "intermediate_size": 36}
        | {"hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 64},
        {"hidden_size": 36},
    ),
    "stacked experts in modules of their own": (
        T.JetMoeForCausalLM,
        {**TEXT, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 36, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
        {"hidden_size": 36, "intermediate_size": 60},
    ),
    "embeddings side by side": (
        T.RoCBertForMaskedLM,
        {**TEXT, "pad_token_id": 0, "intermediate_size": 36, "pronunciation_vocab_size": 7, "shape_vocab_size": 9}
        | {"pronunciation_embed_dim": 10, "shape_embed_dim": 14, "max_position_embeddings": 64},
        {"hidden_size": 48},
    ),
    "a convolution of each head": (
        T.NystromformerForMaskedLM,
        {**TEXT, "intermediate_size": 36, "num_landmarks": 7, "segment_means_seq_len": 7, "conv_kernel_size": 5}
        | {"max_position_embeddings": 64},
        {"hidden_size": 48, "num_attention_heads": 8},
    ),
    "a list of one half of an encoder and a decoder": (
        T.LEDForConditionalGeneration,
        {"vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 36}
        | {"decoder_ffn_dim": 36, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_window": 4}
        | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, **IDS}
        | {"decoder_start_token_id": 2},
        {"decoder_layers": 3, "d_model": 48, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    ),
    "experts that see no token": (
        T.SwitchTransformersForConditionalGeneration,
        {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 36, "num_heads": 3, "num_layers": 2, "num_experts": 4}
        | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
        | {"decoder_start_token_id": 0, **IDS},
        {"d_ff": 60},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_it_grows_exactly(kind):
    model_class, options, growth = EXACT[kind]
    torch.manual_seed(0)
    small = randomise(model_class(model_class.config_class(**options)), 0, 0.2).eval()
    big = growlib.expand(small, growth, exact=True)
    assert growlib.verify(small, big).exact
    assert big.num_parameters() > small.num_parameters()


def test_the_page_is_read_as_it_is_written(tmp_path):
    assert "\n".join(architectures.Page.read(PAGE).lines()) + "\n" == PAGE.read_text()


def test_only_the_named_types_of_the_page_change(tmp_path, monkeypatch):
    def refused(name):
        raise GrowError(f"inferring {name}", "it is refused today", "a table")

    monkeypatch.setattr(architectures, "proven", refused)
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    architectures.main(page, ["bloom"])
    before, after = architectures.Page.read(PAGE), architectures.Page.read(page)
    assert before.marks.pop("bloom")
    assert before.reasons.pop("bloom")
    assert after.refused.pop("bloom") == "it is refused today"
    assert after == before
