"""A stream of domains on a preset of a few steps: its blocks, its arithmetic, and what the recipe refuses."""

import json
from statistics import fmean

import numpy as np
import pytest
from test_recipe import files_of

import lifelong as recipe
from base.presets import load_preset

PRESET = (
    'extends = "miniature"\n[text]\nmax_bytes = 150_000\n[training]\nsteps = 4\nwarmup_steps = 1\nevaluations = 1\n'
    "[lifelong]\nlearning_rates = [3e-3]\n"
)
DOMAINS = ["code", "prose", "headers"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "four-steps.toml"
    path.write_text(PRESET)
    return str(path)


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifelong")
    assert recipe.main(["--preset", preset, "--out", str(folder)]) == 0
    return folder


def facts_of(folder, name):
    (path,) = folder.glob(f"trainings/{name}-*/facts.json")
    return json.loads(path.read_text())


def test_forgetting_is_what_the_loss_rose_by_since_a_domain_was_learned():
    after = [{"a": 3.0, "b": 9.0, "c": 9.0}, {"a": 4.0, "b": 2.0, "c": 9.0}, {"a": 5.0, "b": 2.5, "c": 1.0}]
    assert recipe.forgetting(after) == pytest.approx(((5.0 - 3.0) + (2.5 - 2.0)) / 2)
    assert recipe.forgetting(after[:2]) == pytest.approx(4.0 - 3.0)  # the last domain cannot be forgotten yet
    assert recipe.forgetting([{"a": 3.0, "b": 9.0}, {"a": 2.0, "b": 1.0}]) == -1.0  # what came later helped


@pytest.mark.parametrize(("share", "old"), [(0.0, [0, 0, 0]), (0.25, [0, 4, 2]), (0.5, [0, 8, 4])])
def test_each_stage_has_as_many_blocks_and_replays_those_that_were_seen(share, old):
    domains = {name: np.full((40, 8), i) + np.arange(40)[:, None] * 10 for i, name in enumerate(DOMAINS)}
    seen = {name: set() for name in DOMAINS}
    for stage, name in enumerate(DOMAINS):
        blocks = recipe.of_stage(domains, stage, 16, share)
        assert sum(map(len, blocks.values())) == 16
        assert list(blocks) == [name, *(DOMAINS[:stage] if share else [])]
        for earlier in blocks.keys() - {name}:
            assert len(blocks[earlier]) == old[stage]
            assert {tuple(row) for row in blocks[earlier]} <= seen[earlier]
        seen[name] |= {tuple(row) for row in blocks[name]}


def test_the_table_is_what_the_trainings_left(finished):
    content = json.loads((finished / "results.json").read_text())
    rows = content["results"]
    assert len(rows) == 3 * len(recipe.WAYS) + 2
    for name, way in recipe.WAYS.items():
        after = [facts_of(finished, f"{name.replace(', ', '-').replace(' ', '-')}-{stage}") for stage in (2, 3)]
        losses = [{domain: rows[f"{name}: after {one}"][domain][0] for domain in DOMAINS} for one in DOMAINS]
        assert losses[1:] == [one["losses"] for one in after]
        end = rows[f"{name}: after headers"]
        assert end["mean"] == [fmean(losses[2].values())]
        rise = [losses[2]["code"] - losses[0]["code"], losses[2]["prose"] - losses[1]["prose"]]
        assert end["forgetting"] == [pytest.approx(fmean(rise))]
        assert bool(after[1]["result"]["flops"]["teacher"]) == (way.taught is not None)
    table = (finished / "report.md").read_text()
    assert f"| from scratch: all text at once | {rows['from scratch: all text at once']['code'][0]:.3f} |" in table


def test_ways_see_the_same_text_and_are_taught_by_the_model_before(finished):
    decided = {
        name: facts_of(finished, f"{name}-2")["decided_by"]
        for name in ("alone", "taught", "replay", "replay-taught", "replay-never-grown")
    }
    texts = [(str(one["text"]), one["order"], one["seed"]) for one in decided.values()]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] == texts[4] != texts[0]
    assert decided["taught"]["teachers"] == [False, [[0, decided["taught"]["start"]["grown"]]]]
    assert [one["teachers"][1] for one in decided.values()].count([]) == 3
    # Ways that begin with the same sizes begin with the same training.
    starts = [one["start"].get("grown", one["start"].get("continued")) for one in decided.values()]
    assert len(set(starts)) == 1
    assert decided["alone"]["start"]["config"]["hidden_size"] == 24
    assert "continued" in decided["replay-never-grown"]["start"]


def test_a_second_run_uses_what_is_there(finished, preset):
    before = files_of(finished / "trainings")
    assert recipe.main(["--preset", preset, "--out", str(finished)]) == 0
    assert files_of(finished / "trainings") == before


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('extends = "demo"\n', "no section lifelong"),
        (PRESET + "sizes = [{hidden = 16, layers = 1, heads = 2, kv_heads = 2, ffn = 24}]\n", "3, one for each domain"),
        (PRESET + "sizes = [{hidden = 15, layers = 1, heads = 2, kv_heads = 2, ffn = 24}]\n", "no multiple of heads"),
    ],
)
def test_bad_input_is_refused_in_one_line(toml, says, tmp_path, capsys):
    (tmp_path / "preset.toml").write_text(toml)
    assert recipe.main(["--preset", str(tmp_path / "preset.toml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said


def test_the_preset_fits_the_recipe():
    lifelong = load_preset("lifelong").lifelong
    assert lifelong is not None
    assert len(lifelong.sizes) == len(DOMAINS)
    assert [one.hidden for one in lifelong.sizes] == sorted({one.hidden for one in lifelong.sizes})
