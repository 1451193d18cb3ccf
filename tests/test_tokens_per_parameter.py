"""Arms at several numbers of tokens per parameter, on a preset of a few steps; what is refused; the page."""

import json
from pathlib import Path
from statistics import fmean

import pytest

import tokens_per_parameter as recipe
from base.horizons import middle, over_seeds, table
from base.reference import NAME

PRESET = (
    'extends = "miniature"\nmethod = "lossless"\n[text]\nmax_bytes = 150_000\n[training]\nwarmup_steps = 1\n'
    "[tokens]\nper_parameter = [0.02, 0.05]\nlearning_rates = [3e-3]\nseeds = 1\n"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "few.toml").write_text(PRESET)
    assert recipe.main(["--preset", str(folder / "few.toml"), "--out", str(folder / "out")]) == 0
    return folder


def test_each_arm_sees_so_many_tokens(finished):
    results = json.loads((finished / "out/tokens.json").read_text())
    for horizon, point in results["horizons"].items():
        tokens = point["steps"] * results["setting"]["tokens_per_step"]
        assert tokens / results["parameters"] == pytest.approx(float(horizon), rel=0.2)
        assert list(point["arms"]) == ["scratch", "weights", "knowledge", NAME]
        for arm in point["arms"].values():
            assert arm["loss"]["mean"] == pytest.approx(fmean(run["loss"] for run in arm["by_seed"].values()))
    (finished / "out/tokens.png").stat()
    assert "| scratch |" in (finished / "out/tokens.md").read_text()


def curve(*losses):
    return {
        "final_eval_loss": losses[-1],
        "curve": [{"step": i, "flops": 10.0 * i, "eval_loss": loss} for i, loss in enumerate(losses)],
        "flops": {"student": 10.0 * (len(losses) - 1)},
    }


def test_what_is_saved_is_that_of_each_seed():
    runs = {
        0: {"scratch": curve(6, 5, 4), "weights": curve(5, 4, 3)},
        1: {"scratch": curve(6, 5, 3), "weights": curve(5, 4, 3)},
    }
    found = over_seeds(runs, {0: 5.0, 1: 5.0})
    assert found["weights"]["saved"]["mean"] == pytest.approx((0.5 + 0) / 2)
    assert found["weights"]["saved_in_all"]["mean"] == pytest.approx((0.25 - 0.25) / 2)
    assert found["weights"]["to_scratch"]["mean"] == pytest.approx(-0.5)
    never = over_seeds({0: {"scratch": curve(6, 5, 4), "weights": curve(6, 5, 4.5)}}, {0: 0.0})
    assert never["weights"]["saved"] is None
    point = {"steps": 2, "arms": never}
    assert "not reached" in table({"horizons": {"2": point}})[2]


@pytest.mark.parametrize(("several", "one"), [([2, 5, 10, 20], 5), ([20, 2, 10], 10), ([4], 4)])
def test_rates_are_tried_in_the_middle(several, one):
    assert middle(several) == one


REFUSED = {
    "no section": (["--preset", "demo"], "tokens, miniature"),
    "no scratch": (["--arms", "weights"], "scratch,weights"),
    "no seed": (["--seeds", "0"], "1 or more"),
    "too few": (["--preset", "miniature", "--per-parameter", "1e-9"], "more tokens"),
    "no number": (["--per-parameter", "many"], "numbers above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, capsys):
    arguments, valid = REFUSED[case]
    assert recipe.main([*arguments, "--out", str(tmp_path)]) == 2
    assert valid in capsys.readouterr().err
    assert not list(Path(tmp_path).glob("tokens.*"))
