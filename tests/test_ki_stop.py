"""The teacher that leaves by itself: `stop_at="auto"`."""

import logging

import pytest
import torch
from ki_tiny import MAKERS, arguments, collate, examples, llama, parameters, train
from transformers import TrainerCallback

import growlib
from growlib import GrowError, KIConfig, KITrainer, cache_teacher


@pytest.mark.parametrize("source", ["online", "cache"])
def test_auto_leaves_the_teacher_when_the_student_has_passed_it(tmp_path, source):
    """A random teacher is passed soon; a resumed run remembers."""
    rows, teacher = examples(16, ignored=False), llama(1, hidden=8)
    held_out = examples(16, ignored=False)
    if source == "cache":
        cache_teacher(teacher, rows, tmp_path / "cache", data_collator=collate, held_out=held_out)
    ki = KIConfig(teacher=tmp_path / "cache" if source == "cache" else teacher, stop_at="auto", alpha=0.5)
    options = {
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 10,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "trainer_options": {"eval_dataset": held_out},
        "learning_rate": 0.5,
    }
    student = llama(0)
    trainer = train(tmp_path, student, ki, rows, **options)
    logs = trainer.state.log_history
    with torch.no_grad():
        teacher_loss = teacher(**collate(held_out)).loss.item()
    stopped = [log["step"] for log in logs if "ki/stopped" in log]
    assert len(stopped) == 1
    assert 2 <= stopped[0] < 10
    evaluated = {log["step"]: log["eval_loss"] for log in logs if "eval_loss" in log}
    assert all((evaluated[step] <= teacher_loss) == (step == stopped[0]) for step in evaluated if step <= stopped[0])
    known = next(log["ki/teacher_held_out"] for log in logs if "ki/teacher_held_out" in log)
    assert known == pytest.approx(teacher_loss, rel=1e-4)
    alphas = {log["step"]: log["ki/alpha"] for log in logs if "ki/alpha" in log}
    assert all((alphas[step] > 0) == (step <= stopped[0]) for step in alphas)
    resumed = llama(0)
    again = train(tmp_path, resumed, ki, rows, resume=str(tmp_path / "checkpoint-10"), **options)
    assert torch.equal(parameters(resumed), parameters(student))
    assert [log["ki/alpha"] for log in again.state.log_history if log["step"] > 10 and "ki/alpha" in log] == [0.0, 0.0]


@pytest.mark.parametrize("rounding", [-1e-5, 1e-5])
def test_auto_leaves_at_once_where_the_student_grew_from_its_teacher(tmp_path, rounding):
    """Their losses are the same but for rounding, whose sign is luck."""
    rows, teacher = examples(16, ignored=False), llama(0)
    student = growlib.expand(teacher, {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3})
    with torch.no_grad():
        student.lm_head.weight.mul_(1 + rounding)
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    ki = KIConfig(teacher=teacher, stop_at="auto")
    trainer = train(tmp_path, student, ki, rows, trainer_options={"eval_dataset": rows}, **options)
    assert [log["step"] for log in trainer.state.log_history if "ki/stopped" in log] == [0]


def test_auto_compares_the_tokens_of_all_held_out_sets(tmp_path):
    rows, teacher = examples(16, ignored=False), llama(1, hidden=8)
    sets = {"code": examples(12, ignored=False), "prose": examples(4, seed=2, ignored=False)}
    trainer = train(
        tmp_path,
        llama(0),
        KIConfig(teacher=teacher, stop_at="auto", alpha=0.5),
        rows,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.5,
        trainer_options={"eval_dataset": sets},
    )
    merged: dict[int, dict[str, float]] = {}
    for log in trainer.state.log_history:
        merged.setdefault(log["step"], {}).update(log)
    (stopped,) = [step for step, log in merged.items() if "ki/stopped" in log]
    assert 1 <= stopped < 6
    with torch.no_grad():
        of_teacher = [teacher(**collate(held_out)).loss.item() for held_out in sets.values()]
    expected = (3 * of_teacher[0] + of_teacher[1]) / 4
    for step in range(1, stopped + 1):
        log = merged[step]
        student = (3 * log["eval_code_loss"] + log["eval_prose_loss"]) / 4
        assert log["ki/teacher_held_out"] == pytest.approx(expected, rel=1e-4)
        assert log["ki/student_held_out"] == pytest.approx(student, rel=1e-4)
        assert (student <= expected) == (step == stopped)


@pytest.mark.parametrize(("name", "smoothing"), [*((name, 0.0) for name in MAKERS), ("llama", 0.2), ("bert", 0.2)])
def test_auto_measures_both_models_alike(tmp_path, name, smoothing):
    """Whatever the trainer's own loss is, of ragged batches too: a teacher that is the student is as good."""
    trainer = train(
        tmp_path,
        MAKERS[name](0),
        KIConfig(teacher=MAKERS[name](0), stop_at="auto"),
        examples(8),
        learning_rate=0.0,
        label_smoothing_factor=smoothing,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=3,
        trainer_options={"eval_dataset": examples(8, seed=5)},
    )
    logs = [log for log in trainer.state.log_history if "ki/student_held_out" in log]
    assert len(logs) >= 1
    for log in logs:
        assert log["ki/student_held_out"] == pytest.approx(log["ki/teacher_held_out"], rel=1e-5)


def test_auto_does_not_look_at_other_text(tmp_path):
    class Curious(TrainerCallback):
        trainer: KITrainer

        def on_step_begin(self, *_, **__):
            self.trainer.evaluate(examples(8, seed=9))

    held_out, curious = examples(8, ignored=False), Curious()
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    trainer = KITrainer(
        model=llama(0),
        args=arguments(tmp_path, **options),
        train_dataset=held_out,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[curious],
        ki=KIConfig(teacher=llama(1), stop_at="auto"),
    )
    curious.trainer = trainer
    trainer.train()
    with torch.no_grad():
        expected = llama(1)(**collate(held_out)).loss.item()
    logged = [log["ki/teacher_held_out"] for log in trainer.state.log_history if "ki/teacher_held_out" in log]
    assert logged == [pytest.approx(expected, rel=1e-4)]


def test_auto_needs_labels_in_the_held_out_text(tmp_path):
    unlabelled = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in examples(4)]
    options = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": unlabelled}}
    with pytest.raises(GrowError, match="no label that counts"):
        train(tmp_path, llama(0), KIConfig(teacher=llama(1), stop_at="auto"), examples(8), **options)


def test_auto_needs_held_out_text(tmp_path, caplog):
    ki = KIConfig(teacher=llama(1), stop_at="auto")
    with pytest.raises(GrowError, match="no held-out text"):
        KITrainer(model=llama(0), args=arguments(tmp_path), ki=ki)
    with caplog.at_level(logging.WARNING, "growlib"):
        KITrainer(model=llama(0), args=arguments(tmp_path), eval_dataset=examples(4), ki=ki)
    assert "no eval_strategy" in caplog.text


def test_auto_needs_a_known_held_out_loss(tmp_path):
    cache_teacher(llama(1), examples(8), tmp_path / "cache", data_collator=collate)
    for teacher in (tmp_path / "cache", (llama(1), llama(2))):
        with pytest.raises(GrowError, match="held-out loss is not known"):
            KITrainer(model=llama(0), args=arguments(tmp_path), ki=KIConfig(teacher=teacher, stop_at="auto"))
