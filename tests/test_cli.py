"""The command line, as a person uses it."""

import argparse
import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny import CONFIGS, tiny
from unknown import LoomConfig, LoomForCausalLM

import growlib
from growlib.cli import _parser, main
from growlib.costs import cost_table


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
    # Two thirds of the rows are the old units; the others are free, and the columns that read them hold zeros.
    assert rows["model.layers.*.mlp.up_proj"][0].count("█") == 16
    assert rows["model.layers.*.mlp.down_proj"][0].count("█") == 16
    assert rows["model.layers.*.mlp.down_proj"][0].count("·") == 8
    assert rows["model.layers.*.mlp.down_proj"][1].count("·") == 24  # of the new layer: zeros
    assert main(["plan", str(small), "--set", "hidden_size=96", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True


def test_the_tables(capsys):
    assert main(["methods"]) == 0
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    for name in [*growlib.families(), *(row.name for row in growlib.methods())]:
        assert f"\n{name} " in printed


@pytest.mark.parametrize("way", [["-m", "growlib"], ["-m", "growlib.cli"]])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_wait_for_nothing(way, option):
    code = f"import runpy, sys; sys.argv = ['growlib', {option!r}]\n"
    code += f"try: runpy.run_module({way[1]!r}, run_name='__main__')\n"
    code += "except SystemExit: print('heavy:', [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("heavy: []\n")
    assert ("usage: growlib" in run.stdout) == (option == "--help")


def options_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        else:
            yield parser.prog, action


def test_every_option_says_what_it_does():
    found = list(options_of(_parser()))
    assert len(found) > 30
    for command, action in found:
        assert action.help, f"{command} {action.option_strings or action.dest}"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["exapnd", "a", "b"], "expand"),
        (["plan", "a", "--sett", "b=1"], "--set"),
        (["plan", "a", "--methd=lemon"], "--method"),
        (["cache", "a", "b", "c", "--topk", "3"], "--top-k"),
    ],
)
def test_did_you_mean(arguments, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_a_method_that_is_nearly_right(small, capsys):
    assert main(["plan", str(small), "--set", "hidden_size=96", "--method", "losless"]) == 2
    assert "did you mean 'lossless'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "scale", "target"),
    [
        ("llama", ["width=1.5", "depth=2"], {"hidden_size": 72, "intermediate_size": 168, "num_attention_heads": 6}
         | {"num_key_value_heads": 3, "num_hidden_layers": 4}),
        ("llama", ["depth=1.5"], {"num_hidden_layers": 3}),
        ("gpt2", ["width=2"], {"n_embd": 96, "n_head": 8}),
        ("bert", ["width=2", "depth=2"], {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 4}),
    ],
)  # fmt: skip
def test_scale_names_the_sizes_that_follow(family, scale, target, tmp_path):
    tiny(family).save_pretrained(tmp_path / "small")
    arguments = ["plan", str(tmp_path / "small"), "--scale", *scale, "--save", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    assert growlib.GrowthPlan.load(tmp_path / "plan.json") == growlib.plan(tmp_path / "small", target)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (["width=1.3"], "Valid: width=1 or width=1.5, or each field by itself"),
        (["hight=2"], "there is no part 'hight'. Valid: width or depth"),
        (["width=two"], "it is no factor"),
        (["width=true"], "it is no factor"),
        (["width=0.5"], "at least 1"),
        (["width"], "it is not NAME=VALUE"),
    ],
)
def test_a_scale_that_makes_no_sense(small, scale, words, capsys):
    assert main(["plan", str(small), "--scale", *scale]) == 2
    assert words in capsys.readouterr().err


def test_set_goes_before_scale(small, tmp_path):
    both = ["--scale", "width=2", "--set", "intermediate_size=300", "--save", str(tmp_path / "plan.json")]
    assert main(["plan", str(small), *both]) == 0
    config = growlib.GrowthPlan.load(tmp_path / "plan.json").config
    assert (config.hidden_size, config.intermediate_size) == (96, 300)


def test_plan_ends_with_what_it_costs(small, capsys):
    assert main(["plan", str(small), "--set", "hidden_size=96"]) == 0
    printed = capsys.readouterr().out
    counts = [sum(p.numel() for p in model.parameters()) for model in (tiny("llama"), tiny("llama", hidden_size=96))]
    assert re.search(rf"parameters +{counts[0]:,} +{counts[1]:,}\n", printed)
    matrices = [c - 61 * h - 5 * h for c, h in zip(counts, (48, 96), strict=True)]  # no embedding, no norms
    flops = next(line for line in printed.splitlines() if line.startswith("FLOPs per token"))
    assert flops.split()[-2:] == [f"{6 * count:.3g}" for count in matrices]
    assert "memory for training" in printed
    assert "sizes that stay: vocab_size=61" in printed


@pytest.mark.parametrize(
    ("state", "known"),
    [
        (
            {"log_history": [{"learning_rate": 1e-4}, {"loss": 5.0}, {"learning_rate": 6e-4}, {"learning_rate": 0}]},
            True,
        ),
        ({"log_history": [{"loss": 5.0}]}, False),
        ({"log_history": ["no entry"]}, False),
        (["no state"], False),
        (None, False),
    ],
)
def test_plan_and_card_say_where_to_begin_the_search_for_a_rate(state, known, small, tmp_path, capsys):
    source = shutil.copytree(small, tmp_path / "source")
    if state is not None:
        (source / "trainer_state.json").write_text(json.dumps(state))
    advice = "begin with the learning rate at which the source was trained best"
    advice += ", 0.0006 by its trainer_state.json" if known else ""
    assert main(["plan", str(source), "--set", "hidden_size=96"]) == 0
    assert capsys.readouterr().out.endswith(f"\ntraining it: {advice}\n")
    growlib.expand_checkpoint(source, tmp_path / "big", {"hidden_size": 96})
    assert f"{advice}.\n" in (tmp_path / "big/README.md").read_text()


def test_the_costs_of_a_mixture_count_the_experts_that_act():
    small = tiny("llama", head_dim=None, tie_word_embeddings=True)
    mixture = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    dense, sparse = (cost_table(growlib.plan(small, target)) for target in ({"num_hidden_layers": 4}, mixture))
    assert dense[1][1] == sparse[1][1] == f"{sum(p.numel() for p in small.parameters()):,}"
    ffn, router = 2 * 3 * 48 * 112, 2 * 8 * 48
    before, after = (float(cell) for cell in sparse[2][1:])
    assert after == pytest.approx(before + 6 * (ffn + router), rel=0.01)  # two of eight act: twice one layer


def test_plan_exact_refuses(small, tmp_path, capsys):
    inexact = ["plan", str(small), "--set", "num_hidden_layers=4", "--method", "stack"]
    assert main(inexact) == 0
    capsys.readouterr()
    assert main([*inexact, "--exact", "--save", str(tmp_path / "plan.json")]) == 2
    assert "acts again" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_a_class_of_ones_own_is_checked(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path))
    assert main(["families", "--check", "unknown:LoomForCausalLM"]) == 0
    said = capsys.readouterr().out
    assert said.strip() == str(growlib.infer(LoomConfig(), LoomForCausalLM)).strip()
    for words in ("found on a tiny model", "axis", "hidden", "growth", "exact", ": the identity without "):
        assert words in said
    assert max(map(len, said.splitlines())) <= 100
    for wrong, why in [("unknown:Nothing", "cannot be imported"), ("no_module:X", "cannot be imported"),
                       ("json:dumps", "it is a function")]:  # fmt: skip
        assert main(["families", "--check", wrong]) == 2
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["methods"], ["families"], ["families", "--check", "qwen3"]])
def test_tables_fit_into_100_columns(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path))
    assert main(arguments) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("family", "sizes", "growth"),
    [
        ("llama", {"vocab_size": 128256}, {"hidden_size": 8192, "num_hidden_layers": 80}),
        ("gpt2", {}, {"n_embd": 1600, "n_head": 25, "n_layer": 48}),
        ("bert", {}, {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24}),
    ],
)
@pytest.mark.parametrize("method", ["lossless", "random+stack"])
def test_a_plan_fits_into_100_columns(family, sizes, growth, method):
    plan = growlib.plan(CONFIGS[family](**sizes), growth, method)
    assert max(map(len, str(plan).splitlines())) <= 100


def test_bibtex_has_an_entry_for_each_paper(capsys):
    assert main(["methods", "--bibtex"]) == 0
    printed = capsys.readouterr().out
    papers = {paper for row in growlib.methods() for paper in row.papers}
    assert printed.count("@misc{") == len(papers) > 14
    for paper in papers:
        assert paper.title in printed
        assert not paper.arxiv or f"eprint = {{{paper.arxiv}}}" in printed
