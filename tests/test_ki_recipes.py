"""The recipes of knowledge, end to end on the miniature preset, and the benchmark on a tiny shape."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from ki_tiny import arguments, examples, llama

import after_growth
import bench_ki
import both_factors
import domain_adaptation
import estimators
import generations
import growlib
import ki_ablations
import student_factors
import teacher_factors
from base import study
from base.aids import Aid
from base.command import STOPPED
from base.domains import code_and_prose, split
from base.job import Job, place
from base.lab import Lab, fresh
from base.measure import peak_bytes
from base.presets import load_preset
from base.start import Checkpoint, Continued, Grown
from base.text import Masking, train_tokenizer
from growlib import GrowError, GrowthSchedule, Rewarm

NO_RUN = {"gain", "difference", "teacher", "weights"}  # columns of differences, and of runs that rows share
MINIATURE = 'extends = "miniature"\n[training]\nsteps = 2\nwarmup_steps = 1\nevaluations = 1\n'


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (generations, 7),
        pytest.param(domain_adaptation, 38, marks=pytest.mark.slow),
        pytest.param(teacher_factors, 13, marks=pytest.mark.slow),
        pytest.param(student_factors, 7, marks=pytest.mark.slow),
        pytest.param(both_factors, 16, marks=pytest.mark.slow),
        pytest.param(estimators, 6, marks=pytest.mark.slow),
        pytest.param(after_growth, 13, marks=pytest.mark.slow),
        pytest.param(ki_ablations, 21, marks=pytest.mark.slow),
    ],
)
def test_a_study_runs_and_a_second_run_uses_its_models(recipe, count, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text(MINIATURE)
    out = tmp_path / "out"
    arguments = ["--preset", str(preset), "--out", str(out)]
    assert recipe.main(arguments) == 0
    content = json.loads((out / "results.json").read_text())
    assert content["setting"]["seeds"] == [0]
    results = content["results"]
    assert len(results) == count
    if recipe is not estimators:
        rows = results.values()
        losses = [loss for row in rows for name, (loss,) in row.items() if name not in NO_RUN]
        assert all(4 < loss < 7 for loss in losses)  # log 320 = 5.8 at the start
        assert len(set(losses)) > 0.7 * len(losses)
    assert (out / "report.md").read_text().count("\n| ") == count + 1
    before = {path: path.stat().st_mtime_ns for path in (out / "trainings").rglob("*")}
    assert recipe.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "trainings").rglob("*")}


def test_a_study_is_of_as_many_seeds_as_asked(tmp_path, capsys):
    def one_seed(setting, _folder):
        return {"row": {"loss": 1.0 + setting.seed, "bytes": 8}, "other": {"loss": 2.0}}

    assert study.main("", "A study", one_seed, ["--seed", "3", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"]["row"] == {
        "loss": [4.0, 5.0],
        "bytes": [8, 8],
    }
    assert "| row | 4.500 ± 0.707 | 8 |" in (tmp_path / "report.md").read_text()
    assert study.main("", "A study", one_seed, ["--seeds", "0"]) == 2
    assert "1 or more of them" in capsys.readouterr().err
    for out in (tmp_path / "report.md", "/proc/no", "/proc"):
        assert study.main("", "A study", one_seed, ["--out", str(out)]) == 2
        assert "nothing can be written there" in capsys.readouterr().err


@pytest.mark.slow
def test_sparse_targets_of_a_real_model_point_where_the_whole_distribution_points(tmp_path):
    """A head with draws beats a top-K of more bytes, and its angle falls with the positions; a top-K's does not.

    The table is OUT/report.md; docs/ki-cache.md has it from longer training.
    """
    preset = tmp_path / "preset.toml"
    preset.write_text('extends = "demo"\n[text]\nmax_bytes = 600_000\nheld_out_tokens = 4096\n[training]\nsteps = 80\n')
    assert estimators.main(["--preset", str(preset), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    angles = {name: [row["1024"][0], row["4096"][0]] for name, row in results.items()}
    for draws, top_k in (("16 exact, 12 draws", "28"), ("4 exact, 6 draws", "10")):
        for name, row in results.items():
            if name.startswith(f"top-{top_k}"):
                assert results[draws]["bytes"] < row["bytes"]
                assert angles[draws][1] < 0.5 * angles[name][1]
        assert angles[draws][1] < 0.8 * angles[draws][0]
    assert angles["top-28, bucket"][1] > 0.9 * angles["top-28, bucket"][0]


def test_what_decides_a_training_decides_where_it_is_kept(tmp_path):
    setting, rows = load_preset("miniature"), np.arange(320, dtype=np.int32).reshape(10, 32)
    other = rows.copy()
    other[5, :2] = other[5, 1::-1]  # of the same sum
    lab = Lab(setting, tmp_path, train_tokenizer(["one text"], 320), {"text": rows})
    teacher, another = (Checkpoint(tmp_path / name, name) for name in ("teacher", "another"))
    start = fresh(setting, setting.initial)
    job = lab.job("a", start, {"text": rows}, learning_rate=1e-3, teachers=(teacher,), knowledge={"alpha": 1.0})
    larger = dataclasses.replace(setting.text, vocab_size=640)
    plan = growlib.plan(start.config, {"num_hidden_layers": 2})
    in_two_orders = [{"text": rows, "code": other}, {"code": other, "text": rows}]
    others = {
        "start": [
            fresh(setting, setting.target),
            fresh(dataclasses.replace(setting, model="gpt2"), setting.initial),
            fresh(dataclasses.replace(setting, text=larger), setting.initial),
            Continued(teacher),
            Grown(teacher, start.config, "lossless", setting.learned),
            Grown(another, start.config, "lossless", setting.learned),
            Grown(teacher, start.config, "stack", setting.learned),
            Grown(teacher, start.config, "ligo", setting.learned),
            Grown(teacher, start.config, "ligo", dataclasses.replace(setting.learned, steps=5)),
        ],
        "blocks": [{"text": other}, {"text": rows.reshape(20, 16)}, {"code": rows}, *in_two_orders],
        "held_out": [{"text": other}, *in_two_orders],
        "tokenizer": [train_tokenizer(["another text"], 320)],
        "training": [dataclasses.replace(job.training, **fields) for fields in ({"steps": 5}, {"batch_size": 4})],
        "learning_rate": [2e-3],
        "seed": [1],
        "order": [1],
        "masking": [Masking(1, 0.15), Masking(1, 0.3), Masking(2, 0.15)],
        "teachers": [(another,), (teacher, another), (another, teacher), {"text": teacher}, {"0": teacher}, ()],
        "knowledge": [{"alpha": 0.5}, {"alpha": 1.0, "gate": True}],
        "keeps_model": [False],
        "growths": [
            *(GrowthSchedule({step: {"num_hidden_layers": layers}}) for step, layers in ((1, 2), (2, 2), (1, 3))),
            GrowthSchedule({1: {"num_hidden_layers": 2}, 2: {"num_hidden_layers": 3}}),
            GrowthSchedule({1: {"num_hidden_layers": 2}}, "stack"),
            GrowthSchedule({1: {"num_hidden_layers": 2}}, moments="reset"),
            GrowthSchedule({1: {"num_hidden_layers": 2}}, rewarm=Rewarm(steps=2)),
            GrowthSchedule({1: {"num_hidden_layers": 2}}, seed=1),
        ],
        "aid": [
            *(Aid(plan, new=rate) for rate in (2.0, Rewarm(steps=2), Rewarm(steps=3))),
            *(
                Aid(plan, **changed)
                for changed in ({"old": 0.5}, {"decays_new": False}, {"mup": True}, {"frozen": True})
            ),
        ],
    }
    assert set(others) == {field.name for field in dataclasses.fields(Job)} - {"name"}
    jobs = [dataclasses.replace(job, **{name: value}) for name, values in others.items() for value in values]
    assert len({place(one, tmp_path) for one in (job, *jobs)}) == 1 + len(jobs)
    # Where a teacher lies decides nothing, nor does what a method that learns nothing would learn.
    moved = dataclasses.replace(job, teachers=(Checkpoint(tmp_path / "elsewhere", "teacher"),))
    assert place(moved, tmp_path) == place(job, tmp_path)
    grown = [Grown(teacher, start.config, "stack", dataclasses.replace(setting.learned, steps=n)) for n in (5, 6)]
    assert len({place(dataclasses.replace(job, start=one), tmp_path) for one in grown}) == 1


def test_a_changed_file_is_read_anew(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    fields = {"source": str(source), "vocab_size": 300, "sequence_length": 8}
    setting = dataclasses.replace(load_preset("miniature").text, **fields)
    for number in range(40):
        (source / f"{number}.py").write_text(f'"""{f"Some words of file {number:02d}. " * 5}"""\nx = {number}\n')
    code_and_prose(setting, out)
    for path in source.iterdir():
        path.write_text(path.read_text().replace("words", "verse"))
    prose = code_and_prose(setting, out)["prose"]
    assert "verse" in prose.tokenizer.decode(prose.train.ravel())
    with pytest.raises(GrowError, match=f"{source}, its code and prose: too little text .* Valid: more Python"):
        code_and_prose(dataclasses.replace(setting, sequence_length=400), out)


@pytest.mark.parametrize(
    ("recipe", "toml", "says"),
    [
        (estimators, "[text]\nheld_out_tokens = 992\n", "992 tokens are held out .* Valid: 1024 or more"),
        (generations, '[text]\nsource = "no"\n', "^error: the text no: there is no such file or folder"),
    ],
)
def test_what_a_study_cannot_do_is_refused(recipe, toml, says, tmp_path, capsys):
    (tmp_path / "preset.toml").write_text(f'extends = "miniature"\n{toml}')
    assert recipe.main(["--preset", str(tmp_path / "preset.toml"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(says, capsys.readouterr().err, flags=re.MULTILINE)


def test_code_and_prose_are_told_apart():
    docstring = "Says what it is, in more than eighty characters, so that it is long enough to be kept as prose."
    code, prose = split(f'"""{docstring}"""\n\nx = 1\n\n\ndef f():\n    """Short."""\n    return "not a docstring"\n')
    assert prose == docstring
    assert "Says" not in code
    assert "Short" not in code
    assert "not a docstring" in code
    assert split("def broken(:") is None


@pytest.mark.filterwarnings("ignore")  # of trl
def test_the_benchmark_runs(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench_ki.main(["--sizes", "tiny", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert len(report["loss"]) == 9
    assert len(report["step"]) == 6
    assert all(
        row["seconds"] > 0 and row["peak_bytes"] > 0 for part in ("loss", "step") for row in report[part].values()
    )
    assert report["reading"]["positions_per_second"] > 0
    assert "from a cache" in capsys.readouterr().out


@pytest.mark.slow
def test_a_benchmark_of_the_head_alone_ends_at_its_limit(tmp_path, monkeypatch):
    """The loss is measured once, and neither a step nor the reading of a cache."""
    rounds = []
    head = dataclasses.replace(bench_ki.SIZES["tiny"], layers=0, steps=0, rounds=5)
    monkeypatch.setitem(bench_ki.SIZES, "tiny", head)
    monkeypatch.setattr(bench_ki, "ratios", lambda seconds: rounds.append(seconds) or {})
    assert bench_ki.main(["--sizes", "tiny", "--limit", "0", "--out", str(tmp_path / "bench.json")]) == 0
    assert {len(times) for times in rounds[0].values()} == {1}
    assert json.loads((tmp_path / "bench.json").read_text()).keys() == {"sizes", "environment", "loss"}


def test_the_chunked_arm_of_the_benchmark_runs_under_autocast(tmp_path):
    """As the forward pass of the other arms."""
    seen, student = [], llama(0)
    student.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    bench_ki.ChunkedTrainer(model=student, args=arguments(tmp_path, bf16=True), train_dataset=examples(8)).train()
    assert seen == [True]


def test_a_benchmark_that_cannot_be_written_does_not_begin(tmp_path, monkeypatch, capsys):
    def stop(_sizes, _folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_ki, "bench_reading", stop)
    (tmp_path / "file").touch()
    for out, says in ((tmp_path, "it is no file"), (tmp_path / "file" / "bench.json", "nothing can be written")):
        assert bench_ki.main(["--sizes", "tiny", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert bench_ki.main(["--sizes", "tiny", "--out", str(tmp_path / "new" / "bench.json")]) == STOPPED
    assert "Stopped. Nothing is kept." in capsys.readouterr().err


def test_the_most_memory_at_once_is_counted():
    """Of what is made and kept, not of what was there, not of views."""
    there = torch.zeros(1000)

    def work():
        for _ in range(3):
            one = there + 1  # 4000 bytes
            two = one.double()  # 8000
            two.view(10, 100).add_(1)
            there.mul_(2)
            del one, two

    assert peak_bytes(work) == 12000


def test_a_teacher_that_knows_nothing_is_label_smoothing(tmp_path):
    """Up to a constant, in the values and in the gradients."""
    lab = Lab(load_preset("miniature"), tmp_path, train_tokenizer(["one text"], 320), {})
    teacher = type(llama()).from_pretrained(student_factors.uniform(lab).path, trust_remote_code=False)
    rows = torch.arange(12).reshape(2, 6)
    known = teacher(input_ids=rows).logits.double()
    ours = torch.randn(known.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    smoothed = torch.nn.functional.cross_entropy(ours.flatten(0, 1), rows.flatten(), label_smoothing=0.2)
    (wanted,) = torch.autograd.grad(smoothed, ours)
    taught = growlib.ki.ki_loss(ours, rows, known, alpha=0.2).loss
    (found,) = torch.autograd.grad(taught, ours)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(smoothed - taught, torch.tensor(0.2 * np.log(320)))


def test_other_batches_are_as_many_tokens():
    setting = load_preset("tokens")
    for factor in student_factors.BATCHES.values():
        other = student_factors.with_batches(setting, factor)
        assert other.training.batch_size == factor * setting.training.batch_size
        tokens = [each.training.steps * each.training.batch_size for each in (setting, other)]
        assert tokens[0] == tokens[1]
        assert other.learning_rate["knowledge"] == pytest.approx(setting.learning_rate["knowledge"] * factor**0.5)
