"""Growth inside a run on a preset of a few steps, and what the recipe refuses."""

import json
from statistics import fmean, stdev

import pytest

import progressive_growth as recipe
from base.moments import remarks, table
from base.presets import load_preset
from base.report import as_markdown

PRESET = (
    'extends = "miniature"\nmethod = "lossless"\n[text]\nmax_bytes = 150_000\n[training]\nsteps = 8\nwarmup_steps = 1\n'
    "[progressive]\nmoments = [0.5]\nlearning_rates = [6e-3]\n"
)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "eight-steps.toml"
    path.write_text(PRESET)
    return str(path)


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("progressive")
    assert recipe.main(["--preset", preset, "--out", str(folder)]) == 0
    return folder


def read(folder):
    return json.loads((folder / "progressive.json").read_text())


def facts_of(folder):
    return [json.loads(path.read_text()) for path in folder.glob("trainings/*/facts.json")]


@pytest.mark.slow
def test_each_training_costs_what_it_says(finished):
    results = read(finished)
    constant, of_target = results["constant"], results["constant"]["step_flops"]
    assert {run["flops"] for run in constant["runs"].values()} == {8 * of_target}
    assert list(results["ways"]) == ["deeper", "wider"]
    for way in results["ways"].values():
        assert way["growth"] == "exact"
        assert list(way["moments"]) == ["0.5", "1"]
        for moment, cells in way["moments"].items():
            assert list(cells) == (["flops"] if moment == "1" else ["tokens", "flops"])
            for kind, cell in cells.items():
                grows_at = cell["steps"] if moment == "1" else cell["grows_at"]
                assert moment == "1" or grows_at == round(0.5 * cell["steps"])
                cost = grows_at * way["step_flops"] + (cell["steps"] - grows_at) * of_target
                assert {run["flops"] for run in cell["runs"].values()} == {cost}
                assert cell["steps"] == 8 if kind == "tokens" else 0 <= 8 * of_target - cost < of_target
                losses = [run["loss"] for run in cell["runs"].values()]
                assert cell["loss"] == {"mean": fmean(losses), "deviation": stdev(losses)}
                away = [run["loss"] - constant["runs"][seed]["loss"] for seed, run in cell["runs"].items()]
                assert cell["difference"]["mean"] == fmean(away)


@pytest.mark.slow
def test_the_model_grows_inside_the_run(finished):
    grown = [found for found in facts_of(finished) if "growths" in found["decided_by"]]
    assert len(grown) == 2 * 2 * 2  # ways, kinds, seeds
    for found in grown:
        (step,) = found["decided_by"]["growths"]["at"]
        curve, steps = found["result"]["curve"], found["decided_by"]["training"]["steps"]
        assert [point["step"] for point in curve] == [0, int(step), steps]
        assert found["decided_by"]["training"]["schedule"] == "warmup_stable_decay"
        assert found["decided_by"]["training"]["schedule_options"] == {"num_decay_steps": round(steps / 4)}
        assert found["decided_by"]["growths"]["rewarm"]["steps"] == 2
        assert curve[1]["flops"] < curve[2]["flops"] / 2  # steps of the small model cost less
    lasting = [found for found in facts_of(finished) if "growths" not in found["decided_by"]]
    assert len(lasting) == 3 * 2  # constant, and each way that never grows


@pytest.mark.slow
def test_the_report_says_what_the_json_says(finished):
    results, report = read(finished), (finished / "progressive.md").read_text()
    assert as_markdown(table(results)) in report
    assert all(f"- {remark}\n" in report for remark in remarks(results))
    cell = results["ways"]["wider"]["moments"]["0.5"]["tokens"]
    assert "| wider | **0.5** | tokens | 8 | 0." in report
    assert f"**{cell['loss']['mean']:.3f} ± {cell['loss']['deviation']:.3f}**" in report
    assert (finished / "progressive.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_trainings_are_kept(finished, preset):
    before = {path.name for path in finished.glob("trainings/*")}
    assert recipe.main(["--preset", preset, "--seeds", "1", "--rewarm", "0", "--out", str(finished)]) == 0
    results, new = read(finished), {path.name for path in finished.glob("trainings/*")} - before
    assert recipe.main(["--preset", preset, "--out", str(finished)]) == 0  # as other tests expect it
    assert len(new) == 2 * 2  # ways, kinds
    assert results["constant"]["loss"]["deviation"] is None
    said = " ".join(remarks(results))
    assert "seed 0 alone" in said
    assert "follow the schedule" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--moments", "0"], "out of range"),
        (["--moments", "1"], "before the first step or after the last"),
        (["--moments", "0.01"], "before the first step or after the last"),
        (["--steps", "0"], "too small"),
        (["--seeds", "0"], "below 1"),
        (["--rewarm", "-1"], "too small"),
        (["--method", "ligo"], "its map is learned"),
        (["--method", "stack"], "grows depth only"),
        (["--preset", "demo"], "no section progressive"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, preset, tmp_path, capsys):
    out = tmp_path / "out"
    assert recipe.main(["--preset", preset, *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said
    assert not list(out.glob("trainings/*"))


def test_the_preset_fits_the_recipe():
    preset = load_preset("progressive")
    assert preset.progressive is not None
    assert preset.progressive.seeds >= 3
    for start in preset.progressive.starts.values():
        assert start.layers <= preset.target.layers
        assert start.hidden <= preset.target.hidden
