"""The recipes of knowledge, end to end on the miniature preset, and the benchmark on a tiny shape."""

import json

import pytest

import bench_ki
import domain_adaptation
import estimators
import generations
import teacher_factors
from base.domains import split

MINIATURE = 'extends = "miniature"\n[training]\nsteps = 2\nwarmup_steps = 1\nevaluations = 1\n'


@pytest.mark.parametrize(
    ("recipe", "options", "count"),
    [
        (generations, [], 7),
        (domain_adaptation, ["--shares", "1", "8"], 10),
        (teacher_factors, [], 13),
        (estimators, [], 6),
    ],
)
def test_a_recipe_runs_and_a_second_run_uses_its_models(recipe, options, count, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text(MINIATURE)
    out = tmp_path / "out"
    arguments = ["--preset", str(preset), "--out", str(out), *options]
    assert recipe.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert len(results) == count
    if recipe is estimators:
        assert all(0 < angle < 90 for row in results.values() for angle in row["angles"].values())
    else:
        losses = [loss for row in results.values() for loss in (row.values() if isinstance(row, dict) else [row])]
        assert all(4 < loss < 7 for loss in losses)  # log 320 = 5.8 at the start
        assert len(set(losses)) > 0.8 * len(losses)
    assert (out / "report.md").read_text().count("\n| ") == count + 1
    before = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}
    assert recipe.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}


def test_code_and_prose_are_told_apart():
    docstring = "Says what it is, in more than eighty characters, so that it is long enough to be kept as prose."
    code, prose = split(f'"""{docstring}"""\n\nx = 1\n\n\ndef f():\n    """Short."""\n    return "not a docstring"\n')
    assert prose == docstring
    assert "Says" not in code
    assert "Short" not in code
    assert "not a docstring" in code
    assert split("def broken(:") is None


def test_the_benchmark_runs(tmp_path):
    sizes = {"positions": 32, "hidden": 8, "vocab": 64, "top-k": 4, "samples": 4, "repeats": 1, "examples": 20}
    out = tmp_path / "bench.json"
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert bench_ki.main([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert len(report["loss"]) == 6
    assert report["reading"]["positions_per_second"] > 0
