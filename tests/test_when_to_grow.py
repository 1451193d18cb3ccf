"""The shares of a budget on a preset of a few steps, what the recipe refuses, and the page that it wrote."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from test_recipe import files_of

import base.job
import when_to_grow as recipe
from base.command import STOPPED
from base.presets import load_preset
from base.report import as_markdown
from base.shares import remarks, table

DOCS = Path(__file__).parent.parent / "docs"
FIVE_STEPS = (
    'extends = "miniature"\nmethod = "lossless"\n[text]\nmax_bytes = 150_000\n[training]\nsteps = 5\nwarmup_steps = 1\n'
    "[when]\nshares = [0.25, 1.0]\n"
)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "five-steps.toml"
    path.write_text(FIVE_STEPS)
    return str(path)


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("when")
    assert recipe.main(["--preset", preset, "--out", str(folder)]) == 0
    return folder


def read(folder):
    return json.loads((folder / "when.json").read_text())


def ways(results):
    """Each way to spend the budget, with the FLOPs of its last model's step."""
    yield results["scratch"], results["budget"]["step_flops"]
    for growth in results["growths"].values():
        for cell in growth["shares"].values():
            yield cell, results["budget"]["step_flops"] if cell["steps"]["grown"] else growth["step_flops"]


def test_when_json_follows_the_schema(finished):
    results = read(finished)
    assert list(results) == ["command", "date", "setting", "budget", "scratch", "growths"]
    assert list(results["budget"]) == ["flops", "step_flops", "parameters"]
    (growth,) = results["growths"].values()
    assert list(results["growths"]) == [f"×{results['budget']['parameters'] / growth['parameters']:.1f}"]
    assert growth["start"] == "exact"
    assert growth["best_share"] == "0.25"
    assert list(growth["shares"]) == ["0.25", "1"]
    assert list(growth["shares"]["0.25"]) == ["steps", "small_loss", "loss", "difference", "runs"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    assert results["command"].startswith("python recipes/when_to_grow.py --preset ")


def test_every_way_spends_the_budget_to_within_a_step(finished):
    results = read(finished)
    budget = results["budget"]["flops"]
    assert budget == 5 * results["budget"]["step_flops"]
    for way, step in ways(results):
        assert list(way["runs"]) == ["0", "1"]
        for run in way["runs"].values():
            assert budget - step < run["flops"] <= budget
    for growth in results["growths"].values():
        for share, cell in growth["shares"].items():
            small, grown = cell["steps"]["small"], cell["steps"]["grown"]
            assert 0 <= float(share) * budget - small * growth["step_flops"] < growth["step_flops"]
            spent = small * growth["step_flops"] + grown * results["budget"]["step_flops"]
            assert {run["flops"] for run in cell["runs"].values()} == {spent}


def test_means_and_differences_are_those_of_the_seeds(finished):
    results = read(finished)
    scratch = results["scratch"]["runs"]
    for way, _ in ways(results):
        losses = [run["loss"] for run in way["runs"].values()]
        to_scratch = [run["loss"] - scratch[seed]["loss"] for seed, run in way["runs"].items()]
        assert way["loss"] == {"mean": fmean(losses), "deviation": stdev(losses)}
        assert way["difference"] == {"mean": fmean(to_scratch), "deviation": stdev(to_scratch)}
    for growth in results["growths"].values():
        for cell in growth["shares"].values():
            assert cell["small_loss"]["mean"] == fmean(run["small_loss"] for run in cell["runs"].values())


def test_each_model_has_its_own_best_rate(finished):
    results = read(finished)
    (growth,) = results["growths"].values()
    swept = [(results["scratch"]["learning_rate"], results["scratch"]["sweep"])]
    swept += [(growth["learning_rate"][kind], growth["sweep"][kind]) for kind in ("small", "grown")]
    for rate, tried in swept:
        assert list(tried) == ["0.003", "0.006"]
        assert f"{rate:g}" == min(tried, key=tried.get)
    run = growth["shares"]["0.25"]["runs"]["0"]  # the middle share
    assert run["small_loss"] == min(growth["sweep"]["small"].values())
    assert run["loss"] == min(growth["sweep"]["grown"].values())
    assert results["scratch"]["runs"]["0"]["loss"] == min(results["scratch"]["sweep"].values())


def test_each_grown_model_starts_where_its_small_one_ended(finished):
    facts = {path.parent.name: json.loads(path.read_text()) for path in finished.glob("trainings/*/facts.json")}
    grown = [found for name, found in facts.items() if name.startswith("grown")]
    assert len(grown) == 3  # two rates with seed 0, one with seed 1
    for found in grown:
        small = facts[found["decided_by"]["start"]["grown"]]
        assert small["decided_by"]["seed"] == found["decided_by"]["seed"]
        assert small["decided_by"]["order"] != found["decided_by"]["order"]
        assert found["result"]["curve"][0]["eval_loss"] == pytest.approx(small["losses"]["text"], abs=1e-4)


def test_the_report_says_what_the_json_says(finished):
    results, report = read(finished), (finished / "when.md").read_text()
    assert as_markdown(table(results)) in report
    assert all(f"- {remark}\n" in report for remark in remarks(results))
    (factor,) = results["growths"]
    cell = results["growths"][factor]["shares"]["0.25"]
    loss, difference = (
        f"{value['mean']:{sign}.3f} ± {value['deviation']:.3f}"
        for value, sign in ((cell["loss"], ""), (cell["difference"], "+"))
    )
    assert f"| {factor} | **0.25** | {cell['steps']['small']} | {cell['steps']['grown']} |" in report
    assert f"| **{loss}** | {difference} |" in report
    assert f"| {factor}, never grown | 1 |" in report
    assert (finished / "when.png").read_bytes().startswith(b"\x89PNG")


def test_finished_trainings_are_kept_and_others_added(finished, preset):
    before = files_of(finished)
    arguments = ["--preset", preset, "--seeds", "1", "--shares", "0.25,0.5", "--learning-rates", "6e-3"]
    assert recipe.main([*arguments, "--out", str(finished)]) == 0
    results = read(finished)
    assert recipe.main(["--preset", preset, "--out", str(finished)]) == 0  # as other tests expect it
    after = files_of(finished)
    changed = {name for name in after if before.get(name) != after[name]}
    new = {name.split("/")[1].rpartition("-")[0][:5] for name in changed if name.startswith("trainings")}
    assert new == {"small", "grown"}
    assert {name for name in changed if name in before} == {"when.json", "when.png", "when.md"}
    (growth,) = results["growths"].values()
    assert list(growth["shares"]) == ["0.25", "0.5"]
    assert results["scratch"]["loss"]["deviation"] is None
    said = " ".join(remarks(results))
    assert "seed 0 alone" in said
    assert "All train at a learning rate of 0.006" in said
    assert "NEVER" not in said


def test_an_interrupted_run_goes_on(preset, tmp_path, monkeypatch, capsys):
    train, trained = base.job.train, []

    def stop_at_the_third(name, *rest, **named):
        trained.append(name[:5])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(name, *rest, **named)

    monkeypatch.setattr(base.job, "train", stop_at_the_third)
    arguments = ["--preset", preset, "--seeds", "1", "--shares", "0.25", "--learning-rates", "6e-3"]
    arguments += ["--out", str(tmp_path / "out")]
    assert recipe.main(arguments) == STOPPED
    assert "same command" in capsys.readouterr().err
    assert recipe.main(arguments) == 0
    assert trained == ["scrat", "small", "grown", "grown"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shares", "0"], "out of range"),
        (["--shares", "x"], "could not convert"),
        (["--shares", "0.5,1.5"], "no shares of a budget"),
        (["--shares", "1"], "no shares of a budget"),
        (["--steps", "0"], "below 1"),
        (["--steps", "3", "--shares", "0.9"], "0 after it"),
        (["--shares", "0.001"], "0 steps before"),
        (["--seeds", "0"], "below 1"),
        (["--seed", "-1"], "negative"),
        (["--learning-rates", "0"], "out of range"),
        (["--method", "ligo"], "what its map costs"),
        (["--method", "lossles"], "lossles"),
        (["--model", "mamba"], "no such architecture"),
        (["--text", "no/such/folder"], "no such file or folder"),
        (["--preset", "demo"], "no section when"),
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


def test_two_small_models_of_one_factor_are_refused(tmp_path, capsys):
    path = tmp_path / "same.toml"
    sizes = "{hidden = 16, layers = 1, heads = 2, kv_heads = 2, ffn = 24}"
    path.write_text(f'extends = "miniature"\n[when]\nsmall = [{sizes}, {sizes}]\n')
    assert recipe.main(["--preset", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "two of the growths" in capsys.readouterr().err


def test_the_page_says_what_its_json_says():
    results, page = read(DOCS / "results" / "when"), (DOCS / "results" / "when.md").read_text()
    assert as_markdown(table(results)) in page
    assert all(f"- {remark}\n" in page for remark in remarks(results))
    assert f"Date: {results['date']}." in page
    assert f"`{results['command']}`" in page
    assert results["setting"]["when"]["seeds"] >= 3
    assert len(results["scratch"]["sweep"]) >= 2
    preset = load_preset(results["setting"]["preset"])
    assert preset.when is not None
    for name in ("shares", "seeds", "learning_rates"):
        assert results["setting"]["when"][name] == getattr(preset.when, name)
    # No number of the advice was made up: each loss and each difference is in what the recipe says.
    advice, _, _ = page.partition("\n| growth |")
    said = as_markdown(table(results)) + " ".join(remarks(results))
    assert not [number for number in re.findall(r"\d\.\d{3}", advice) if number not in said]
