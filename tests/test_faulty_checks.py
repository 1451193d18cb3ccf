"""What growlib answers: the closing check, fields without a function, verdicts on disk."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny import tiny

import growlib
from growlib import GrowError, inference
from growlib.architectures.schema import to_table
from growlib.checkpoint import loading as checkpoint
from growlib.cli import main

WIDER = {"hidden_size": 96}
BIG = ["--set", "hidden_size=96"]


# What the closing check says


def test_exact_promises_the_measurement_too(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG, "--exact"]) == 2
    assert "up_proj.weight holds values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 0
    assert "NOT exact" in capsys.readouterr().out


def test_a_wrong_verdict_is_caught_by_the_measurement(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("growlib.commands.compare", lambda *_, **__: growlib.Verification(1.0, 0.5, 1e-5))
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG, "--exact"]) == 2
    assert "the closing check says: NOT exact" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()


def test_a_check_that_cannot_run_loses_nothing(folder, tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("growlib.commands.compare", fails)
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 3
    assert "written, but the result cannot be checked (RuntimeError: no such kernel)" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "big").config.hidden_size == 96
    assert main(["expand", str(folder), str(tmp_path / "other"), *BIG, "--exact"]) == 2
    assert not (tmp_path / "other").exists()


def test_the_words_of_a_refusal_are_those_of_the_place(folder, tmp_path, capsys):
    inexact = ["--set", "num_hidden_layers=4", "--method", "stack", "--exact"]
    assert main(["expand", str(folder), str(tmp_path / "big"), *inexact]) == 2
    assert "no --exact for the closest growth" in capsys.readouterr().err
    with pytest.raises(GrowError, match="exact=None for the closest growth"):
        growlib.expand(folder, {"num_hidden_layers": 4}, "stack", exact=True)


TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, **TOKENS}
SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
KINDS = {
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **TOKENS)
        ),
        {"d_ff": 64},
    ),
    "whisper": (
        lambda: T.WhisperForConditionalGeneration(
            T.WhisperConfig(**SEQ, max_source_positions=16, max_target_positions=16, num_mel_bins=8)
        ),
        {"encoder_ffn_dim": 64},
    ),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**VISION)), {"intermediate_size": 64}),
    "dinov2": (lambda: T.Dinov2Model(T.Dinov2Config(**VISION)), {"num_hidden_layers": 3}),
    "bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**SEQ)), {"decoder_layers": 2}),
    "bert for tokens": (lambda: tiny("bert", T.BertForTokenClassification), {"hidden_size": 96}),
    "gpt2 without logits": (lambda: tiny("gpt2", T.GPT2Model), {"n_layer": 3}),
    "no return_dict": (lambda: tiny("llama", return_dict=False), {"hidden_size": 96}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_checked_on_inputs_of_its_own(kind, tmp_path, capsys):
    make, growth = KINDS[kind]
    torch.manual_seed(0)
    make().eval().save_pretrained(tmp_path / "small")
    sizes = [word for key, value in growth.items() for word in ("--set", f"{key}={value}")]
    assert main(["expand", str(tmp_path / "small"), str(tmp_path / "big"), *sizes]) == 0
    assert "exact: max" in capsys.readouterr().out
    assert growlib.verify(tmp_path / "small", tmp_path / "big").exact


def test_inputs_that_do_not_fit_are_refused():
    small = tiny("llama")
    with pytest.raises(GrowError, match=r"does not run on the inputs .*keyword arguments of its forward"):
        growlib.verify(small, growlib.expand(small, WIDER), {"pixel_values": torch.ones(1, 3, 8, 8)})


def test_verify_knows_which_is_the_source():
    small = tiny("llama")
    for growth in ({"num_hidden_layers": 4}, {"hidden_size": 96}, {"vocab_size": 70}):
        with pytest.raises(GrowError, match=r"(missing|smaller) in the second.*first the source"):
            growlib.verify(growlib.expand(small, growth), small)


def deep(dtype):
    """Wide at the start, many layers: a half-precision forward pass rounds a large share of the spread away."""
    return tiny("llama", num_hidden_layers=24, scale=0.8).to(dtype)


def test_no_rounding_is_called_exact():
    small = deep(torch.bfloat16)
    measured = growlib.verify(small, growlib.expand(small, {"num_hidden_layers": 48}, "stack", exact=False))
    assert measured.max_rel > 0.05
    assert not measured.exact
    assert measured.verdict == "cannot tell" or measured.max_rel > measured.tolerance
    same = growlib.verify(small, growlib.expand(small, {"intermediate_size": 224}))
    assert same.verdict in ("cannot tell", "exact")
    assert (same.max_rel > 0.03) == ("cannot tell in bfloat16; verify in float32" in str(same))
    wide = deep(torch.float32)
    assert growlib.verify(wide, growlib.expand(wide, {"intermediate_size": 224})).exact


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_result_in_another_dtype_is_judged_by_the_coarser_one(dtypes):
    source, result = (getattr(torch, name) for name in dtypes)
    small = tiny("llama", scale=0.1).to(source)
    measured = growlib.verify(small, growlib.expand(small, WIDER, dtype=result))
    assert measured.exact, str(measured)
    assert measured.tolerance > 1e-5
    assert measured.dtype == "bfloat16"
    assert not growlib.verify(
        small, growlib.expand(small, {"num_hidden_layers": 4}, "stack", exact=False, dtype=result)
    ).exact


# Config fields

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GROUPS = {"num_key_value_heads": 2}
SPARSE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SILENT = {
    "intermediate_size": (lambda: T.Qwen3MoeConfig(**SHAPE, **GROUPS, **SPARSE), "Qwen3MoeForCausalLM", 96),
    "encoder_layers": (lambda: T.BartConfig(**SEQ), "BartForCausalLM", 3),
    "pooler_output_size": (lambda: T.ViTConfig(**VISION), "ViTForImageClassification", 64),
}
ACTING = {
    "sliding_window": (lambda: T.MistralConfig(**SHAPE, **GROUPS, sliding_window=4096), "MistralForCausalLM", 8192),
    "hidden_act": (lambda: T.MistralConfig(**SHAPE, **GROUPS), "MistralForCausalLM", "relu"),
    "rope_parameters": (
        lambda: T.MistralConfig(**SHAPE, **GROUPS),
        "MistralForCausalLM",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
}


def with_field(field, make, name, value):
    config = make()
    config.architectures = [name]
    return growlib.plan(config, {field: value}).reasons


@pytest.mark.parametrize("field", SILENT)
def test_a_field_without_a_function_in_this_model_is_no_reason(field):
    assert with_field(field, *SILENT[field]) == ()


@pytest.mark.parametrize("field", ACTING)
def test_a_field_that_acts_or_may_act_is_a_reason(field):
    (reason,) = with_field(field, *ACTING[field])
    assert f"{field} changes from " in reason
    assert "which changes the function" in reason or "which is not known to be without effect" in reason


@pytest.mark.parametrize("depth", [6, 8])
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_thresholds_follow_the_layers(depth, threshold):
    window = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": threshold}
    small = T.Qwen2ForCausalLM(T.Qwen2Config(**SHAPE, **GROUPS, **window)).eval()
    plan = growlib.plan(small, {"num_hidden_layers": depth})
    assert plan.exact
    sources = plan.layers["num_hidden_layers"].source
    assert plan.config.max_window_layers == sum(layer < threshold for layer in sources)
    assert plan.config.layer_types == [small.config.layer_types[layer] for layer in sources]
    rebuilt = T.Qwen2Config(**{**plan.config.to_dict(), "layer_types": None})
    assert rebuilt.layer_types == plan.config.layer_types


# Verdicts on disk

CLAIMS = {
    "nothing": lambda stored: [],
    "null": lambda stored: None,
    "a number": lambda stored: 7,
    "no table": lambda stored: {"checksum": "x"},
    "a table of another shape": lambda stored: {**stored, "table": {"axes": 3}},
    "rows alone": lambda stored: stored["table"],
}


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """A class whose verdict lies on disk, and a way to read it anew."""
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path / "verdicts"))
    monkeypatch.setattr(inference, "_inferred", {})
    monkeypatch.setattr(inference, "_checked", {})
    inference.infer(T.OlmoConfig())
    (path,) = (tmp_path / "verdicts").iterdir()

    def read_again(content):
        inference._inferred.clear()
        inference._checked.clear()
        path.write_text(content)
        return inference.infer(T.OlmoConfig())

    return path, read_again


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_verdict_that_is_not_what_was_written_is_proven_again(kind, verdicts):
    path, read_again = verdicts
    stored = json.loads(path.read_text())
    table = to_table(inference._inferred.popitem()[1])
    assert to_table(read_again(json.dumps(CLAIMS[kind](stored)))) == table
    assert json.loads(path.read_text()) == stored


def test_a_verdict_that_claims_more_is_proven_again(verdicts):
    path, read_again = verdicts
    stored = json.loads(path.read_text())
    claimed = json.loads(path.read_text())
    for growth in claimed["table"]["proven"]:
        growth[1] = ["exact", ""]
    assert claimed != stored
    assert to_table(read_again(json.dumps(claimed)))["proven"] == stored["table"]["proven"]


def test_a_forged_verdict_makes_no_false_plan(verdicts):
    """Even with a checksum that fits: the growth in question is tried where the verdict is used."""
    path, read_again = verdicts
    forged = json.loads(path.read_text())
    wrong = [growth for growth in forged["table"]["proven"] if growth[1][0] == "inexact"]
    assert wrong
    for growth in wrong:
        growth[1] = ["exact", ""]
    for name, axis in forged["table"]["axes"].items():
        axis["role"] = "linear" if name == "ffn" else axis["role"]  # softens nothing: only what is claimed is wrong
    forged["table"]["axes"]["hidden"]["role"] = "elementwise"
    forged["checksum"] = inference._checksum(forged["table"])
    read_again(json.dumps(forged))
    small = T.OlmoForCausalLM(T.OlmoConfig(**SHAPE))
    for growth in ({"hidden_size": 64}, {"hidden_size": 48}):
        with suppress(GrowError):
            plan = growlib.plan(small, growth)
            assert not plan.exact or growlib.verify(small, growlib.expand(small, plan)).exact


@pytest.mark.slow
def test_no_home_is_no_obstacle():
    code = "import pathlib\ndef home(cls): raise RuntimeError('no home')\npathlib.Path.home = classmethod(home)\n"
    code += "import growlib, transformers as T\ngrowlib.infer(T.OlmoConfig())\nimport growlib.ki\n"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "GROWLIB_CACHE")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
