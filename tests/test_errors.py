"""A request that makes no sense is refused in words, before anything runs, and nothing is left behind."""

import json
import pickle

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny import tiny

import growlib
from growlib import GrowError
from growlib.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("llama").save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [
        ("llama", {"hidden_size": 40}, r"hidden_size 48 -> 40.*at least the source"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers 2 -> 1"),
        ("llama", {"vocab_size": 60, "intermediate_size": 3}, "vocab_size 61 -> 60, intermediate_size 112 -> 3"),
        ("llama", {"hiden_size": 96}, "no field 'hiden_size'.*hidden_size"),
        ("llama", {"hidden_size": 100, "num_attention_heads": 6}, "Valid: hidden_size=102, or num_attention_heads=10"),
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "Valid: num_key_value_heads=3 or num_attention_heads=8",
        ),
        ("llama", {"head_dim": 13}, "Valid: (head_dim=14|sizes that divide)"),  # the second before transformers 5.23
        ("llama", {"hidden_size": "wide"}, "expected int"),
        ("llama", {"hidden_size": 0}, "hidden_size"),
        ("llama", T.GPT2Config(), "the target is a gpt2 model.*a llama config"),
        ("gpt2", {"n_embd": 50}, "n_embd=50 does not divide.*multiple of the head_dim 12"),
        ("bert", {"hidden_size": 96, "num_attention_heads": 5}, "hidden_size / num_attention_heads"),
    ],
)
def test_impossible_targets(family, target, words):
    with pytest.raises(GrowError, match=words):
        growlib.plan(tiny(family), target)


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [
        ("bert", {"hidden_size": 72}, "48 and 96 are exact"),
        ("bert", {"num_hidden_layers": 3, "layer_norm_eps": 0.1}, r"layer_norm_eps=0\.1: a new post-norm block"),
        ("llama", {"head_dim": 18}, "rotary frequencies"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 50}, None),
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}, None),
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps changes from 1e-06 to 0.001"),
        ("llama", {"hidden_act": "relu"}, "hidden_act changes"),
    ],
)
def test_inexact_growth_says_why_before_it_runs(family, target, words, caplog):
    small = tiny(family)
    plan = growlib.plan(small, target)
    assert plan.exact == (words is None)
    if words is None:
        assert growlib.verify(small, growlib.expand(small, target, exact=True)).exact
        return
    with pytest.raises(GrowError, match=words):
        growlib.expand(small, target, exact=True)
    with caplog.at_level("WARNING", logger="growlib"):
        big = growlib.expand(small, target)
        assert len(caplog.records) == 1
        assert plan.reasons[0] in caplog.text
        growlib.expand(small, target, exact=False)
        assert len(caplog.records) == 1
    assert type(big) is type(small)
    assert not growlib.verify(small, big).exact


def test_lost_query_heads_are_named():
    small = tiny("llama", num_attention_heads=6, num_key_value_heads=2)
    plan = growlib.plan(small, {"num_key_value_heads": 3})
    assert not plan.exact
    assert "need at least 4 KV heads" in plan.reasons[0]


def test_scores_divided_by_the_layer_index():
    assert not growlib.plan(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), {"n_layer": 3}).exact


def test_rotary_scaling_that_depends_on_head_dim():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    small = tiny("llama", rope_parameters=rope)
    assert "depends on head_dim" in growlib.plan(small, {"head_dim": 24}).reasons[0]
    assert growlib.plan(small, {"hidden_size": 72}).exact


def test_an_untied_source_has_no_tied_target():
    with pytest.raises(GrowError, match=r"no place for the source's lm_head\.weight"):
        growlib.plan(tiny("llama"), {"tie_word_embeddings": True})


def test_a_bias_cannot_be_dropped():
    with pytest.raises(GrowError, match=r"no place for .*q_proj\.bias"):
        growlib.plan(tiny("llama", attention_bias=True), {"attention_bias": False})


def test_a_tensor_that_no_table_knows():
    model = tiny("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(3, 3)
    with pytest.raises(GrowError, match=r"no place for .*extra"):
        growlib.plan(model, {"hidden_size": 96})
    with pytest.raises(GrowError, match=r"does not know the tensors .*crossattention"):
        growlib.plan(tiny("gpt2", add_cross_attention=True), {"n_embd": 96})


def test_a_model_type_that_cannot_be_inferred():
    seen = {
        "hidden_size": 8,
        "intermediate_size": 9,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    model = T.CLIPForImageClassification(T.CLIPConfig(vision_config=seen))
    with pytest.raises(GrowError, match=r"building a tiny CLIPForImageClassification"):
        growlib.plan(model, {"vision_config": {"num_hidden_layers": 2}})


@pytest.mark.parametrize("method", ["stak", "lossless+lossless+stack", "stack+lossless", ""])
def test_unknown_methods(method):
    with pytest.raises(GrowError, match="lossless"):
        growlib.plan(tiny("llama"), {"num_hidden_layers": 3}, method)


def test_stack_grows_depth_only():
    with pytest.raises(GrowError, match=r"lossless\+stack"):
        growlib.plan(tiny("llama"), {"hidden_size": 96}, "stack")


def damage(path, kind):
    weights = path / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:20000])
    elif kind == "garbage":
        weights.write_bytes(b"hello")
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "pickled":
        weights.rename(path / "pytorch_model.bin")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (path / "config.json").unlink()
    elif kind == "broken config":
        (path / "config.json").write_text("{")
    elif kind == "unknown class":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForFun"]}))
    elif kind in ("missing tensor", "wrong shape"):
        tensors = load_file(weights)
        norm = tensors.pop("model.norm.weight")
        save_file(tensors if kind == "missing tensor" else {**tensors, "model.norm.weight": norm[:9]}, weights)
    elif kind == "missing shard":
        weights.unlink()
        tiny("llama").save_pretrained(path, max_shard_size="50kB")
        (path / "model-00002-of-00005.safetensors").unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "safetensors"),
        ("garbage", "safetensors"),
        ("empty", "safetensors"),
        ("pickled", r"pickled \(pytorch_model\.bin\).*safetensors"),
        ("no weights", "no weights"),
        ("no config", r"no config\.json"),
        ("broken config", "not a valid JSON"),
        ("unknown class", "LlamaForFun"),
        ("missing tensor", r"lack model\.norm\.weight"),
        ("wrong shape", r"do not fit the config in model\.norm\.weight"),
        ("missing shard", "model-00002-of-00005"),
    ],
)
def test_damaged_checkpoints(kind, words, tmp_path, folder, capsys):
    path = tmp_path / "source"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    damage(path, kind)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(GrowError, match=words):
        growlib.expand(path, {"hidden_size": 96})
    assert main(["expand", str(path), str(tmp_path / "big"), "--set", "hidden_size=96"]) == 2
    assert "growlib: reading the checkpoint" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("source", ["/nowhere/at/all", 7, None])
def test_sources_that_are_none(source):
    with pytest.raises(GrowError, match="a folder"):
        growlib.plan(source, {"hidden_size": 96})


def test_verify_refuses_models_that_do_not_compare():
    with pytest.raises(GrowError, match="one class"):
        growlib.verify(tiny("llama"), tiny("bert"))
    with pytest.raises(GrowError, match="at least as large"):
        growlib.verify(tiny("llama", vocab_size=70), tiny("llama"))


def test_verify_sees_a_nan():
    small = tiny("llama")
    big = growlib.expand(small, {"hidden_size": 96})
    with torch.no_grad():
        big.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    assert not growlib.verify(small, big).exact


@pytest.mark.parametrize("target", [7, None, [("hidden_size", 96)]])
def test_targets_that_are_none(target):
    with pytest.raises(GrowError, match="a config, a folder, or a dict"):
        growlib.plan(tiny("llama"), target)


@pytest.mark.parametrize("dtype", ["wide", "int8", torch.int64, 16])
def test_dtypes_that_are_none(dtype):
    with pytest.raises(GrowError, match="no floating-point dtype"):
        growlib.expand(tiny("llama"), {"hidden_size": 96}, dtype=dtype)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(GrowError("asked", "wrong", "valid")))
    assert str(error) == "asked: wrong. Valid: valid."
    assert (error.asked, error.wrong, error.valid) == ("asked", "wrong", "valid")
