"""The command line, as a person uses it."""

import json

import pytest
from tiny import tiny

import growlib
from growlib.cli import main


@pytest.fixture
def small(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    return tmp_path / "small"


def test_expand_then_verify(small, tmp_path, capsys):
    big = tmp_path / "deep" / "big"
    sizes = ["--set", "hidden_size=72", "--set", "num_hidden_layers=3"]
    assert main(["expand", str(small), str(big), *sizes, "--seed", "5"]) == 0
    assert "exact: max |Δ|" in capsys.readouterr().out
    assert (big / "tokenizer.json").read_text() == "{}"
    assert json.loads((big / "growlib.json").read_text())["seed"] == 5
    assert main(["verify", str(small), str(big)]) == 0
    assert main(["verify", str(big), str(big)]) == 0
    stranger = tmp_path / "stranger"
    tiny("llama", seed=7, hidden_size=72).save_pretrained(stranger)
    assert main(["verify", str(small), str(stranger)]) == 1
    assert "NOT exact" in capsys.readouterr().out


def test_expand_never_overwrites(small, tmp_path, capsys):
    before = (small / "config.json").read_text()
    assert main(["expand", str(small), str(small), "--set", "hidden_size=96"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (small / "config.json").read_text() == before


def test_exact_refuses(small, tmp_path, capsys):
    assert main(["expand", str(small), str(tmp_path / "big"), "--set", "head_dim=18", "--exact"]) == 2
    assert "rotary frequencies" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()


def test_a_target_from_a_config_folder(small, tmp_path, capsys):
    tiny("llama", hidden_size=96).config.save_pretrained(tmp_path / "target")
    assert main(["plan", str(small), "--config", str(tmp_path / "target")]) == 0
    assert "hidden          48 -> 96" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--set", "hidden_size"], ["--set", "hidden_size=96", "--config", "x"]])
def test_a_target_is_named_once(small, arguments, capsys):
    assert main(["plan", str(small), *arguments]) == 2
    assert "--set" in capsys.readouterr().err


def test_plan_draws_where_each_tensor_comes_from(small, capsys):
    assert main(["plan", str(small), "--set", "intermediate_size=168", "--set", "num_hidden_layers=3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  model.")]
    rows = {name: [line for line in lines if line.split()[0] == name] for name in (line.split()[0] for line in lines)}
    assert "112x48 -> 168x48" in rows["model.layers.*.mlp.up_proj"][0]
    # Half of the old units have two copies: two thirds of the columns that read them are shared.
    assert rows["model.layers.*.mlp.up_proj"][0].count("█") == 24
    assert rows["model.layers.*.mlp.down_proj"][0].count("▓") == 16
    assert rows["model.layers.*.mlp.down_proj"][1].count("·") == 24  # of the new layer: zeros
    assert main(["plan", str(small), "--set", "hidden_size=96", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True


def test_the_tables(capsys):
    assert main(["methods"]) == 0
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    for name in [*growlib.families(), *(row.name for row in growlib.methods())]:
        assert f"\n{name} " in printed
