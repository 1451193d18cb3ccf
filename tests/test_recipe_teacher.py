"""The main job with a teacher of its own, its schedules, and the reference."""

import dataclasses
import json
import re
import shutil

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import base.job
import ki_plus_growth as recipe
from base import report
from base.flops import forward_flops, training_flops
from base.known import differences
from base.library import load_checkpoint
from base.presets import load_preset
from base.reference import NAME, against_the_better
from base.text import train_tokenizer
from growlib import GrowError

MINIATURE = ["--preset", "miniature"]
BATCH, LENGTH, STEPS = 8, 32, 12
WITH_TEACHER = """extends = "miniature"
[small]
steps = 2
[training]
steps = 4
warmup_steps = 1
evaluations = 2
[teacher]
start = "fresh"
text = "same"
steps = 6
learning_rate = 4e-3
sizes = {hidden = 32, layers = 1, heads = 2, kv_heads = 2, ffn = 40}
[reference]
trained = true
[knowledge]
schedule = "constant"
stop_at = "none"
alpha = 1.0
"""


@pytest.fixture(scope="module")
def small(finished, tmp_path_factory):
    """The small model of the miniature preset."""
    return shutil.copytree(next(finished.glob("trainings/small-*")), tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A preset that makes its own teacher, and a folder in which all of it is finished."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "preset.toml").write_text(WITH_TEACHER)
    assert recipe.main(["--preset", str(folder / "preset.toml"), "--out", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The finished miniature in a folder that a test may change."""
    return shutil.copytree(finished, tmp_path / "copied")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def another_model(small, folder, kind="gpt2", length=LENGTH):
    """A checkpoint of random values beside the small model's tokenizer."""
    vocab = len(AutoTokenizer.from_pretrained(small))
    if kind == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=length, **sizes))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        model = BertForMaskedLM(BertConfig(vocab_size=vocab, max_position_embeddings=length, **sizes))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


def test_a_preset_makes_its_teacher(taught):
    results, (teacher,) = results_of(taught / "out"), (taught / "out" / "trainings").glob("teacher-*")
    setting, arms = results["setting"], results["arms"]
    (of_teacher,) = setting["teachers"]
    assert of_teacher["name"] == "teacher"
    model = load_checkpoint(teacher)
    assert model.config.hidden_size == 32
    assert model.config.num_hidden_layers == 1
    # What it cost to make is reported, and not counted in the arms: of these it has one forward pass per step.
    forward = forward_flops(model, LENGTH)
    assert of_teacher["flops"] == training_flops(forward, 6 * BATCH)
    assert [arm["flops"]["teacher"] for arm in arms.values()] == [0, 0, 4 * BATCH * forward, 4 * BATCH * forward]
    page = (taught / "out" / "report.md").read_text()
    assert f"| (teacher) | {of_teacher['eval_loss']:.3f} |" in page
    assert f"Teacher: teacher (held-out loss {of_teacher['eval_loss']:.3f})." in page


def test_a_teacher_starts_and_reads_otherwise_than_the_arms(taught):
    decided = {}
    for path in (taught / "out" / "trainings").iterdir():
        decided[path.name.rpartition("-")[0]] = json.loads((path / "facts.json").read_text())["decided_by"]
    assert len({decided[name]["seed"] for name in ("teacher", "scratch")}) == 2
    assert len({decided[name]["order"] for name in ("teacher", "small", "scratch", "reference")}) == 4


def test_a_teacher_may_be_grown_from_the_small_model(taught, tmp_path):
    (tmp_path / "preset.toml").write_text(WITH_TEACHER.replace("fresh", "grown").replace("ffn = 40", "ffn = 48"))
    out = shutil.copytree(taught / "out", tmp_path / "out")
    arguments = ["--preset", str(tmp_path / "preset.toml"), "--arms", "knowledge", "--no-reference"]
    assert recipe.main([*arguments, "--out", str(out)]) == 0
    decided = [json.loads(path.read_text())["decided_by"] for path in out.glob("trainings/teacher-*/facts.json")]
    (grown,) = [one["start"] for one in decided if "grown" in one["start"]]
    assert grown["grown"] == results_of(out)["setting"]["small_model"]["key"]
    assert len(decided) == 2


def test_the_arms_without_knowledge_need_no_teacher(taught, tmp_path):
    arguments = ["--preset", str(taught / "preset.toml"), "--arms", "scratch,weights", "--no-reference"]
    assert recipe.main([*arguments, "--out", str(tmp_path)]) == 0
    assert not list((tmp_path / "trainings").glob("teacher-*"))
    assert results_of(tmp_path)["setting"]["teachers"] == []
    # In a folder where there is one, its arms are found again.
    out = shutil.copytree(taught / "out", tmp_path / "copied")
    assert recipe.main([*arguments, "--out", str(out)]) == 0
    assert list(results_of(out)["arms"]) == ["scratch", "weights", "knowledge", "both"]


def test_a_given_teacher_teaches(small, copied, tmp_path):
    teacher = another_model(small, tmp_path / "teacher")
    before = results_of(copied)
    assert recipe.main([*MINIATURE, "--teacher", str(teacher), "--arms", "knowledge", "--out", str(copied)]) == 0
    results = results_of(copied)
    assert list(results["arms"]) == ["scratch", "weights", "knowledge"]  # both was taught by another
    (of_teacher,) = results["setting"]["teachers"]
    assert of_teacher["name"] == str(teacher)
    assert of_teacher["eval_loss"] > before["setting"]["small_model"]["eval_loss"]
    assert of_teacher["flops"] is None
    forward = forward_flops(load_checkpoint(teacher), LENGTH)
    assert results["arms"]["knowledge"]["flops"]["teacher"] == 4 * BATCH * forward
    assert results["arms"]["knowledge"]["curve"][-1] != before["arms"]["knowledge"]["curve"][-1]
    assert "unknown" in next(row for row in report.table(results) if row[0] == "(teacher)")


@pytest.mark.parametrize("joined", [True, False])
def test_several_teachers_are_averaged(joined, small, tmp_path, monkeypatch):
    other = another_model(small, tmp_path / "other")
    jobs, run = [], base.job.run
    monkeypatch.setattr(base.job, "run", lambda job, folder: jobs.append(job) or run(job, folder))
    named = ["--teacher", f"{small},{other}"] if joined else ["--teacher", str(small), "--teacher", str(other)]
    preset = tmp_path / "short.toml"
    preset.write_text('extends = "miniature"\n[training]\nsteps = 2\nwarmup_steps = 1\nevaluations = 2\n')
    arguments = [
        "--preset",
        str(preset),
        "--small",
        str(small),
        *named,
        "--arms",
        "both",
        "--out",
        str(tmp_path / "out"),
    ]
    assert recipe.main(arguments) == 0
    (job,) = jobs
    assert job.ki().teacher == (small, other)
    results = results_of(tmp_path / "out")
    assert [one["name"] for one in results["setting"]["teachers"]] == [str(small), str(other)]
    forwards = sum(forward_flops(load_checkpoint(path), LENGTH) for path in (small, other))
    assert results["arms"]["both"]["flops"]["teacher"] == BATCH * forwards  # alpha is 0 from 0.3 of two steps on
    assert "averaged" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "taught_steps"),
    [
        (["--schedule", "constant", "--stop-at", "none", "--alpha", "0.5"], 12),
        (["--schedule", "linear", "--stop-at", "1"], 12),
        (["--schedule", "cosine", "--stop-at", "0.5"], 6),
    ],
)
def test_schedules_from_the_command_line(options, taught_steps, copied, small):
    assert recipe.main([*MINIATURE, *options, "--arms", "knowledge", "--out", str(copied)]) == 0
    results = results_of(copied)
    given = dict(zip(options[::2], options[1::2], strict=True))
    knowledge = results["setting"]["knowledge"]
    assert knowledge["schedule"] == given["--schedule"]
    assert str(knowledge["stop_at"]) in (given["--stop-at"], f"{given['--stop-at']}.0")
    assert knowledge["alpha"] == float(given.get("--alpha", 1.0))
    forward = forward_flops(load_checkpoint(small), LENGTH)
    assert results["arms"]["knowledge"]["flops"]["teacher"] == taught_steps * BATCH * forward
    assert f"schedule {knowledge['schedule']}, stop at {knowledge['stop_at']}" in (copied / "report.md").read_text()


def test_a_teacher_that_was_passed_costs_nothing_more(copied, taught):
    """With `--stop-at auto` the FLOPs end where the student's held-out loss is no higher than the teacher's."""
    (teacher,) = (taught / "out" / "trainings").glob("small-*")  # of two steps
    arguments = [*MINIATURE, "--teacher", str(teacher), "--stop-at", "auto", "--arms", "knowledge"]
    assert recipe.main([*arguments, "--out", str(copied)]) == 0
    results = results_of(copied)
    curve, loss = results["arms"]["knowledge"]["curve"], results["setting"]["teachers"][0]["eval_loss"]
    passed = next(point["step"] for point in curve if point["eval_loss"] <= loss)
    assert 0 < passed < STEPS
    forward = forward_flops(load_checkpoint(teacher), LENGTH)
    assert results["arms"]["knowledge"]["flops"]["teacher"] == passed * BATCH * forward


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--schedule", "linear", "--stop-at", "none"], "--stop-at none.*needs an end"),
        (["--stop-at", "1.5"], "share in"),
        (["--stop-at", "soon"], "--stop-at soon: it is no share"),
        (["--schedule", "steep"], "one of linear"),
        (["--alpha", "2"], "weight in"),
        (["--teacher", "a,b", "--stop-at", "auto"], "average of teachers is not known"),
        (["--teacher", "a,,b"], "one of the paths is empty"),
        (["--teacher", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_options_of_knowledge_are_refused_before_anything_is_trained(options, says, tmp_path, capsys):
    assert recipe.main([*MINIATURE, *options, "--out", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("error: ")
    assert re.search(says, error)
    assert not (tmp_path / "trainings").exists()


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_trained(small, tmp_path, capsys):
    other_tokens, no_tokens, short = (another_model(small, tmp_path / name) for name in ("other", "none", "short"))
    train_tokenizer(["quite another text, of other words"] * 9, 320).save_pretrained(other_tokens)
    for path in no_tokens.glob("tokenizer*"):
        path.unlink()
    another_model(small, short, length=16)
    masked = another_model(small, tmp_path / "masked", "bert")
    refused = {
        other_tokens: r"its tokenizer is another one: id \d+ is '.+' there and '.+' here, .* ids differ",
        no_tokens: "there is no tokenizer beside it",
        short: "it has 16 positions and the preset's sequences 32 tokens",
        masked: "it is a masked language model, the small one a causal one",
    }
    for path, says in refused.items():
        assert recipe.main([*MINIATURE, "--teacher", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: --teacher {path}: ")
        assert re.search(says, error)
        assert not (tmp_path / "out" / "trainings").exists()


def test_the_first_tokens_that_differ_are_named():
    ours = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
    assert differences(ours | {"x": 6}, ours) == "id 6 is 'x' there and no token here (1 ids differ)"
    said = differences({"a": 0, "c": 1, "b": 2, "e": 3, "d": 4, "f": 5}, ours)
    assert said.startswith("id 1 is 'c' there and 'b' here, id 2 is 'b' there and 'c' here, id 3 ")
    assert said.endswith("(4 ids differ)")
    assert "id 4" not in said


def test_a_given_small_model_without_a_tokenizer_is_refused(small, tmp_path, capsys):
    folder = shutil.copytree(small, tmp_path / "small")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert recipe.main([*MINIATURE, "--small", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "there is no tokenizer beside it" in capsys.readouterr().err


def check_reference(results, small_path):
    """The reference's part of results.json, against its definition."""
    reference, arms = results["reference"], results["arms"]
    assert list(reference) == [
        "name", "curve", "final_eval_loss", "flops", "seconds", "better", "flops_saved",
    ]  # fmt: skip
    assert reference["name"] == NAME not in arms
    most = max(sum(arm["flops"].values()) for arm in arms.values())
    step = training_flops(forward_flops(load_checkpoint(small_path), LENGTH), BATCH)
    assert reference["flops"] == {"student": most // step * step, "teacher": 0}
    curve = reference["curve"]
    assert curve[0]["step"] == 0
    assert curve[0]["eval_loss"] == pytest.approx(results["setting"]["small_model"]["eval_loss"], abs=1e-6)  # goes on
    assert curve[-1]["step"] == most // step
    assert {name: reference[name] for name in ("better", "flops_saved")} == against_the_better(arms, reference)


def test_the_reference_gets_what_the_arm_with_most_gets(taught):
    results, page = results_of(taught / "out"), (taught / "out" / "report.md").read_text()
    check_reference(results, next((taught / "out" / "trainings").glob("small-*")))
    arms = results["arms"]
    assert sum(arms["both"]["flops"].values()) > sum(arms["weights"]["flops"].values())  # the teacher's count
    assert f"| {NAME} | {results['reference']['final_eval_loss']:.3f} |" in page
    assert "| saved against the better |" in page


def test_a_reference_of_a_given_small_model(small, tmp_path, capsys):
    """And a second run of the same command takes it from the first."""
    preset = tmp_path / "two-steps.toml"
    preset.write_text('extends = "miniature"\n[training]\nsteps = 2\nwarmup_steps = 1\nevaluations = 2\n')
    arguments = ["--preset", str(preset), "--small", str(small), "--arms", "scratch,weights", "--reference"]
    for _ in range(2):
        assert recipe.main([*arguments, "--out", str(tmp_path / "out")]) == 0
        check_reference(results_of(tmp_path / "out"), small)
    assert "other settings" not in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "trainings").glob("reference-*"))) == 1
    assert recipe.main([*arguments[:-1], "--no-reference", "--out", str(tmp_path / "out")]) == 0
    assert results_of(tmp_path / "out")["reference"] is None
    assert "--reference trains it" in capsys.readouterr().out


def result(losses, flops=None):
    """A result with these losses at even FLOPs."""
    total = flops or 100 * (len(losses) - 1)
    curve = [{"flops": total * i / (len(losses) - 1), "eval_loss": loss} for i, loss in enumerate(losses)]
    return {"curve": curve, "final_eval_loss": losses[-1], "flops": {"student": total, "teacher": 0}, "seconds": 1.0}


def test_savings_against_the_better_of_scratch_and_the_reference():
    arms = {"scratch": result([6, 5, 4]), "weights": result([5, 3, 2]), "knowledge": result([6, 5, 3.5])}
    low, high = result([5, 3]), result([5, 4.5])
    assert against_the_better(arms, high) == {
        "better": "scratch",
        "flops_saved": {"scratch": 0.0, "weights": 0.75, "knowledge": pytest.approx(1 - 500 / 3 / 200)},
    }
    assert against_the_better(arms, low) == {
        "better": NAME,
        "flops_saved": {"scratch": None, "weights": 0.0, "knowledge": None},  # against 100 FLOPs
    }


@pytest.mark.parametrize("other", [True, False])
def test_the_small_model_is_charged_to_the_arms_that_use_it(other):
    known = {"eval_loss": 5.0, "flops": 50, "seconds": 1.0}
    setting = {"small_model": {"key": "small", **known}, "teachers": [{"key": "big" if other else "small", **known}]}
    arms = {"scratch": result([6, 5, 4]), "weights": result([5, 4, 2]), "knowledge": result([6, 4, 3])}
    table = report.table(report.results_of(setting, arms, None))
    assert [row[0] for row in table] == ["arm", "(small)", *["(teacher)"] * other, "scratch", "weights", "knowledge"]
    assert [row[-2:] for row in table[-2:]] == [("50%", "25%"), ("50%", "50%" if other else "25%")]


def test_the_report_says_loudly_where_scratch_is_not_what_to_beat():
    assert report.verdict_on_reference(4.2, 3.7).startswith("SCRATCH IS NOT WHAT TO BEAT: it ends at 4.200")
    assert "scratch is what to beat" in report.verdict_on_reference(3.7, 4.2)
    assert report.verdict_on_small(4.2, 3.7).startswith("THE COMPARISON MEANS NOTHING")


def test_less_text_than_was_meant_is_said_beside_the_table():
    def setting(distinct, held_out, train_tokens=0):
        return {
            "text_used": {"distinct_training_tokens": distinct, "held_out_tokens": held_out},
            "text": {"held_out_tokens": 1024, "train_tokens": train_tokens, "sequence_length": 32},
            "training": {"steps": 10},
            "tokens_per_step": 256,
        }

    assert report.remarks_on_text(setting(2560, 1000)) == []  # whole sequences of the held-out text
    (said,) = report.remarks_on_text(setting(2528, 1024))
    assert said.startswith("WARNING: 2,560 tokens were trained on, 2,528 of them distinct")
    (said,) = report.remarks_on_text(setting(320, 1024, train_tokens=320))
    assert said.startswith("2,560 tokens were trained on, 320 of them distinct")  # it was asked
    (said,) = report.remarks_on_text(setting(2560, 960))
    assert said.startswith("WARNING: 960 tokens were held out, 1,024 were asked")


def test_a_loss_that_is_not_finite_is_an_error_and_is_not_kept(tmp_path, monkeypatch, capsys):
    train = base.job.train

    def diverges(*given, **named):
        done = train(*given, **named)
        return dataclasses.replace(done, curve=[*done.curve[:-1], (done.curve[-1][0], float("nan"))])

    monkeypatch.setattr(base.job, "train", diverges)
    preset = tmp_path / "preset.toml"
    preset.write_text('extends = "miniature"\n[small]\nsteps = 1\n')
    assert recipe.main(["--preset", str(preset), "--out", str(tmp_path / "out")]) == 2
    assert "training small at a learning rate of 0.006: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trainings").exists()


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[teacher]\nsteps = 3\n", "teacher: missing: sizes, start, text, learning_rate"),
        (WITH_TEACHER.partition("\n")[2].replace("fresh", "old"), "'old' is no start. Valid: one of fresh, grown"),
        ("[knowledge]\nstop_at = [1]\n", "is no float or str"),
        ("[compare]\nlearning_rates = [true]\n", "True is no float"),
        ('[learning_rate]\nboth = "high"\n', "'high' is no float"),
        ("[reference]\ntrained = 1\n", "1 is no bool"),
    ],
)
def test_bad_sections_of_a_preset_are_refused(toml, says, tmp_path):
    (tmp_path / "bad.toml").write_text(f'extends = "miniature"\n{toml}')
    with pytest.raises(GrowError, match=says):
        load_preset(str(tmp_path / "bad.toml"))
