"""Knowledge Inheritance inside the Hugging Face Trainer: the step it takes, what it costs, what it logs."""

import sys
import weakref

import pytest
import torch
from ki_tiny import (
    MAKERS,
    CountForwards,
    arguments,
    bert,
    collate,
    examples,
    gpt2,
    half,
    llama,
    parameters,
    sgd_step,
    shifted,
    train,
)
from safetensors.torch import load_file
from test_ki_teacher import predicted
from transformers import Trainer

from growlib import KIConfig, KITrainer
from growlib.ki import guard, ki_loss

ALIGN = {"llama": shifted, "gpt2": shifted, "bert": lambda labels: labels, "t5": lambda labels: labels}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_is_the_hand_written_step(tmp_path, name, temperature):
    student, teacher, rows = MAKERS[name](0), MAKERS[name](1, hidden=8), examples(8)
    expected = sgd_step(student, teacher, rows, ALIGN[name], alpha=0.5, temperature=temperature)
    train(tmp_path, student, half(teacher, temperature=temperature), rows)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_accumulation_takes_the_step_of_one_large_batch(tmp_path, alpha):
    rows, stepped = examples(8), []
    for micro_batches in (1, 4):
        student = llama(0)
        ki = KIConfig(teacher=llama(1, hidden=8), alpha=alpha, temperature=2.0)
        train(
            tmp_path,
            student,
            ki,
            rows,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )
        stepped.append(parameters(student))
    assert (stepped[0] - parameters(llama(0))).abs().max() > 1e-3
    torch.testing.assert_close(stepped[0], stepped[1], rtol=1e-5, atol=1e-6)


def test_accumulation_with_a_model_that_ignores_num_items_scales_as_stock_does(tmp_path):
    """BERT's loss is the micro-batch's mean whatever `num_items_in_batch` says: the KL must follow."""
    rows, options = examples(8), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    sampled = []

    def recording(batch):
        sampled.append(batch)
        return collate(batch)

    start, teacher = bert(0), bert(1, hidden=8)
    updates = {}
    for alpha in (0.0, 0.5):
        sampled.clear()
        student = bert(0)
        trainer = KITrainer(
            model=student,
            args=arguments(tmp_path, **options),
            train_dataset=rows,
            data_collator=recording,
            ki=KIConfig(teacher=teacher, alpha=alpha),
        )
        trainer.train()
        by_hand = sum(
            sgd_step(start, teacher, micro_batch, ALIGN["bert"], alpha=alpha) - parameters(start)
            for micro_batch in sampled[:2]
        )
        updates[alpha] = (parameters(student) - parameters(start), by_hand)
    stock_factor = updates[0.0][0].norm() / updates[0.0][1].norm()
    torch.testing.assert_close(updates[0.5][0], stock_factor * updates[0.5][1], rtol=1e-4, atol=1e-6)


def test_the_denominator_is_the_count_that_stock_gives(tmp_path):
    """GPT-2 declares no loss type, so the Trainer may count labels that no position predicts."""
    counts = []

    class Recording(KITrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            counts.append(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    student, teacher, rows = gpt2(0), gpt2(1, hidden=8), examples(8, ignored=False)
    train(tmp_path, student, half(teacher), rows, trainer_class=Recording)
    expected = sgd_step(gpt2(0), teacher, rows, shifted, alpha=0.5, num_items=counts[0])
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_a_teacher_at_work_training_is_bit_identical_to_stock(tmp_path, alpha):
    rows, teacher = examples(16), llama(1, hidden=8)
    forwards = CountForwards(teacher)
    students = [llama(0), llama(0)]
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    stock = train(tmp_path, students[0], None, rows, trainer_class=Trainer, **options)
    ki = None if alpha is None else KIConfig(teacher=teacher, alpha=alpha)
    taught = train(tmp_path, students[1], ki, rows, **options)
    assert torch.equal(parameters(students[0]), parameters(students[1]))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (stock, taught)]
    assert losses[0] == losses[1]
    assert forwards.count == 0


def test_loading_a_teacher_leaves_the_random_numbers_alone(tmp_path):
    """Every arm of a comparison sees the same data order."""
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    states = []
    for ki in (None, KIConfig(teacher=tmp_path / "teacher")):
        KITrainer(model=llama(0), args=arguments(tmp_path), ki=ki)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_teacher_uses_no_random_numbers(tmp_path):
    """With dropout in both models, the student draws what it would draw alone."""
    states = []
    for ki in (None, KIConfig(teacher=bert(1, dropout=0.5), stop_at=1.0)):
        train(tmp_path, bert(0, dropout=0.5), ki, examples(16), max_steps=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_teacher_stops_and_is_freed_after_stop_at(tmp_path):
    """At once, before Python's garbage collector runs."""
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    trainer = KITrainer(
        model=llama(0),
        args=arguments(tmp_path, max_steps=10, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=examples(40),
        data_collator=collate,
        ki=KIConfig(teacher=tmp_path / "teacher", stop_at=0.3),
    )
    forwards = CountForwards(trainer._ki_provider.teacher.model)
    teacher = weakref.ref(trainer._ki_provider.teacher.model)
    trainer.train()
    # Steps 0, 1, 2 of 10, two micro-batches each; and two passes at the first, to find the teacher's head.
    assert forwards.count == 3 * 2 + 2
    assert teacher() is None


def test_a_second_train_call_has_the_teacher_again(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    student = llama(0)
    ki = KIConfig(teacher=tmp_path / "teacher", stop_at=0.5)
    options = {"max_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    trainer = train(tmp_path, student, ki, examples(8), **options)
    trainer.train()
    assert [log["ki/alpha"] for log in trainer.state.log_history if "loss" in log] == [1.0, 0.0]
    assert "ki/kd" in trainer.state.log_history[0]


def test_resumed_training_equals_uninterrupted(tmp_path):
    """α comes from the global step: resumed at step 4 of 8, with the switch-off at step 6."""
    rows = examples(32)
    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    ki = KIConfig(teacher=llama(1, hidden=8), stop_at=0.75)
    whole, resumed = llama(0), llama(0)
    first = train(tmp_path, whole, ki, rows, **options)
    second = train(tmp_path, resumed, ki, rows, resume=str(tmp_path / "checkpoint-4"), **options)
    assert torch.equal(parameters(whole), parameters(resumed))
    alphas = [[log["ki/alpha"] for log in t.state.log_history if "loss" in log] for t in (first, second)]
    assert alphas[0] == alphas[1] == pytest.approx([1 - step / 6 for step in range(6)] + [0.0, 0.0])

    stock = llama(0)
    train(tmp_path, stock, None, rows, trainer_class=Trainer, resume=str(tmp_path / "checkpoint-6"), **options)
    assert torch.equal(parameters(stock), parameters(whole))


def test_evaluation_reports_the_plain_cross_entropy_without_the_teacher(tmp_path):
    student, teacher, rows = llama(0), llama(1, hidden=8), examples(8)
    forwards = CountForwards(teacher)
    trainer = KITrainer(
        model=student,
        args=arguments(tmp_path, per_device_eval_batch_size=8),
        eval_dataset=rows,
        data_collator=collate,
        ki=KIConfig(teacher=teacher),
    )
    reported = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        plain = student(**collate(rows)).loss.item()
    assert reported == pytest.approx(plain, rel=1e-6)
    assert forwards.count == 0


def test_logs_are_the_means_over_the_logging_window(tmp_path):
    """With a learning rate of 0 every epoch has the same losses: the logs are the data's means."""
    student, teacher, rows = llama(0), llama(1, hidden=8), examples(8)
    trainer = train(
        tmp_path,
        student,
        half(teacher, temperature=2.0),
        rows,
        learning_rate=0.0,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_strategy="steps",
        logging_steps=2,
    )
    batch = collate(rows)
    with torch.no_grad():
        out, teacher_out = student(**batch), teacher(**batch)
    expected = ki_loss(out.logits, shifted(batch["labels"]), teacher_out.logits, alpha=0.5, temperature=2.0)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["ki/alpha"] == 0.5
        assert log["ki/ce"] == pytest.approx(out.loss.item(), rel=1e-5)
        assert log["ki/kd"] == pytest.approx(expected.kd.item(), rel=1e-5)
        assert log["ki/teacher_ce"] == pytest.approx(teacher_out.loss.item(), rel=1e-5)
    assert not any("ki/alpha" in log for log in trainer.state.log_history if "loss" not in log)
    assert trainer._ki_metrics.drain(trainer.accelerator) == {"ki/alpha": 0.5}  # the window was closed


def test_a_step_reads_no_value_back_from_the_device(tmp_path, monkeypatch):
    trainer = train(tmp_path, llama(0), half(llama(1, hidden=8)), examples(8))
    trainer.model.train()

    def spied(name):
        read = getattr(torch.Tensor, name)

        def read_unless_from_growlib(tensor):  # transformers reads its attention masks
            assert "growlib" not in sys._getframe(1).f_globals["__name__"], f"Tensor.{name} inside the step"
            return read(tensor)

        return read_unless_from_growlib

    monkeypatch.setattr(guard, "costs_nothing", lambda _: False)  # as on another device
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, spied(name))
    trainer.compute_loss(trainer.model, collate(examples(4)), num_items_in_batch=torch.tensor(20.0))


def test_teacher_stays_frozen_in_eval_mode_and_outside_the_model(tmp_path):
    student, teacher = bert(0), bert(1, dropout=0.5)
    before = parameters(teacher).clone()
    trainer = train(tmp_path, student, half(teacher), examples(8), max_steps=2)
    teacher.train()
    batch = collate(examples(4))
    first, second = (predicted(trainer, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert not teacher.training
    assert torch.equal(before, parameters(teacher))
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert {id(p) for p in trainer.model_wrapped.parameters()}.isdisjoint(id(p) for p in teacher.parameters())
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(list(student.parameters()))


def test_a_teacher_is_loaded_in_the_dtype_that_is_asked_for(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    ki = KIConfig(teacher=tmp_path / "teacher", teacher_dtype=torch.bfloat16, stop_at=1.0)
    trainer = train(tmp_path, llama(0), ki, examples(8), max_steps=3)
    assert {p.dtype for p in trainer._ki_provider.teacher.model.parameters()} == {torch.bfloat16}


def test_checkpoints_hold_the_student_alone(tmp_path):
    student = llama(0)
    train(tmp_path, student, half(llama(1, hidden=8)), examples(8), save_strategy="steps", save_steps=1)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert set(saved) <= set(student.state_dict())
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    train(tmp_path / "stock", llama(0), None, examples(8), Trainer, save_strategy="steps", save_steps=1)
    assert files == {"ki.json"} | {path.name for path in (tmp_path / "stock" / "checkpoint-1").iterdir()}


def test_bf16_autocast(tmp_path):
    rows, logs = examples(8), {}
    for bf16 in (False, True):
        options = {"bf16": bf16, "logging_strategy": "steps", "logging_steps": 1}
        trainer = train(tmp_path, llama(0), half(llama(1, hidden=8)), rows, **options)
        logs[bf16] = trainer.state.log_history[0]
    for name in ("loss", "ki/ce", "ki/kd", "ki/teacher_ce"):
        assert logs[True][name] == pytest.approx(logs[False][name], rel=0.03)
        assert logs[True][name] != logs[False][name]


def test_columns_that_the_student_does_not_take_are_removed(tmp_path):
    rows = [{**row, "note": "not a tensor"} for row in examples(8)]
    expected = llama(0)
    train(tmp_path, expected, half(llama(1, hidden=8)), examples(8))
    student = llama(0)
    train(tmp_path, student, half(llama(1, hidden=8)), rows, remove_unused_columns=True)
    assert torch.equal(parameters(student), parameters(expected))


def test_shift_labels_are_used_as_they_are(tmp_path):
    """They also ignore what `labels` does not: the boundaries of packed documents."""
    rows = [{**row, "shift_labels": shifted(row["labels"][None])[0]} for row in examples(8)]
    for row in rows:
        row["shift_labels"][6] = -100
    student, teacher = llama(0), llama(1, hidden=8)
    shift_labels = collate(rows)["shift_labels"]
    expected = sgd_step(student, teacher, rows, lambda labels: shift_labels, alpha=0.5)
    train(tmp_path, student, half(teacher), rows, remove_unused_columns=False)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)
