"""The main job, end to end on the miniature preset, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import base.job
import ki_plus_growth as recipe
import sweep
from base.command import STOPPED
from base.comparison import ARMS
from base.flops import flops_saved, flops_to_reach, forward_flops
from base.models import MODELS
from base.presets import load_preset, presets
from base.text import Masking, Ordered, read_files
from growlib import GrowError

TWO_STEPS = 'extends = "miniature"\n[small]\nsteps = 2\n[training]\nsteps = 2\nwarmup_steps = 1\nevaluations = 2\n'


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder that a test may change."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def two_steps(tmp_path):
    """A preset of two steps."""
    path = tmp_path / "two-steps.toml"
    path.write_text(TWO_STEPS)
    return str(path)


def files_of(folder: Path) -> dict[str, int]:
    """Every file with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_results_json_follows_the_schema(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["setting", "arms", "flops_saved", "reference"]
    assert results["reference"] is None
    assert list(results["arms"]) == list(results["flops_saved"]) == list(ARMS)
    for name, arm in results["arms"].items():
        assert list(arm) == ["curve", "final_eval_loss", "flops", "seconds"]
        assert list(arm["flops"]) == ["student", "teacher"]
        assert all(list(point) == ["step", "tokens", "flops", "eval_loss"] for point in arm["curve"])
        assert (arm["flops"]["teacher"] > 0) == ARMS[name].knowledge
        assert arm["seconds"] > 0


def test_results_json_is_consistent(finished):
    results = json.loads((finished / "results.json").read_text())
    setting, arms = results["setting"], results["arms"]
    steps, per_step = setting["training"]["steps"], setting["tokens_per_step"]
    for arm in arms.values():
        assert [point["step"] for point in arm["curve"]] == [0, 3, 6, 9, 12]
        assert all(point["tokens"] == point["step"] * per_step for point in arm["curve"])
        assert arm["curve"][-1]["step"] == steps
        assert arm["curve"][-1]["eval_loss"] == arm["final_eval_loss"]
        assert arm["curve"][-1]["flops"] == sum(arm["flops"].values())
        assert arm["flops"]["student"] == arms["scratch"]["flops"]["student"]
    # alpha is above 0 for progress 0, 1/12, 2/12, 3/12: four of twelve steps, one forward pass each
    forward = setting["small_model"]["flops"] / (3 * setting["small"]["steps"])
    assert arms["knowledge"]["flops"]["teacher"] == pytest.approx(4 * forward)
    assert results["flops_saved"] == flops_saved(arms)
    # every grown arm starts better than the random one, which starts like the taught random one
    start = {name: arm["curve"][0]["eval_loss"] for name, arm in arms.items()}
    assert start["weights"] == start["both"] < start["scratch"] == start["knowledge"]


def test_report_and_curves(finished):
    report = (finished / "report.md").read_text()
    assert all(f"| {arm} |" in report for arm in ARMS)
    assert "FLOPs saved" in report
    assert "method lossless, exact" in report
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_second_run_uses_everything(copied, capsys):
    before = files_of(copied)
    assert recipe.main(["--preset", "miniature", "--out", str(copied)]) == 0
    after = files_of(copied)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"results.json", "curves.png", "report.md"}
    said = capsys.readouterr().out
    assert "scratch, weights, knowledge, both" in said
    assert "other settings" not in said
    assert said.startswith("1 process of ")


def test_another_setting_is_trained_again_and_not_mixed(copied, capsys):
    common = ["--preset", "miniature", "--arms", "weights", "--out", str(copied)]
    assert recipe.main([*common, "--method", "copies"]) == 0
    assert "results.json was of other settings (method)" in capsys.readouterr().out
    results = json.loads((copied / "results.json").read_text())
    assert set(results["arms"]) == set(ARMS) - {"both"}  # both depends on the method too
    assert results["setting"]["growth"] == "exact"
    # exact growth starts at the small model's loss
    small_loss = results["setting"]["small_model"]["eval_loss"]
    assert results["arms"]["weights"]["curve"][0]["eval_loss"] == pytest.approx(small_loss, abs=1e-4)
    assert recipe.main(["--preset", "miniature", "--arms", "weights", "--out", str(copied)]) == 0
    assert list(json.loads((copied / "results.json").read_text())["arms"]) == list(ARMS)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(two_steps, tmp_path):
    arms = []
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes), recipe.__file__, "--preset", two_steps, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written:") == 1
        arms.append(json.loads((out / "results.json").read_text())["arms"])
    for name in ARMS:
        assert arms[0][name]["final_eval_loss"] == pytest.approx(arms[1][name]["final_eval_loss"], abs=1e-4)


def test_interrupted_run_goes_on(two_steps, tmp_path, monkeypatch, capsys):
    arguments = ["--preset", two_steps, "--out", str(tmp_path / "out")]
    train, trained = base.job.train, []

    def stop_at_knowledge(name, *rest, **named):
        if name == "knowledge" and "knowledge" not in trained:
            trained.append(name)
            raise KeyboardInterrupt
        trained.append(name)
        return train(name, *rest, **named)

    monkeypatch.setattr(base.job, "train", stop_at_knowledge)
    assert recipe.main(arguments) == STOPPED
    assert "same command" in capsys.readouterr().err
    assert recipe.main(arguments) == 0
    assert trained == ["small", "scratch", "weights", "knowledge", "knowledge", "both"]
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"llama"}))
def test_other_architectures(model, two_steps, tmp_path):
    out = tmp_path / "out"
    assert recipe.main(["--preset", two_steps, "--model", model, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == list(ARMS)
    assert results["setting"]["target_config"]["model_type"] == model


def test_given_small_model_with_named_target(finished, two_steps, tmp_path):
    small = next(finished.glob("trainings/small-*"))
    before = files_of(small)
    common = ["--preset", two_steps, "--small", str(small), "--arms", "scratch,weights"]
    out = tmp_path / "out"
    target = "hidden_size=24,num_attention_heads=3,num_key_value_heads=3,num_hidden_layers=2"
    assert recipe.main([*common, "--target", target, "--method", "lossless", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["setting"]["target_config"]["hidden_size"] == 24
    assert results["setting"]["small_model"]["flops"] is None
    assert "unknown" in (out / "report.md").read_text()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(results["setting"]["target_config"]))
    again = tmp_path / "again"
    assert recipe.main([*common, "--target", str(config), "--method", "lossless", "--out", str(again)]) == 0
    assert json.loads((again / "results.json").read_text())["flops_saved"] == results["flops_saved"]
    assert files_of(small) == before
    assert AutoModelForCausalLM.from_pretrained(small).config.hidden_size == 16


def test_little_text_is_repeated_and_the_teacher_sees_other_text(tmp_path):
    preset = tmp_path / "little.toml"
    preset.write_text(TWO_STEPS.replace("[small]", '[small]\ntext = "other"'))
    out = tmp_path / "out"
    arguments = ["--preset", str(preset), "--arms", "scratch", "--train-tokens", "320", "--out", str(out)]
    assert recipe.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["setting"]["text_used"]["distinct_training_tokens"] == 320


def test_sweep_writes_its_table(two_steps, tmp_path):
    arguments = ["--preset", two_steps, "--arms", "scratch,weights", "--learning-rates", "1e-3,1e-2"]
    assert sweep.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "sweep.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert sum("**" in line for line in lines) == 2


def test_a_sweep_takes_a_given_model_target_and_text(finished, two_steps, tmp_path, monkeypatch):
    small = next(finished.glob("trainings/small-*"))
    text = tmp_path / "text.txt"
    text.write_text(Path(recipe.__file__).read_text() * 40)
    jobs, run = [], base.job.run
    monkeypatch.setattr(base.job, "run", lambda job, folder: jobs.append(job) or run(job, folder))
    arguments = ["--preset", two_steps, "--arms", "weights", "--learning-rates", "1e-3", "--small", str(small)]
    arguments += ["--target", "hidden_size=24,num_attention_heads=3,num_key_value_heads=3", "--text", str(text)]
    assert sweep.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (job,) = jobs  # no small model is trained
    assert job.start.source.path == small
    assert job.start.config.hidden_size == 24
    assert "ki_plus_growth" in job.tokenizer.decode(job.blocks["text"].ravel())
    assert job.learning_rate == 1e-3


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name):
    setting = load_preset(name)
    assert set(setting.learning_rate) == set(ARMS)
    assert setting.training.batch_size % setting.training.device_batch_size == 0


def test_there_are_presets():
    of_recipes = {"bert", "downstream", "lifelong", "methods", "progressive", "tokens", "when"}
    of_demo = {"demo", "demo-little-data", "demo-long", "demo-teacher"}
    assert set(presets()) == {*of_demo, *of_recipes, "gpu", "gpu-20", "gpu-teacher", "miniature"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "no/such/folder"], "no such file or folder"),
        (["--arms", "scratch,wieghts"], "no arm 'wieghts'"),
        (["--preset", "nano"], "no such preset"),
        (["--method", "bert3bert"], "no method"),
        (["--model", "rwkv"], "no such architecture"),
        (["--target", "hidden_size=8"], "shrink"),
        (["--target", "hidden_sise=64"], "hidden_sise"),
        (["--target", "hidden_size="], "KEY=VALUE"),
        (["--small", "no/such/folder"], "no/such/folder"),
        (["--train-tokens", "-1"], "training part"),
        (["--train-tokens", "999999999"], "training part"),
        (["--learning-rate", "0"], "not positive"),
        (["--seed", "-1"], "negative"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, two_steps, tmp_path, capsys):
    out = tmp_path / "out"
    preset = [] if "--preset" in arguments else ["--preset", two_steps]
    assert recipe.main([*preset, *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said
    assert "Valid: " in said
    assert not list(out.glob("trainings/*"))
    assert not list(out.glob(".*"))


def test_folder_that_is_no_checkpoint_is_refused(two_steps, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    assert recipe.main(["--preset", two_steps, "--small", str(tmp_path / "empty"), "--out", out]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_file_is_no_folder_of_results(two_steps, capsys):
    arguments = ["--preset", two_steps, "--out", two_steps]
    assert recipe.main(arguments) == 2
    assert "nothing can be written there" in capsys.readouterr().err
    assert sweep.main(arguments) == 2
    assert "nothing can be written there" in capsys.readouterr().err


def test_too_little_text_is_refused(two_steps, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a few words\n")
    assert recipe.main(["--preset", two_steps, "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    assert "too little text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('extends = "miniature"\n[training]\nstepps = 2\n', "unknown: stepps"),
        ('model = "llama"\n', "missing"),
        ('extends = "miniature"\nseed = "zero"\n', "'zero'"),
        ("steps = \n", "not TOML"),
        ('extends = "bad.toml"\n', "extends itself"),
        ("extends = 3\n", "'3': there is no such preset"),
        ('extends = "miniature"\n[training]\nsteps = 0\n', "training, steps: 0 is too small. Valid: 1 or more"),
        ('extends = "miniature"\n[text]\nheld_out_tokens = 31\n', "held_out_tokens: .* Valid: 32 or more"),
        ('extends = "miniature"\n[target]\nheads = 5\n', "target, hidden: .* Valid: a multiple of 5"),
        ('extends = "miniature"\n[initial]\nkv_heads = 4\n', "initial, heads: .* Valid: a multiple of 4"),
    ],
)
def test_bad_presets_are_refused(toml, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(toml)
    with pytest.raises(GrowError, match=says):
        load_preset("bad.toml")


def test_text_is_read_in_the_same_order_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        for name in ("b.txt", "a.txt", "sub/c.txt"):
            (tmp_path / place / name).write_text(f"content of {name}")
        (tmp_path / place / "copy.txt").write_text("content of a.txt")
        (tmp_path / place / "binary.dat").write_bytes(b"\xff\xfe\x00")
    texts = read_files(str(tmp_path / "here"))
    assert texts == read_files(str(tmp_path / "there"))
    assert sorted(texts) == [f"content of {name}" for name in ("a.txt", "b.txt", "sub/c.txt")]


def test_every_block_is_seen_once_before_any_is_seen_again():
    blocks = torch.arange(10).reshape(5, 2).numpy()
    ordered = Ordered(blocks, 12, 0, None)
    assert sorted(ordered.order[:5]) == sorted(ordered.order[5:10]) == [0, 1, 2, 3, 4]
    assert len(ordered) == 12
    assert list(Ordered(blocks, 12, 0, None).order) == list(ordered.order)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_masked_blocks_count_the_masked_positions_only(share):
    blocks = torch.arange(5, 1005).reshape(1, 1000).numpy()
    row = Ordered(blocks, 1, 0, Masking(1, share))[0]
    masked = row["labels"] != -100
    assert masked.float().mean().item() == pytest.approx(share, abs=0.06)
    assert bool((row["input_ids"][masked] == 1).all())
    assert torch.equal(torch.where(masked, row["labels"], row["input_ids"]), torch.arange(5, 1005))


def test_forward_flops_against_arithmetic():
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=100,
    )
    length = 16
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 100  # q, o; k, v; the FFN; the head
    attention = 2 * 2 * length * length * 32  # two products in each of two layers
    rotary = length * 4  # positions times head_dim / 2 frequencies
    expected = 2 * (linear * length + attention)
    assert forward_flops(LlamaForCausalLM(config), length) in {expected, expected + 2 * rotary}


def test_a_mixture_is_compared_with_a_mixture_from_scratch(finished, two_steps, tmp_path):
    small = str(next(finished.glob("trainings/small-*")))
    arguments = ["--preset", two_steps, "--small", small, "--arms", "scratch,weights", "--method", "lossless"]
    mixture = "model_type=mixtral,num_local_experts=4,num_experts_per_tok=2,num_hidden_layers=1"
    assert recipe.main([*arguments, "--target", mixture, "--out", str(tmp_path / "out")]) == 0
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    # Two experts of the dense layer's width each: its three products once more, and a router, for each token.
    dense, hidden, ffn = forward_flops(AutoModelForCausalLM.from_pretrained(small), 32), 16, 24
    added = 32 * 2 * hidden * (3 * ffn + 4)
    for arm in arms.values():
        assert arm["flops"]["student"] == 2 * 8 * 3 * (dense + added)  # two steps of eight sequences


def test_savings_are_interpolated_and_null_where_never_reached():
    def arm(losses, teacher=0):
        curve = [{"flops": 100 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
        return {
            "curve": curve,
            "final_eval_loss": losses[-1],
            "flops": {"student": 100 * (len(losses) - 1) - teacher, "teacher": teacher},
        }

    arms = {"scratch": arm([5, 4, 3]), "weights": arm([4, 2, 2]), "knowledge": arm([5, 4, 3.5])}
    assert flops_to_reach(arms["weights"]["curve"], 3) == 50
    assert flops_saved(arms) == {"scratch": 0.0, "weights": 0.75, "knowledge": None}
    assert flops_saved(arms, small_flops=20)["weights"] == pytest.approx(0.65)
    assert flops_saved({"weights": arms["weights"]}) == {"weights": None}
