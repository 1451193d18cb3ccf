"""Fine-tuning on tasks of the standard library: whose files they are, how a rate is chosen, what an accuracy is."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import downstream as recipe
from base import classify
from base.classify import FineTuning, Rows, accuracy
from base.comparison import ARMS
from base.lab import fresh
from base.presets import load_preset
from base.snippets import Task, packages, tasks, write_files
from base.text import read_files, train_tokenizer

PRESET = (
    'extends = "miniature"\n[text]\nmax_bytes = 150_000\n[training]\nsteps = 4\nwarmup_steps = 1\nevaluations = 1\n'
)
DOCSTRING = "Says what the function does, in more than eighty characters, of file {0} {0} {0} {0} {0} {0} {0} {0}."
MINIATURE = load_preset("miniature")


def source(package, number):
    """A file whose every line names it."""
    mark = f"{package}{number:02d}"
    lines = "\n".join(f"    value_{i} = '{mark} {mark}'" for i in range(20))
    return f'def f():\n    """{DOCSTRING.format(mark)}"""\n{lines}\n'


@pytest.fixture(scope="module")
def made():
    """Files of two packages, a tokenizer, and the tasks."""
    files = {name: {f"{name}/{i}.py": source(name, i) for i in range(8)} for name in ("ham", "spam")}
    tokenizer = train_tokenizer([text for of_package in files.values() for text in of_package.values()], 300)
    setting = dataclasses.replace(MINIATURE.downstream, length=16, train=40, judged=20)
    return files, tokenizer, tasks(files, setting, tokenizer)


def test_no_file_gives_snippets_to_two_parts(made):
    _, tokenizer, both = made
    for task in both:
        origins = {}
        for part, (ids, _) in task.parts.items():
            texts = " ".join(tokenizer.batch_decode(ids))
            origins[part] = {
                f"{name}{i:02d}" for name in ("ham", "spam") for i in range(8) if f"{name}{i:02d}" in texts
            }
        assert origins.keys() == {"train", "choice", "test"}
        assert all(origins.values())
        assert len(set.union(*origins.values())) == sum(map(len, origins.values()))
    # A file is in the same part in both tasks: what teaches one does not judge the other.
    assert len(origins["train"]) > len(origins["test"])


def test_a_snippet_has_the_class_of_its_file(made):
    _, tokenizer, (package, kind) = made
    assert package.classes == ("ham", "spam")
    assert kind.classes == ("code", "docstring")
    for part, number in (("train", 40), ("choice", 20), ("test", 20)):
        ids, labels = package.parts[part]
        assert ids.shape == (number, 16)
        assert np.bincount(labels).tolist() == [number // 2, number // 2]
        assert len({tuple(row) for row in ids}) > number // 2
        for row, label in zip(tokenizer.batch_decode(ids), labels, strict=True):
            assert "spam" not in row if label == 0 else "ham" not in row
        ids, labels = kind.parts[part]
        assert len(set(np.bincount(labels))) == 1
        for row, label in zip(tokenizer.batch_decode(ids), labels, strict=True):
            assert ("value" in row or "'" in row) == (label == 0)


def test_the_files_of_the_task_are_no_text_of_the_pre_training(tmp_path):
    chosen, others = packages(4)
    assert len(chosen) == 4
    inside = {text for of_package in chosen.values() for text in of_package.values()}
    smallest = min(map(len, chosen.values()))
    left = {}
    for name in others:
        left.setdefault(name.partition("/")[0], []).append(name)
    assert all(len(names) <= smallest for name, names in left.items())
    written = read_files(str(write_files(others, tmp_path)))
    assert len(written) == len(others) > 100
    assert not inside & set(written)


def test_an_accuracy_is_the_share_of_right_answers():
    def model(input_ids):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids[:, 0], 3))

    model.eval, model.device = lambda: None, "cpu"
    ids = np.array([[0, 9], [1, 9], [2, 9], [1, 9]])
    assert accuracy(model, (ids, np.array([0, 1, 2, 1]))) == 1.0
    assert accuracy(model, (ids, np.array([0, 1, 1, 2]))) == 0.5


def test_a_class_is_read_at_the_last_token(made):
    _, tokenizer, (package, _) = made
    setting = MINIATURE
    wanted = FineTuning(
        fresh(setting, setting.initial), package, tokenizer, setting.downstream, setting.training, 1e-3, 0
    )
    model = wanted.model().eval()
    ids = torch.from_numpy(package.parts["test"][0][:4]).clone()
    ids[0, -1] = tokenizer.eos_token_id
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, -1]
        assert torch.allclose(model(input_ids=ids).logits, model.score(hidden), atol=1e-6)
    assert model.config.num_labels == 2
    again = wanted.model().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_fine_tuning_sees_every_snippet_in_each_turn():
    rows = Rows((np.arange(6).reshape(6, 1), np.arange(6)), number=12, seed=1)
    seen = [row["labels"].item() for row in (rows[i] for i in range(12))]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]
    assert [rows[i]["input_ids"].item() for i in range(12)] == seen


def test_the_rate_is_chosen_on_other_files_than_the_accuracy(made, tmp_path, monkeypatch):
    _, tokenizer, (package, _) = made
    found = {1e-3: {"choice": 0.6, "test": 0.3}, 4e-3: {"choice": 0.5, "test": 0.9}}
    monkeypatch.setattr(classify, "run", lambda wanted, folder: found[wanted.learning_rate])
    prepared = SimpleNamespace(
        setting=MINIATURE, corpus=SimpleNamespace(tokenizer=tokenizer), lab=SimpleNamespace(folder=tmp_path)
    )
    start = fresh(MINIATURE, MINIATURE.initial)
    assert recipe.fine_tuned(prepared, start, package) == {"package": 0.3, "package, rate": 1e-3}


def test_what_decides_a_fine_tuning_decides_where_it_is_kept(made, tmp_path, monkeypatch):
    _, tokenizer, (package, kind) = made
    start = fresh(MINIATURE, MINIATURE.initial)
    one = FineTuning(start, package, tokenizer, MINIATURE.downstream, MINIATURE.training, 1e-3, 0)
    others = [
        dataclasses.replace(one, **changed)
        for changed in (
            {"start": fresh(MINIATURE, MINIATURE.target)},
            {"task": kind},
            {"task": Task("package", package.classes, {**package.parts, "train": package.parts["test"]})},
            {"downstream": dataclasses.replace(MINIATURE.downstream, steps=9)},
            {"training": dataclasses.replace(MINIATURE.training, weight_decay=0.0)},
            {"learning_rate": 2e-3},
            {"seed": 1},
        )
    ]
    trained = []
    monkeypatch.setattr(classify, "_trained", trained.append)
    monkeypatch.setattr(classify, "accuracy", lambda model, snippets: len(trained) / 10)
    results = [classify.run(wanted, tmp_path) for wanted in (one, *others, one)]
    assert trained == [one, *others]
    assert results[0] == results[-1] == {"choice": 0.1, "test": 0.1}


@pytest.mark.slow
def test_every_arm_is_fine_tuned_and_a_second_run_uses_its_models(tmp_path):
    (tmp_path / "preset.toml").write_text(PRESET)
    arguments = ["--preset", str(tmp_path / "preset.toml"), "--out", str(tmp_path / "out")]
    assert recipe.main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(results) == [recipe.NEVER, *ARMS]
    for row in results.values():
        assert list(row) == [
            "held-out loss", "package", "package, rate", "docstring or code", "docstring or code, rate"
        ]  # fmt: skip
        assert all(0 <= row[name][0] <= 1 for name in ("package", "docstring or code"))
        assert row["package, rate"][0] in MINIATURE.downstream.learning_rates
    losses = [row["held-out loss"][0] for row in results.values()]
    assert losses[0] == max(losses)
    assert len(set(losses)) == len(losses)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(list((tmp_path / "out" / "fine-tunings").iterdir())) == len(results) * 2 * 2
    assert recipe.main(arguments) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('extends = "demo"\n', "no section downstream"),
        ('extends = "miniature"\n[text]\nsource = "environment"\n', "the tasks are of the standard library"),
        ('extends = "miniature"\n[downstream]\npackages = 1\n', "1 packages: "),
        ('extends = "miniature"\n[downstream]\npackages = 1000\n', "1000 packages: "),
        ('extends = "miniature"\n[downstream]\nlength = 1_000_000\n', "lacks one for each class"),
    ],
)
def test_bad_input_is_refused_in_one_line(toml, says, tmp_path, capsys):
    (tmp_path / "preset.toml").write_text(toml)
    assert recipe.main(["--preset", str(tmp_path / "preset.toml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said
    assert "Valid: " in said
