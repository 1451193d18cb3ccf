"""What a user asks for: targets that cannot be, places that do not take a result."""

import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import JSON, tiny

import growlib
from growlib import GrowError, config, limits
from growlib.checkpoint import loading as checkpoint
from growlib.cli import main
from growlib.folders import new_folder

WIDER = {"hidden_size": 96}
BIG = ["--set", "hidden_size=96"]


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
@settings(max_examples=30, deadline=None)
def test_any_target_is_planned_or_refused(target):
    with suppress(GrowError):
        growlib.plan(tiny("llama").config, target)


def test_the_search_for_a_size_that_is_valid_ends(monkeypatch):
    tried = []
    build = config.rebuilt
    monkeypatch.setattr(config, "rebuilt", lambda *arguments: tried.append(1) or build(*arguments))
    with pytest.raises(GrowError, match="not a multiple of the number of attention heads"):
        growlib.plan(tiny("llama"), {"num_attention_heads": 10**6, "num_key_value_heads": 10**6})
    assert len(tried) <= 1 + 4 * config.TRIED


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
    monkeypatch.setattr("growlib.checkpoint.loading.load", None)  # would fail
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
        "growlib.checkpoint.shards.os.pwrite",
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
