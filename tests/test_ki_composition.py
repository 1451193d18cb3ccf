"""Knowledge Inheritance with other losses, trainers and processes, and the students that it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ki_tiny import (
    VOCAB,
    arguments,
    bert,
    collate,
    examples,
    half,
    llama,
    parameters,
    shifted,
    t5,
    train,
)
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from transformers.trainer_pt_utils import LabelSmoother

import growlib
from growlib import GrowError, KIConfig, KIMixin, KITrainer
from growlib.ki import ki_loss


def label_count(rows, align):
    return int((align(collate(rows)["labels"]) != -100).sum())


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_label_smoothing_replaces_the_cross_entropy(tmp_path, micro_batches):
    student, teacher, rows = llama(0), llama(1, hidden=8), examples(8)
    batch = collate(rows)
    outputs = student(**batch)
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    kd = ki_loss(outputs.logits, shifted(batch["labels"]), teacher_logits, alpha=1.0).loss
    smoothed = LabelSmoother(epsilon=0.2)(outputs, batch["labels"], shift_labels=True)
    gradients = torch.autograd.grad(0.5 * smoothed + 0.5 * kd, list(student.parameters()))
    expected = parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    train(
        tmp_path,
        student,
        half(teacher),
        rows,
        label_smoothing_factor=0.2,
        per_device_train_batch_size=8 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_function_of_the_user_replaces_the_cross_entropy(tmp_path):
    def squared_logits(outputs, labels, num_items_in_batch):
        return outputs.logits.square().sum() / num_items_in_batch

    student, teacher, rows = llama(0), llama(1, hidden=8), examples(8)
    batch = collate(rows)
    logits, aligned = student(**batch).logits, shifted(batch["labels"])
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    kd = ki_loss(logits, aligned, teacher_logits, alpha=1.0).loss
    own = logits.square().sum() / label_count(rows, shifted)
    gradients = torch.autograd.grad(0.5 * own + 0.5 * kd, list(student.parameters()))
    expected = parameters(student) - 0.01 * torch.cat([g.reshape(-1) for g in gradients])
    train(
        tmp_path,
        student,
        half(teacher),
        rows,
        trainer_options={"compute_loss_func": squared_logits},
        learning_rate=0.01,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    torch.testing.assert_close(parameters(student), expected, rtol=1e-4, atol=1e-6)


def test_the_mixin_works_on_a_trainer_with_a_constructor_and_loss_of_its_own(tmp_path):
    class FineTuner(Trainer):
        def __init__(self, *args, scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale, self.seen = scale, []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["use_cache"] = False
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.seen.append(outputs.logits.shape)
            return (self.scale * loss, outputs) if return_outputs else self.scale * loss

    class TaughtFineTuner(KIMixin, FineTuner):
        pass

    student, rows = llama(0), examples(8)
    options = {"trainer_class": TaughtFineTuner, "trainer_options": {"scale": 1.0}}
    trainer = train(tmp_path, student, half(llama(1, hidden=8)), rows, **options)
    expected = llama(0)
    train(tmp_path, expected, half(llama(1, hidden=8)), rows)
    torch.testing.assert_close(parameters(student), parameters(expected), rtol=1e-5, atol=1e-6)
    assert trainer.seen[-1] == (8, 10, VOCAB)


def test_a_micro_batch_without_labels_changes_nothing(tmp_path):
    rows = examples(2)
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows]
    for maker in (llama, bert):
        student = maker(0)
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
        trainer = train(tmp_path, student, half(maker(1, hidden=8)), rows + empty, logging_strategy="steps", **options)
        assert parameters(student).isfinite().all()
        assert all(torch.tensor(value).isfinite() for value in trainer.state.log_history[0].values())


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    script = Path(__file__).with_name("ki_two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
            tmp_path,
        ],
        env=environment,
        check=True,
        timeout=300,
    )
    alone = llama(0)
    trainer = train(
        tmp_path / "one",
        alone,
        KIConfig(teacher=llama(1, hidden=8), stop_at="auto", temperature=2.0),
        examples(16),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_strategy="steps",
        logging_steps=1,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"eval_dataset": examples(8, seed=5)},
    )
    both = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(both["parameters"], parameters(alone), rtol=1e-5, atol=1e-6)
    assert any("ki/student_held_out" in log for log in both["logs"])
    for two, one in zip(both["logs"], trainer.state.log_history, strict=True):
        names = [name for name in one if name.startswith("ki/") or name in ("loss", "eval_loss")]
        assert [two.get(name) for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


def mixture_of_experts(weight=0.3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=2, output_router_logits=True, num_experts_per_tok=1,
        router_aux_loss_coef=weight, initializer_range=0.3, **sizes,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class WholeLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class TaughtByLogits(KIMixin, WholeLogits): ...


@pytest.mark.parametrize("kind", [KITrainer, TaughtByLogits])
def test_an_auxiliary_loss_is_added_whatever_alpha_is(tmp_path, kind):
    """(1 - α) CE + α KL + weight · auxiliary, value and gradient and logs, from the head and from whole logits."""
    student, teacher, batch = mixture_of_experts(), llama(1), collate(examples(4))
    ki = KIConfig(teacher=teacher, alpha=0.6, schedule="constant", stop_at=None)
    taught = kind(model=student, args=arguments(tmp_path), train_dataset=examples(4), data_collator=collate, ki=ki)
    student.train()
    loss = taught.compute_loss(student, dict(batch))
    outputs = student(**batch)
    added = 0.3 * outputs.aux_loss
    assert added > 0.1
    of_teacher = teacher(input_ids=batch["input_ids"]).logits.detach()
    expected = ki_loss(outputs.logits[:, :-1], batch["labels"][:, 1:], of_teacher[:, :-1], alpha=0.6)
    torch.testing.assert_close(loss, expected.loss + added)
    both = [torch.autograd.grad(one, list(student.parameters())) for one in (loss, expected.loss + added)]
    for mine, twin in zip(*both, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6)
    logs = taught._ki_metrics.drain(taught.accelerator)
    found = [logs[name] for name in ("ki/ce", "ki/kd", "ki/aux")]
    assert found == pytest.approx([expected.ce.item(), expected.kd.item(), added.item()], rel=1e-5)


@pytest.mark.parametrize("kind", [KITrainer, TaughtByLogits])
def test_micro_batches_add_their_auxiliary_loss_as_the_trainer_does(tmp_path, kind):
    """A teacher that is all but silent leaves the stock Trainer's steps."""
    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    ki = KIConfig(teacher=llama(1), alpha=1e-9, schedule="constant", stop_at=None)
    students = [mixture_of_experts() for _ in range(2)]
    train(tmp_path, students[0], ki, examples(16), kind, **options)
    train(tmp_path, students[1], None, examples(16), Trainer, **options)
    torch.testing.assert_close(*map(parameters, students), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [KITrainer, TaughtByLogits])
def test_an_auxiliary_loss_of_unknown_weight_is_refused(tmp_path, kind):
    student = mixture_of_experts()
    student.config.router_aux_loss_coef = 0.4  # what it adds has 0.3
    with pytest.raises(GrowError, match="auxiliary"):
        train(tmp_path, student, half(llama(1)), examples(8), kind)


def test_a_student_without_logits_is_refused(tmp_path):
    class Fused(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            outputs["logits"] = None
            return (loss, outputs) if return_outputs else loss

    class TaughtFused(KIMixin, Fused):
        pass

    with pytest.raises(GrowError, match="no logits"):
        train(tmp_path, llama(0), half(llama(1)), examples(8), trainer_class=TaughtFused)


def test_seq2seq_teacher_gets_the_decoder_inputs_of_the_labels(tmp_path):
    """A teacher equal to the student: zero divergence only if both decode from the same inputs."""
    options = {"logging_strategy": "steps", "logging_steps": 1}
    rows = examples(4, ignored=False)
    trainer = train(tmp_path, t5(0), half(t5(0)), rows, per_device_train_batch_size=4, **options)
    log = trainer.state.log_history[0]
    assert log["ki/kd"] == pytest.approx(0.0, abs=1e-6)
    assert log["ki/teacher_ce"] == pytest.approx(log["ki/ce"], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("better", [False, True])
def test_a_teacher_that_says_what_its_student_says_is_named(tmp_path, caplog, better, steps):
    small = llama(0)
    big = growlib.expand(small, {"hidden_size": 2 * small.config.hidden_size})
    teacher = llama(1) if better else small
    train(
        tmp_path,
        big,
        KIConfig(teacher=teacher),
        examples(8),
        max_steps=steps,
        logging_strategy="steps",
        logging_steps=1,
    )
    assert caplog.text.count("This teacher adds nothing") == (not better)
