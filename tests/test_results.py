"""The tables of docs/results say what the JSON beside them says."""

import json
import re
from pathlib import Path

import pytest

from base import horizons, moments, ranking, shares, study
from base.report import as_markdown

DOCS = Path(__file__).parent.parent / "docs"
# What recipes write as a table, which their pages show as it is: the file, and the table of its content.
TABLES = {
    "when/when.json": shares.table,
    "methods/methods.json": ranking.table,
    "defaults/gpt2.json": ranking.table,
    "defaults/x1.5.json": ranking.table,
    "defaults/little.json": ranking.table,
    "bert/bert.json": ranking.table,
    "bert/kept.json": ranking.table,
    "bert/roberta.json": ranking.table,
    "progressive/progressive.json": moments.table,
    "after/after.json": lambda content: study.table(content["results"]),
    "after/after-4e-3.json": lambda content: study.table(content["results"]),
    "lifelong/lifelong.json": lambda content: study.table(content["results"]),
    "lifelong/rates.json": lambda content: study.table(content["results"]),
    "tokens/tokens.json": horizons.table,
    "tokens/tokens-8e-3.json": horizons.table,
    "knowledge/student-factors.json": lambda content: study.table(content["results"]),
    "both/both.json": lambda content: study.table(content["results"]),
    "downstream/downstream.json": lambda content: study.table(content["results"]),
}


@pytest.mark.parametrize("file", TABLES)
def test_a_page_shows_the_table_of_its_file(file):
    content = json.loads((DOCS / "results" / file).read_text())
    page = (DOCS / "results" / file).parent.with_suffix(".md").read_text()
    assert as_markdown(TABLES[file](content)) in page


def test_the_differences_of_starts_are_those_of_the_runs():
    """docs/results/defaults.md: each cell is the difference of two runs in its JSON."""
    known = ("steps", "arm", "model", "variant", "lr", "seed", "start", "final", "curve")
    losses = {}
    for run in json.loads((DOCS / "results/defaults/defaults.json").read_text()):
        if (run["steps"], run["arm"], run["lr"]) == (320, "weights", 6e-3):
            more = {key: value for key, value in run.items() if key not in known}
            start = f"`{run['variant']}{' ' + json.dumps(more, sort_keys=True) if more else ''}`"
            losses[run["model"], start, run["seed"]] = run["final"]
    page = (DOCS / "results/defaults.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 20
    for _, model, this, against, *cells in rows:
        for seed, cell in enumerate(cell for cell in cells if cell.strip(" |")):
            difference = losses[model, this, seed] - losses[model, against, seed]
            assert float(cell) == pytest.approx(difference, abs=6e-4), (this, against, seed)


def test_heads_in_a_long_training_are_those_of_the_runs():
    section = (DOCS / "results/defaults.md").read_text().split("## Heads, in a long")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.endswith(" |") and "." in line]
    runs = json.loads((DOCS / "results/defaults/heads.json").read_text())
    assert len(rows) == len(runs) == 5
    for (start, rate, *losses), run in zip(rows, runs, strict=True):
        assert (start, float(rate)) == (run["start"], run["learning_rate"])
        at = {point["step"]: point["eval_loss"] for point in run["curve"]}
        assert [float(loss) for loss in losses] == pytest.approx([at[s] for s in (600, 1200, 1800, 2400)], abs=6e-4)


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_the_rates_are_those_of_the_runs(model):
    found = json.loads((DOCS / "results/defaults/rates.json").read_text())["runs"][model]
    section = (DOCS / "results/defaults.md").read_text().split(f"--model {model}`")[-1]
    for name, row in {"small": "small model", "scratch": "scratch", "weights": "weights"}.items():
        cells = re.search(rf"^\| {row} \| (.*) \|$", section, re.MULTILINE)[1]
        losses = [run["loss"] for run in found if run["name"] == name and run["learning_rate"] != 6e-3]
        assert [float(cell.strip("*")) for cell in cells.split(" | ")] == pytest.approx(losses, abs=6e-4)


@pytest.mark.parametrize(
    ("page", "heading", "runs"),
    [
        ("gpu", "A better teacher", ["teacher-0", "teacher-1", "teacher-2"]),
        ("demo", "Enough text", ["seed-0", "seed-1", "seed-2"]),
        ("demo", "A better teacher", ["teacher-0", "teacher-1", "teacher-2"]),
        ("demo", "A better teacher, wider", ["teacher-wide-0", "teacher-wide-1", "teacher-wide-2"]),
        ("demo", "Three times", ["long-0", "long-1", "long-2"]),
    ],
)
def test_a_page_says_what_its_runs_say(page, heading, runs):
    """Losses are those of the JSON, their mean first where there are several runs."""
    section = (DOCS / f"results/{page}.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in section.splitlines() if line[:2] == "| "
    }
    found = [json.loads((DOCS / f"results/{page}/{run}.json").read_text()) for run in runs]
    arms = [run["arms"] | ({"small, trained on": run["reference"]} if run["reference"] else {}) for run in found]
    assert arms[0].keys() <= rows.keys()
    for name in set.intersection(*map(set, arms)):
        losses = [arm[name]["final_eval_loss"] for arm in arms]
        expected = [sum(losses) / len(losses), *losses] if len(losses) > 1 else losses
        assert [float(cell.strip(" |")) for cell in rows[name][: len(expected)]] == pytest.approx(expected, abs=6e-4), (
            name
        )


@pytest.mark.parametrize(("file", "part"), [("bench-300m", "loss"), ("bench-8b-head", "loss"), ("bench-300m", "step")])
def test_the_benchmarks_on_a_gpu_are_those_of_the_runs(file, part):
    page = (DOCS / "results/gpu.md").read_text()
    rows = json.loads((DOCS / f"results/gpu/{file}.json").read_text())[part]
    shown = [
        f"| {form} | {1e3 * row['seconds']:.1f} | {row['ratio']:.3f} | {row['peak_bytes'] / 2**20:.0f} |"
        for form, row in rows.items()
    ]
    assert "\n".join(shown) in page


def test_the_other_long_trainings_are_those_of_the_runs():
    section = (DOCS / "results/demo.md").read_text().split("## Three times the length")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ")[1:5] for line in section.splitlines() if ", seed " in line and "|" in line]
    runs = [
        json.loads((DOCS / f"results/demo/long-{name}.json").read_text()) for name in ("1920-0", "1920-1", "narrow-0")
    ]
    for row, run in zip(rows, runs, strict=True):
        arms = [run["arms"]["scratch"], run["arms"]["weights"], run["reference"]]
        losses = [run["setting"]["small_model"]["eval_loss"], *(arm["final_eval_loss"] for arm in arms)]
        assert [float(cell) for cell in row] == pytest.approx(losses, abs=6e-4)


def test_the_schedules_are_those_of_the_runs():
    section = (DOCS / "results/demo.md").read_text().split("### How long it teaches")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ")[1:] for line in section.splitlines() if line.endswith("% |")]
    runs = [run["both"] for run in json.loads((DOCS / "results/demo/schedules.json").read_text())]
    shares = [run["flops"]["teacher"] / run["flops"]["student"] for run in runs]
    expected = [[f"{run['final_eval_loss']:.3f}", f"{share:.0%}"] for run, share in zip(runs, shares, strict=True)]
    assert rows == expected


def test_the_rates_of_bert_are_those_of_the_runs():
    found = json.loads((DOCS / "results/bert/rates.json").read_text())
    small, curves = found["small, loss at the end"], found["lossless, (step, loss)"]
    back = [next(step for step, loss in curve if step and loss <= small["0.003"]) for curve in curves.values()]
    rows = {
        "small model, 4,000 steps": [f"{loss:.3f}" for loss in small.values()],
        "lossless, 1,000 steps": [f"{curve[-1][1]:.3f}" for curve in curves.values()],
        "lossless, back after": [str(step) for step in back],
    }
    page = (DOCS / "results/bert.md").read_text()
    for name, cells in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert line.replace("**", "").strip(" |").split(" | ")[1:] == cells
