"""A plan in hand: made without weights, saved, loaded, carried out on its own source and on no other."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as T
from tiny import tiny

import growlib
from growlib import GrowError, GrowthPlan
from growlib.cli import main

SHAPE = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GROWTHS = {
    "llama": {"hidden_size": 84, "intermediate_size": 113, "num_attention_heads": 6, "num_key_value_heads": 3}
    | {"head_dim": 24, "num_hidden_layers": 3, "vocab_size": 70},
    "gpt2": {"n_embd": 84, "n_head": 6, "n_layer": 4, "n_positions": 40},
    "bert": {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 113},
}
METHODS = ["lossless", "lossless+stack", "bert2bert", "composable", "net2net", "lossless+interpolate"]


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def small_qwen(**options):
    torch.manual_seed(0)
    return T.Qwen3ForCausalLM(T.Qwen3Config(**SHAPE, **TOKENS, num_key_value_heads=2, head_dim=16, **options)).eval()


def sources():
    yield from ((family, tiny(family), growth) for family, growth in GROWTHS.items())
    yield "qwen3", small_qwen(), {"hidden_size": 72, "num_hidden_layers": 3}
    yield "mixture", tiny("llama", head_dim=None), {"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 72}
    whisper = T.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=61, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0, max_source_positions=16, max_target_positions=16, num_mel_bins=8,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    yield "whisper", T.WhisperForConditionalGeneration(whisper).eval(), {"encoder_ffn_dim": 64}


SOURCES = {name: (model, growth) for name, model, growth in sources()}


@pytest.mark.parametrize("name", SOURCES)
def test_a_plan_is_carried_out_as_the_target_is_grown(name):
    small, growth = SOURCES[name]
    plan = growlib.plan(small, growth, seed=3)
    assert same(growlib.expand(small, plan, exact=False), growlib.expand(small, growth, seed=3, exact=False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", GROWTHS)
def test_every_kind_of_map_comes_back_from_disk(family, method, tmp_path):
    small = tiny(family)
    plan = growlib.plan(small, GROWTHS[family], method, seed=1)
    loaded = GrowthPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert json.dumps(loaded.to_dict()) == json.dumps(plan.to_dict())
    assert same(growlib.expand(small, loaded, exact=False), growlib.expand(small, plan, exact=False))


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_model_comes_back_from_disk(name, tmp_path):
    small, growth = SOURCES[name]
    plan = growlib.plan(small, growth, "drop-upcycling" if name == "mixture" else "lossless")
    assert GrowthPlan.load(plan.save(tmp_path)) == plan  # into a folder: growlib.json
    assert (tmp_path / "growlib.json").is_file()
    assert same(growlib.expand(small, GrowthPlan.load(tmp_path), exact=False), growlib.expand(small, plan, exact=False))


def test_plans_that_differ_are_not_equal():
    small = tiny("llama")
    plans = [growlib.plan(small, {"hidden_size": 96}, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0] != growlib.plan(small, {"hidden_size": 72})
    assert plans[0] != "lossless"


@pytest.mark.parametrize("name", SOURCES)
def test_no_weights_are_needed(name, tmp_path):
    small, growth = SOURCES[name]
    wanted = growlib.plan(small, growth)
    config = type(small.config).from_dict({**small.config.to_dict(), "architectures": [type(small).__name__]})
    with torch.device("meta"):
        meta = type(small)(small.config)
    config.save_pretrained(tmp_path)
    for source in (config, meta, tmp_path, str(tmp_path)):
        plan = growlib.plan(source, growth)
        assert (plan.tensors, plan.maps, plan.reasons) == (wanted.tensors, wanted.maps, wanted.reasons)
        assert same(growlib.expand(small, plan, exact=False), growlib.expand(small, wanted, exact=False))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny("llama", hidden_size=60, head_dim=12), "hidden_size is 60, not 48"),
        (lambda: tiny("llama", rms_norm_eps=1e-3), r"rms_norm_eps is 0\.001, not 1e-06"),
        (lambda: tiny("llama", num_hidden_layers=3), "num_hidden_layers is 3, not 2"),
        (lambda: tiny("llama", tie_word_embeddings=True), r"lm_head\.weight is None"),
        (lambda: tiny("llama", T.LlamaModel), "a LlamaModel.*Valid: a LlamaForCausalLM"),
        (lambda: tiny("gpt2"), "a GPT2LMHeadModel"),
    ],
)
def test_a_plan_of_another_source_is_refused(other, words):
    plan = growlib.plan(tiny("llama"), {"hidden_size": 96})
    with pytest.raises(GrowError, match=words):
        growlib.expand(other(), plan)


@pytest.mark.parametrize("beside", [{"method": "lemon"}, {"seed": 4}])
def test_a_plan_says_method_and_seed_by_itself(beside):
    small = tiny("llama")
    plan = growlib.plan(small, {"hidden_size": 96}, "lossless", seed=2)
    with pytest.raises(GrowError, match="beside it"):
        growlib.expand(small, plan, **beside)
    assert same(growlib.expand(small, plan, seed=2), growlib.expand(small, plan))


def test_exact_holds_for_a_plan_too():
    small = tiny("llama")
    plan = growlib.plan(small, {"num_hidden_layers": 4}, "stack")
    with pytest.raises(GrowError, match="acts again"):
        growlib.expand(small, plan, exact=True)


def broken(data):
    """A saved plan, damaged in one place each."""
    yield "[]"
    yield "null"
    yield json.dumps(data)[:-20]
    for key in data:
        yield json.dumps({name: value for name, value in data.items() if name != key})
        if isinstance(data[key], list | dict):
            yield json.dumps({**data, key: 7})
    for key in ("name", "layout", "old_shape"):
        first, *rest = data["tensors"]
        yield json.dumps({**data, "tensors": [{k: v for k, v in first.items() if k != key}, *rest]})
        yield json.dumps({**data, "tensors": [{**first, "surprise": 1}, *rest]})


def test_what_is_no_plan_is_refused(tmp_path):
    path = growlib.plan(tiny("llama"), {"hidden_size": 96}).save(tmp_path / "plan.json")
    texts = list(broken({k: v for k, v in json.loads(path.read_text()).items() if k != "exact"}))
    assert len(texts) > 25
    for text in texts:
        path.write_text(text)
        with pytest.raises(GrowError, match=r"reading the plan .*it holds no plan"):
            GrowthPlan.load(path)
    with pytest.raises(GrowError, match="no such file"):
        GrowthPlan.load(tmp_path / "nowhere.json")


def test_the_training_after_it_reads_the_plan_beside_the_model(tmp_path):
    small = tiny("llama")
    deeper, wider = growlib.plan(small, {"num_hidden_layers": 4}), growlib.plan(small, {"hidden_size": 96})
    big = growlib.expand(small, deeper)
    deeper.save(tmp_path)
    assert growlib.freeze_old(big, tmp_path) == growlib.freeze_old(growlib.expand(small, deeper), deeper)
    assert growlib.EntryRates(tmp_path).plan == deeper
    big, file = growlib.expand(small, wider), wider.save(tmp_path / "wider.json")
    rates = [[group["lr"] for group in growlib.mup_groups(big, plan, 1e-3)] for plan in (wider, file, str(file))]
    assert rates[0] == rates[1] == rates[2]
    assert len(set(rates[0])) == 2


def test_verify_says_what_the_plan_beside_the_model_said(tmp_path):
    small = tiny("llama")
    for method, words in (("llama-pro", "its plan says exact"), ("stack", "its plan says not exact: 2 -> 4 layers")):
        plan = growlib.plan(small, {"num_hidden_layers": 4}, method)
        growlib.expand(small, plan, exact=False).save_pretrained(tmp_path / method)
        assert growlib.verify(small, tmp_path / method).planned is None
        plan.save(tmp_path / method)
        measured = growlib.verify(small, tmp_path / method)
        assert measured.planned == plan.reasons
        assert words in str(measured)


def test_learning_takes_a_plan():
    small, ids = tiny("llama"), torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    plan = growlib.plan(small, {"hidden_size": 72}, "ligo", seed=5)
    by_plan, by_target = (
        growlib.learn(small, plan, batches, steps=1),
        growlib.learn(small, {"hidden_size": 72}, batches, steps=1, seed=5),
    )
    assert same(by_plan, by_target)
    with pytest.raises(GrowError, match=r"growlib\.learn"):
        growlib.expand(small, plan)
    with pytest.raises(GrowError, match="nothing to learn"):
        growlib.learn(small, growlib.plan(small, {"hidden_size": 72}), batches)


def test_the_command_line_saves_and_carries_out_a_plan(tmp_path, capsys):
    small = tmp_path / "small"
    tiny("llama").save_pretrained(small)
    saved = ["--save", str(tmp_path / "plan.json")]
    assert main(["plan", str(small), "--set", "hidden_size=72", "--seed", "3", "--method", "lemon", *saved]) == 0
    assert main(["expand", str(small), str(tmp_path / "big"), "--plan", str(tmp_path / "plan.json")]) == 0
    assert GrowthPlan.load(tmp_path / "big") == GrowthPlan.load(tmp_path / "plan.json")
    assert same(
        T.LlamaForCausalLM.from_pretrained(tmp_path / "big"),
        growlib.expand(small, {"hidden_size": 72}, "lemon", seed=3),
    )
    capsys.readouterr()
    for beside in (["--seed", "4"], ["--method", "stack"], ["--set", "hidden_size=96"], ["--config", str(small)]):
        assert main(["expand", str(small), str(tmp_path / "other"), "--plan", "plan.json", *beside]) == 2
    assert "by itself" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_class_of_ones_own_comes_back_where_transformers_knows_it(tmp_path):
    from unknown import LoomConfig, LoomForCausalLM

    plan = growlib.plan(LoomForCausalLM(LoomConfig()), {"breadth": 72, "strands": 6})
    path = plan.save(tmp_path / "loom.json")
    with pytest.raises(GrowError, match=r"no model type 'loom'; .*AutoConfig\.register"):
        GrowthPlan.load(path)
    T.AutoConfig.register("loom", LoomConfig)
    try:
        assert GrowthPlan.load(path) == plan
    finally:
        T.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("loom")


def test_a_frozen_plan_can_be_replaced_but_not_changed():
    plan = growlib.plan(tiny("llama"), {"hidden_size": 96})
    with pytest.raises(AttributeError):
        plan.seed = 7
    assert replace(plan, seed=7) != plan


def test_a_plan_shares_no_config_with_a_model():
    small = tiny("llama")
    plan = growlib.plan(small, {"hidden_size": 72})
    before = plan.to_dict()
    big = growlib.expand(small, plan)
    small.config.use_cache = big.config.use_cache = False  # as the Trainer does
    assert plan.to_dict() == before
