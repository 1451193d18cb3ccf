"""The nearest exact growth: exact when it is asked for, and no change in it is needless."""

import pytest
from tiny import tiny

import growlib
from growlib import GrowError
from growlib.cli import main
from growlib.nearest import nearest_exact

LLAMA = {"hidden_size": 72, "num_hidden_layers": 3}
CASES = [  # source, what is asked for, what the nearest exact target changes of it
    ("llama", {**LLAMA, "num_attention_heads": 2}, {"num_attention_heads": 4}),
    ("llama", {"head_dim": 18, "num_hidden_layers": 4}, {"head_dim": 24}),
    ("llama", {**LLAMA, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_parameters": None}),
    ("bert", {"hidden_size": 72, "intermediate_size": 130}, {"hidden_size": 96}),
    ("gpt2", {"n_embd": 72, "activation_function": "relu"}, {"activation_function": None}),
]


def is_exact(small, target):
    try:
        return growlib.plan(small, target).exact
    except GrowError:
        return False


@pytest.mark.parametrize(("family", "asked", "changes"), CASES)
def test_the_nearest_exact_target_is_exact(family, asked, changes):
    small = tiny(family)
    assert not is_exact(small, asked)
    found = nearest_exact(small, asked, "lossless")
    of_source = small.config.to_dict()
    assert found == {name: of_source[name] if value is None else value for name, value in changes.items()}
    target = {**asked, **found}
    assert growlib.verify(small, growlib.expand(small, target, exact=True)).exact
    for name in found:  # each alone is needed
        assert not is_exact(small, {**target, name: asked[name]})


def test_an_exact_target_is_its_own_nearest():
    assert nearest_exact(tiny("llama"), LLAMA, "lossless") == {}


def test_where_nothing_is_near_there_is_none():
    assert nearest_exact(tiny("llama"), {"no_such_field": 3}, "lossless") is None
    assert nearest_exact(tiny("llama"), {"hidden_size": 72}, "random") is None


def test_the_command_offers_it(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "llama")
    tiny("bert").save_pretrained(tmp_path / "bert")
    assert main(["plan", str(tmp_path / "llama"), "--set", "hidden_size=72", "--set", "num_attention_heads=2"]) == 2
    assert "nearest exact: num_attention_heads=4." in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "bert"), "--set", "hidden_size=72"]) == 0
    assert "nearest exact: hidden_size=96\n" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "bert"), "--set", "hidden_size=96"]) == 0
    assert "nearest" not in capsys.readouterr().out
