"""The comparison of methods on a preset of a few steps, and what it refuses."""

import json
from statistics import fmean, stdev

import pytest
import torch
from matplotlib.colors import to_hex
from test_recipe import files_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import base.job
import compare_methods as recipe
import growlib
from base.command import STOPPED
from base.flops import flops_saved, forward_flops, learning_flops
from base.plots import FIXED, style_of
from base.ranking import rank_correlation
from base.reference import against_the_better

FOUR_STEPS = (
    'extends = "miniature"\n[small]\nsteps = 2\n[training]\nsteps = 4\nwarmup_steps = 1\nevaluations = 4\n'
    '[compare]\nlag = 2\nmethods = ["lossless", "stack", "ligo"]\n[reference]\ntrained = true\n'
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
    assert list(results) == ["setting", "methods", "reference", "rank_correlation_with_the_end"]
    assert results["rank_correlation_with_the_end"] == {"start": None, "lag": None}  # of three methods it says nothing
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
            better = against_the_better(both, results["reference"]["runs"][seed])["flops_saved"]["this"]
            assert entry["flops_saved_against_the_better_by_seed"][seed] == better
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
    assert len(list(finished.glob("trainings/small-*"))) == 1


def test_each_method_has_its_own_best_rate(finished):
    results = json.loads((finished / "methods.json").read_text())
    report = (finished / "methods.md").read_text()
    for name, entry in results["methods"].items():
        assert list(entry["sweep"]) == ["0.003", "0.006"]
        best = min(entry["sweep"], key=entry["sweep"].get)
        assert entry["learning_rate"] == float(best)
        assert entry["runs"]["0"]["final_eval_loss"] == entry["sweep"][best]
        assert f"\n| {name} | {best} |" in report
    assert "own best learning rate of 0.003, 0.006: the lowest loss at the end with seed 0" in report
    assert "rate is the best of " in report  # of two rates, each is at the edge


def test_the_reference_gets_what_the_method_with_most_gets(finished):
    results = json.loads((finished / "methods.json").read_text())
    for seed, run in results["reference"]["runs"].items():
        most = max(entry["runs"][seed]["flops"]["student"] for entry in results["methods"].values())
        step = run["curve"][-1]["flops"] / run["curve"][-1]["step"]
        assert most - step < run["flops"]["student"] <= most
    report = (finished / "methods.md").read_text()
    assert "\n| small, trained on | 0.006 |" in report
    assert report.count("against the better") >= 1


def test_one_rate_for_all_and_one_seed(preset, tmp_path, capsys):
    arguments = ["--preset", preset, "--methods", "lossless", "--seeds", "1", "--no-reference", "--out", str(tmp_path)]
    assert recipe.main([*arguments, "--learning-rate", "2e-3"]) == 0
    results = json.loads((tmp_path / "methods.json").read_text())
    assert {entry["learning_rate"] for entry in results["methods"].values()} == {2e-3}
    assert results["reference"] is None
    said = capsys.readouterr().out
    assert "All train at a learning rate of 0.002" in said
    assert "seed 0 alone" in said
    assert "seeds" not in said
    assert "Rank correlation" not in said
    assert "against the better" not in said


def test_the_report_has_every_method(finished):
    report = (finished / "methods.md").read_text()
    for name in ("scratch", "lossless", "lossless+stack", "ligo"):
        assert f"\n| {name} |" in report
    assert "a copied layer acts again" in report
    assert "- ligo: LiGO (arXiv 2303.00980)" in report
    assert (finished / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_kept_and_others_added(finished, preset):
    before = files_of(finished)
    assert recipe.main(["--preset", preset, "--seeds", "3", "--methods", "lossless", "--out", str(finished)]) == 0
    after = files_of(finished)
    changed = {name for name in after if before.get(name) != after[name]}
    assert {name for name in changed if name in before} == {"methods.json", "methods.png", "methods.md"}
    trained = {name.split("/")[1].rpartition("-")[0] for name in changed if name.startswith("trainings")}
    assert trained == {"scratch", "lossless", "reference"}  # with seed 2; the reference for what lossless gets


def test_an_interrupted_run_goes_on(preset, tmp_path, monkeypatch, capsys):
    train, trained = base.job.train, []

    def stop_at_the_third(name, *rest, **named):
        trained.append(name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(name, *rest, **named)

    monkeypatch.setattr(base.job, "train", stop_at_the_third)
    arguments = ["--preset", preset, "--seeds", "1", "--learning-rates", "6e-3", "--out", str(tmp_path / "out")]
    assert recipe.main(arguments) == STOPPED
    assert "same command" in capsys.readouterr().err
    assert recipe.main(arguments) == 0
    assert trained == ["small", "scratch", "lossless", "lossless", "lossless+stack", "ligo", "reference"]
    results = json.loads((tmp_path / "out" / "methods.json").read_text())
    assert results["methods"]["lossless"]["loss"]["end"]["deviation"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "lossles"], "lossles"),
        (["--methods", "scratch"], "no method to compare"),
        (["--learning-rates", "0"], "out of range"),
        (["--learning-rates", "1e-3,x"], "could not convert"),
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
    assert not list(out.glob("trainings/*"))


def test_the_rank_correlation_leaves_scratch_out():
    def entry(start, lag, end):
        return {"loss": {m: {"mean": v} for m, v in (("start", start), ("lag", lag), ("end", end))}}

    rows = {"a": (5, 1, 1), "b": (4, 2, 2), "c": (3, 3, 3), "d": (2, 4, 4), "e": (1, 5, 5)}
    summaries = {"scratch": entry(9, 9, 0), **{name: entry(*losses) for name, losses in rows.items()}}
    assert rank_correlation(summaries, "lag") == pytest.approx(1.0)
    assert rank_correlation(summaries, "start") == pytest.approx(-1.0)
    del summaries["e"]  # of fewer it says nothing
    assert rank_correlation(summaries, "lag") is None


def test_every_name_has_a_colour_of_its_own_that_never_changes():
    names = [*FIXED, *(row.name for row in growlib.methods())]
    colours = {name: to_hex(style_of(name)["color"]) for name in names}
    assert len(set(colours.values())) == len(names)
    # WIDTH+DEPTH: the colour of the width, and a line that it does not share with the width alone.
    assert to_hex(style_of("lemon+stack")["color"]) == colours["lemon"]
    assert len({str(style_of(name).get("linestyle")) for name in ("lemon", "lemon+stack", "lemon+gstack")}) == 3


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
