"""Widths that inference finds on the tiny model: LayerScale, scans, vectors that are added, and large classes."""

from dataclasses import replace

import pytest
import torch
import transformers as T
from tiny import randomise
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import growlib
from growlib import GrowError
from growlib.apply import grow_tensor
from growlib.config import settled
from growlib.growth_plan import TensorPlan
from growlib.inference import smaller, why
from growlib.inference.probe import is_added, trace
from growlib.inference.tiny import LARGEST, tiny_config, tiny_model
from growlib.layouts import parse_layout

IMAGE = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3}
TEXT = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GROWTHS = {  # sizes that the verifier never sees
    "a pooled norm (ImageGPT)": (
        T.ImageGPTForImageClassification,
        {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32},
        {"n_embd": 40},
    ),
    "a bias of its own (GPT-NeoX-Japanese)": (
        T.GPTNeoXJapaneseForCausalLM,
        {**TEXT, **IDS, "hidden_size": 36, "max_position_embeddings": 32},
        {"hidden_size": 60},
    ),
    "LayerScale in modules (DINOv2)": (T.Dinov2ForImageClassification, IMAGE, {"hidden_size": 40}),
    "LayerScale in line (BEiT)": (
        T.BeitForImageClassification,
        {**IMAGE, "intermediate_size": 36},
        {"hidden_size": 40},
    ),
    "a scan of units (Jamba)": (
        T.JambaForCausalLM,
        {
            **TEXT,
            **IDS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 36,
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_dt_rank": 5,
            "mamba_d_state": 6,
        },
        {"hidden_size": 60},
    ),
    "tokens before the batch (Longformer)": (
        T.LongformerForMaskedLM,
        {**TEXT, "attention_window": [8, 8], "intermediate_size": 36, "max_position_embeddings": 40, "pad_token_id": 1},
        {"hidden_size": 72},
    ),
}
QUICK = ("a pooled norm (ImageGPT)",)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in GROWTHS]
)
def test_it_grows_exactly_at_a_width_that_was_never_tried(kind):
    model_class, options, growth = GROWTHS[kind]
    torch.manual_seed(0)
    small = randomise(model_class(model_class.config_class(**options)), 0, 0.2).eval()
    big = growlib.expand(small, growth, exact=True)
    assert growlib.verify(small, big).exact
    assert big.num_parameters() > 1.2 * small.num_parameters()


LARGE = {  # what keeps them large: a field that no list of names holds
    "ctrl": T.CTRLConfig,
    "rwkv": T.RwkvConfig,
    "cpmant": T.CpmAntConfig,
    "recurrent_gemma": T.RecurrentGemmaConfig,
    "luke": T.LukeConfig,
}


@pytest.mark.parametrize("model_type", LARGE)
def test_what_keeps_a_tiny_model_large_is_lessened(model_type):
    config = LARGE[model_type]()
    model_class = growlib.inference.class_of(config)
    small = tiny_config(config, model_class)
    assert smaller.count_of(model_class, small) <= LARGEST


def test_fields_that_save_nothing_stay():
    config = T.CTRLConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=333)
    found = smaller.lessened(T.CTRLLMHeadModel, config, 100_000, ("n_embd", "vocab_size"))
    assert list(found) == ["dff"]
    assert smaller.lessened(T.CTRLLMHeadModel, config, 10**9, ()) == {}


def test_a_vector_that_is_added_is_told_from_one_that_scales():
    config = T.GPTNeoXJapaneseConfig()
    model = tiny_model(T.GPTNeoXJapaneseForCausalLM, tiny_config(config, T.GPTNeoXJapaneseForCausalLM))
    last = model.gpt_neox_japanese.layers[-1].attention
    before = last.dense_bias.clone()
    assert is_added(model, trace(model), last.dense_bias)
    assert torch.equal(last.dense_bias, before)
    config = T.Dinov2Config()
    model = tiny_model(T.Dinov2ForImageClassification, tiny_config(config, T.Dinov2ForImageClassification))
    assert is_added(model, trace(model), model.dinov2.encoder.layer[0].layer_scale1.lambda1) is False


def test_the_mean_of_what_a_layer_scale_scales_is_weighed():
    """Row of a new entry: sum of w_i W_i / n, over what the new weight will be: gain times the mean of w."""
    generator = torch.Generator().manual_seed(0)
    small = randomise(T.GPT2LMHeadModel(T.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11)), 0)
    plan = growlib.plan(small, {"n_embd": 12})
    source = torch.randn(8, 5, generator=generator)
    weights = 1 + torch.rand(8, generator=generator)
    made = TensorPlan("w", "w", parse_layout("hidden <- fixed"), (8, 5), (12, 5), weigher="s", weigher_gain=2.0)
    grown = grow_tensor(made, source, plan, None, weights)
    scale = plan.maps["hidden"].write
    wanted = scale * (weights[:, None] * source).mean(0) / (2 * weights.mean())
    assert torch.allclose(grown[8:], wanted.expand(4, 5), atol=1e-6)
    assert torch.equal(grown[:8], grow_tensor(replace(made, weigher=None), source, plan)[:8])


def test_what_a_config_derives_and_does_not_let_be_set_stays_as_asked():
    """Over all config classes: properties that answer with an error are no fields."""
    for config_class in dict.fromkeys(CONFIG_MAPPING.values()):
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            if isinstance(getattr(config_class, name, None), property):
                assert settled(config_class(), {name: 7})


def test_a_class_without_a_width_says_so(monkeypatch):
    monkeypatch.setattr(why, "_entries", list)
    with pytest.raises(GrowError, match="no config field says how wide its blocks are"):
        growlib.infer(T.PvtConfig())


def fsmt(padding):
    """As many positions as its field says, and one, and the id of its padding."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
    words = {"langs": ["en", "de"], "src_vocab_size": 61, "tgt_vocab_size": 61, "pad_token_id": padding}
    return T.FSMTForConditionalGeneration(T.FSMTConfig(**words, **sizes, **heads))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [{"encoder_ffn_dim": 64}, {"max_position_embeddings": 70}])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_rows_that_no_field_counts_stay(padding, wanted):
    small = randomise(fsmt(padding), 0).eval()
    assert small.model.encoder.embed_positions.weight.shape == (41 + padding, 32)
    assert growlib.verify(small, growlib.expand(small, wanted, exact=True)).exact


@pytest.mark.slow
def test_a_length_that_the_class_rounds_stays():
    """LFM2 has 512 units where its config says 600: two thirds, rounded up to whole 256."""
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 600, "block_multiple_of": 256}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    kinds = ["conv", "full_attention", "conv"]
    config = T.Lfm2Config(**sizes, **heads, num_hidden_layers=3, layer_types=kinds)
    small = randomise(T.Lfm2ForCausalLM(config), 0, 0.2).eval()
    assert small.model.layers[0].feed_forward.w1.weight.shape == (512, 64)
    wider = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 6}
    assert growlib.verify(small, growlib.expand(small, wider, exact=True)).exact


@pytest.mark.slow
def test_a_source_that_its_inferred_table_does_not_explain_is_said_to_be_one():
    small = fsmt(1)
    small.model.encoder.layers[0].fc1 = torch.nn.Linear(32, 50)
    with pytest.raises(GrowError, match=r"has the shape \(50, 32\).*Valid: \(48, 32\), by config and table"):
        growlib.plan(small, {"encoder_ffn_dim": 64})
