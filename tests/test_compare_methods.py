"""The comparison of methods on a preset of a few steps, and what it refuses."""

import json
from statistics import fmean, stdev

import pytest
import torch
from test_recipe import files_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import compare_methods as recipe
import growlib
from base.command import STOPPED
from base.flops import flops_saved, forward_flops, learning_flops

FOUR_STEPS = (
    'extends = "miniature"\n[small]\nsteps = 2\n[training]\nsteps = 4\nwarmup_steps = 1\nevaluations = 4\n'
    '[compare]\nlag = 2\nmethods = ["lossless", "stack", "ligo"]\n'
)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "four-steps.toml"
    path.write_text(FOUR_STEPS)
    return str(path)


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    assert recipe.main(["--preset", preset, "--out", str(folder)]) == 0
    return folder


def test_methods_json_is_consistent(finished):
    results = json.loads((finished / "methods.json").read_text())
    assert list(results) == ["setting", "methods", "rank_correlation_with_the_end"]
    entries = results["methods"]
    assert set(entries) == {"scratch", "lossless", "lossless+stack", "ligo"}  # what lacks a width gets that of lossless
    for entry in entries.values():
        assert list(entry["runs"]) == ["0", "1"]
        for moment, step in (("start", 0), ("lag", 2), ("end", 4)):
            found = [p["eval_loss"] for run in entry["runs"].values() for p in run["curve"] if p["step"] == step]
            assert entry["loss"][moment] == {"mean": fmean(found), "deviation": stdev(found)}
        for seed, run in entry["runs"].items():
            both = {"scratch": entries["scratch"]["runs"][seed], "this": run}
            assert entry["flops_saved_by_seed"][seed] == flops_saved(both)["this"]
    lags = [entry["loss"]["lag"]["mean"] for entry in entries.values()]
    assert lags == sorted(lags)
    assert entries["lossless"]["growth"] == "exact"
    assert entries["lossless+stack"]["growth"].startswith("not exact: 1 -> 2 layers")
    # What LiGO spends on its map is spent before the first step of its training.
    starts = {name: entry["runs"]["0"]["curve"][0]["flops"] for name, entry in entries.items()}
    assert [name for name, spent in starts.items() if spent] == ["ligo"]
    end = {name: entry["runs"]["0"]["flops"]["student"] for name, entry in entries.items()}
    assert end["ligo"] - end["lossless"] == starts["ligo"]
    # One small model for all seeds; the exact growth starts at its loss.
    small = results["setting"]["small_model"]["eval_loss"]
    assert entries["lossless"]["loss"]["start"]["mean"] == pytest.approx(small, abs=1e-4)
    assert len(list(finished.glob("small-*"))) == 1


def test_the_report_has_every_method(finished):
    report = (finished / "methods.md").read_text()
    for name in ("scratch", "lossless", "lossless+stack", "ligo"):
        assert f"\n| {name} |" in report
    assert "a copied layer acts again" in report
    assert (finished / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_kept_and_others_added(finished, preset):
    before = files_of(finished)
    assert recipe.main(["--preset", preset, "--seeds", "3", "--methods", "lossless", "--out", str(finished)]) == 0
    after = files_of(finished)
    changed = {name for name in after if before.get(name) != after[name]}
    assert {name for name in changed if name in before} == {"methods.json", "methods.png", "methods.md"}
    assert len([name for name in changed if name.startswith("arms")]) == 2  # scratch and lossless with seed 2


def test_an_interrupted_run_goes_on(preset, tmp_path, monkeypatch, capsys):
    import base.comparison

    train, trained = base.comparison.train, []

    def stop_at_the_third(name, *rest, **named):
        trained.append(name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(name, *rest, **named)

    monkeypatch.setattr(base.comparison, "train", stop_at_the_third)
    arguments = ["--preset", preset, "--seeds", "1", "--out", str(tmp_path / "out")]
    assert recipe.main(arguments) == STOPPED
    assert "same command" in capsys.readouterr().err
    assert recipe.main(arguments) == 0
    assert trained == ["small", "scratch", "weights", "weights", "weights", "weights"]
    results = json.loads((tmp_path / "out" / "methods.json").read_text())
    assert results["methods"]["lossless"]["loss"]["end"]["deviation"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "lossles"], "lossles"),
        (["--methods", "scratch"], "no method to compare"),
        (["--lag", "4"], "not measured there"),
        (["--lag", "99"], "1, 2, 3"),
        (["--seeds", "0"], "below 1"),
        (["--seed", "-1"], "negative"),
        (["--target", "hidden_size=8"], "shrink"),
        (["--text", "no/such/folder"], "no such file or folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, preset, tmp_path, capsys):
    out = tmp_path / "out"
    assert recipe.main(["--preset", preset, *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said
    assert "Valid: " in said
    assert not list(out.glob("arms/*"))


def test_the_rank_correlation_leaves_scratch_out():
    def entry(start, lag, end):
        return {"loss": {m: {"mean": v} for m, v in (("start", start), ("lag", lag), ("end", end))}}

    summaries = {"scratch": entry(9, 9, 9), "a": entry(3, 1, 1), "b": entry(2, 2, 2), "c": entry(1, 3, 3)}
    assert recipe.rank_correlation(summaries, "lag") == pytest.approx(1.0)
    assert recipe.rank_correlation(summaries, "start") == pytest.approx(-1.0)
    assert recipe.rank_correlation({"scratch": entry(9, 9, 9), "a": entry(3, 1, 1)}, "lag") is None


def test_the_flops_of_a_learned_map_against_the_counter():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    small = LlamaForCausalLM._from_config(
        LlamaConfig(hidden_size=16, vocab_size=50, **sizes), attn_implementation="eager"
    )
    target = LlamaConfig(hidden_size=24, vocab_size=50, **{**sizes, "num_hidden_layers": 3})
    ids = torch.zeros(4, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        large = growlib.learn(small, target, [{"input_ids": ids, "labels": ids}], steps=3)
    estimated = learning_flops(small, target, "ligo", forward_flops(large, 8), 3, 4)
    # The source's own tensors need no gradient, so that a little less is spent than is counted.
    assert 0.9 * estimated < counter.get_total_flops() <= estimated
