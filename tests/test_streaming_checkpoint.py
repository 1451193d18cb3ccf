"""From disk to disk: the same bits as through a model in memory, whole or not at all, in bounded memory."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny import HEADS, tiny

import bench_streaming
import growlib
from growlib import GrowError, streaming
from growlib.checkpoint import conversions, shards
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.conversions import Written, stored_in
from growlib.cli import main
from growlib.inference.tiny import tiny_config, tiny_model

WIDER = {
    "llama": {"hidden_size": 72, "num_hidden_layers": 3, "intermediate_size": 150},
    "gpt2": {"n_embd": 72, "n_head": 6, "n_layer": 3},
    "bert": {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 3},
}
# Names that differ between disk and module, experts that are stacked, ties with several names, buffers, encoders.
TYPES = ("mixtral", "qwen2_moe", "phimoe", "deepseek_v3", "gpt_oss", "gemma2", "t5", "marian", "beit", "roberta",
         "bart", "falcon", "dinov2")  # fmt: skip


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("model_type", TYPES)
def test_names_on_disk_and_in_modules(model_type, tmp_path):
    """What is read is what a loaded model has, what is written is what it saves; no model is in memory."""
    config = T.CONFIG_MAPPING[model_type]()
    model_class = checkpoint.class_of(config)
    model = tiny_model(model_class, tiny_config(config, model_class)).bfloat16()
    model.save_pretrained(tmp_path / "small")
    if model_type == "marian":  # it never stores its table of positions
        with pytest.raises(conversions.Unstreamable, match="the weights lack"):
            stored_in("reading", tmp_path / "small")
        return
    loaded, source = checkpoint.load(tmp_path / "small"), stored_in("reading", tmp_path / "small")
    state, names = loaded.state_dict(), checkpoint.skeleton(loaded).shapes
    assert_same({name: source[name] for name in names}, {name: state[name] for name in names})
    with torch.device("meta"):
        target = Written(checkpoint.empty_model(source.model, loaded.config, loaded.dtype))
    written = {}
    for group in target.groups:
        made = target.stored({n: source[target.source_of(n)].to(target.dtypes[n]) for n in group.names})
        assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
            name: (t.shape, t.dtype) for name, t in group.stored.items()
        }
        written |= made
    assert_same(written, stored(tmp_path / "small"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", WIDER)
def test_the_same_bits_as_through_a_model(family, dtype, tmp_path):
    model = tiny(family)
    if model.can_generate():
        model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "small", max_shard_size="60KB")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    arguments = {"seed": 3, "dtype": dtype}
    plan = growlib.expand_checkpoint(
        tmp_path / "small", tmp_path / "big", WIDER[family], max_shard_size="150KB", **arguments
    )
    grown = growlib.expand(tmp_path / "small", WIDER[family], **arguments)
    grown.save_pretrained(tmp_path / "expected")
    assert len(list((tmp_path / "big").glob("model-*.safetensors"))) > 1
    assert max(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) < 150_000 + 10_000
    assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))
    loaded = HEADS[family].from_pretrained(tmp_path / "big", dtype="auto")
    assert_same(dict(loaded.state_dict()), dict(grown.state_dict()))
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "expected" / name).exists():
            assert (tmp_path / "big" / name).read_text() == (tmp_path / "expected" / name).read_text()
    assert growlib.GrowthPlan.load(tmp_path / "big") == plan
    assert (tmp_path / "big" / "tokenizer.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ({"num_hidden_layers": 4}, "gstack"),
        ({"num_hidden_layers": 4}, "interpolate"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "lossless"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "drop-upcycling"),
    ],
)
def test_methods_that_take_from_several_tensors(target, method, tmp_path):
    tiny("llama", head_dim=None).save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", target, method, exact=False)
    growlib.expand(tmp_path / "small", target, method, exact=False).save_pretrained(tmp_path / "expected")
    assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))


def test_what_cannot_be_streamed_goes_through_a_model(tmp_path, caplog):
    """A tied head that is stored a second time: transformers compares the two when it loads them."""
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", WIDER["llama"])
    assert (
        "goes through a model in memory: model.embed_tokens.weight is tied, and stored under both names" in caplog.text
    )
    growlib.expand(tmp_path / "small", WIDER["llama"]).save_pretrained(tmp_path / "expected")
    assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))


def test_exact_refuses_values_that_are_not_finite(tmp_path):
    model = tiny("llama")
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(GrowError, match=r"model\.norm\.weight holds values that are not finite"):
        growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", WIDER["llama"], exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("size", ["", "5", "2.5MB", "1 GiB", 7, "0GB", "-1", "big", "1.5", None])
def test_sizes_of_a_file(size):
    known = {"5": 5, "2.5MB": 2_500_000, "1 GiB": 1 << 30, 7: 7}
    if size in known:
        assert shards.bytes_in(size) == known[size]
    else:
        with pytest.raises(GrowError, match="it is no size"):
            shards.bytes_in(size)


def test_tensors_of_several_widths_lie_aligned(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float64)}
    (shard,) = shards.shards_of({name: tensor.to("meta") for name, tensor in tensors.items()}, 1000)
    shards.write_shards(tmp_path, [shard], [("a",), ("b", "c")], lambda group: {n: tensors[n] for n in group})
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


# Interruptions


class Killed(KeyboardInterrupt):
    pass


def test_an_interrupted_call_goes_on_at_the_file(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "small")
    request = (tmp_path / "small", tmp_path / "big", WIDER["llama"])
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "expected", WIDER["llama"])
    made, write = [], os.pwrite

    def dies(after):
        left = iter(range(after))

        def pwrite(*arguments):
            if next(left, None) is None:
                raise Killed
            return write(*arguments)

        return pwrite

    grow = streaming.grow_tensor
    monkeypatch.setattr(streaming, "grow_tensor", lambda made_, *rest: made.append(made_.name) or grow(made_, *rest))
    for after in (0, 1, 9, 12):
        with monkeypatch.context() as patch:
            patch.setattr(shards.os, "pwrite", dies(after))
            with pytest.raises(Killed):
                growlib.expand_checkpoint(*request, max_shard_size="60KB")
        assert not (tmp_path / "big").exists()
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(".big-")]) == 1
    made.clear()
    growlib.expand_checkpoint(*request, max_shard_size="60KB")
    assert 0 < len(made) < 20  # of 29: the finished files were kept
    assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "expected", "small"]


@pytest.mark.parametrize("change", ["plan", "source", "dtype", "files"])
def test_another_request_begins_anew(change, tmp_path, monkeypatch):
    small, big, target, options = tmp_path / "small", tmp_path / "big", dict(WIDER["llama"]), {"max_shard_size": "60KB"}
    tiny("llama").save_pretrained(small)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_index", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            growlib.expand_checkpoint(small, big, target, **options)
    if change == "plan":
        target["hidden_size"] = 84
    elif change == "source":
        tiny("llama", seed=5).save_pretrained(small)
    else:
        options |= {"dtype": "bfloat16"} if change == "dtype" else {"max_shard_size": "50KB"}
    growlib.expand_checkpoint(small, big, target, **options)
    expected = growlib.expand(small, target, dtype=options.get("dtype"))
    expected.save_pretrained(tmp_path / "expected")
    assert_same(stored(big), stored(tmp_path / "expected"))


@pytest.mark.slow
def test_twenty_random_kills(tmp_path):
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    tiny("llama", **sizes).save_pretrained(tmp_path / "small")
    target = {"hidden_size": 512, "num_hidden_layers": 12}
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "expected", target, max_shard_size="4MB")
    code = "import sys, json, growlib, growlib.streaming\nprint('ready', flush=True)\n"
    code += "growlib.expand_checkpoint(*sys.argv[1:3], json.loads(sys.argv[3]), max_shard_size='4MB')"
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "big"), json.dumps(target)]
    chance, killed, finished = torch.Generator().manual_seed(0), 0, set()
    while killed < 20:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        child.stdout.readline()
        time.sleep(3 * torch.rand((), generator=chance).item())
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        killed += 1
        if (tmp_path / "big").exists():  # it was faster: whole, then, and the next one begins anew
            assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))
            (tmp_path / "big").rename(tmp_path / f"done{killed}")
        finished |= {path.name for path in tmp_path.glob(".big-*/*.safetensors")}
    assert finished
    subprocess.run(command, check=False) if not (tmp_path / "big").exists() else None
    assert_same(stored(tmp_path / "big"), stored(tmp_path / "expected"))


# Beside the weights


def test_the_card_says_where_the_model_comes_from(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text("---\nlicense: mit\ndatasets: [mine]\n---\n# Small\n")
    growth = ["--set", "hidden_size=72", "--seed", "4"]
    assert main(["expand", str(tmp_path / "small"), str(tmp_path / "big"), *growth]) == 0
    card = (tmp_path / "big" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- growlib\nlicense: mit\n---\n")
    for words in ("grown from `small`", "Method `lossless`, seed 4", "hidden", "48 -> 72", "exact: max |Δ|", "torch "):
        assert words in card
    assert "datasets" not in card
    assert str(tmp_path) not in card


# Verification of what does not fit into memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", WIDER)
def test_layer_by_layer_says_what_whole_models_say(family, dtype, tmp_path):
    tiny(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", WIDER[family])
    whole = growlib.verify(tmp_path / "small", tmp_path / "big")
    assert growlib.verify(tmp_path / "small", tmp_path / "big", streaming=True) == whole


def test_layer_by_layer_no_parameter_stays_in_memory(tmp_path):
    from growlib.checkpoint.mapped import mapped_model

    tiny("llama").save_pretrained(tmp_path / "small")
    model, seen = mapped_model(tmp_path / "small"), []
    assert all(parameter.is_meta for parameter in model.parameters())
    model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append([name for name, parameter in model.named_parameters() if not parameter.is_meta])
    )
    model(torch.zeros(1, 3, dtype=torch.long))
    assert seen == [["lm_head.weight"]]
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(GrowError, match="in memory already"):
        growlib.verify(model, model, streaming=True)


def test_the_closing_check_of_large_models_reads_them_layer_by_layer(tmp_path, capsys, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "small")
    monkeypatch.setattr("growlib.commands.fits_into_memory", lambda needed: False)
    monkeypatch.setattr("growlib.checkpoint.loading.load", None)
    assert main(["expand", str(tmp_path / "small"), str(tmp_path / "big"), "--set", "hidden_size=72", "--exact"]) == 0
    assert "exact: max |Δ|" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "small"), str(tmp_path / "big"), "--streaming"]) == 0


def test_the_benchmark_runs(tmp_path, capsys):
    measured = bench_streaming.main(["--gigabytes", "0.03", "--folder", str(tmp_path / "bench")])
    assert 2 < measured["grown, GB"] / measured["source, GB"] < 4
    assert not (tmp_path / "bench").exists()
    assert json.loads(capsys.readouterr().out)["throughput against cp"] > 0
