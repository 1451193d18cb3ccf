"""Two CPU processes that share a vocabulary, or the examples, against one that has all of them."""

import pytest
import torch
from ki_tiny import collate, examples, llama, train
from test_ki_distributed import two_processes

from growlib import KIConfig, cache_teacher

EACH_STEP = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 3}
IN_ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
HALF = {"schedule": "constant", "stop_at": None, "alpha": 0.5}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": {"eval_dataset": examples(8, seed=5)}}


def student(vocab=32, tied=False, seed=0, hidden=16):
    return llama(seed, hidden, vocab, num_key_value_heads=2, tie_word_embeddings=tied).double()


def assert_steps_of_one(found, folder, model, ki, options):
    """The same parameters, and what is logged of the loss, of the run by two processes and by this one."""
    trainer = train(folder / "alone", model, ki, examples(16), **options)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["parameters"][name], parameter.detach(), rtol=1e-9, atol=1e-10)
    logs = [log for log in trainer.state.log_history if "train_runtime" not in log]
    assert any("ki/kd" in log for log in logs)
    for two, one in zip(found["logs"], logs, strict=False):
        names = [name for name in one if name.startswith("ki/") or name in ("loss", "eval_loss", "grad_norm")]
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-6)


def test_a_split_vocabulary_gives_the_same_loss_and_gradients(tmp_path):
    two_processes("ki_vocabulary_parallel.py", tmp_path, leaves=None)


@pytest.mark.slow
def test_tensor_parallel_students_take_the_steps_of_one(tmp_path):
    """An odd vocabulary, tied embeddings, a loss from whole logits; a teacher beside, split as well, or cached."""
    makers = {"plain": student(33), "tied": student(tied=True)}
    for name, model in makers.items():
        model.save_pretrained(tmp_path / name)
    teacher = student(seed=1, hidden=8)
    teacher.save_pretrained(tmp_path / "teacher")
    rows, cache = examples(16), tmp_path / "cache"
    cache_teacher(teacher, rows, cache, data_collator=collate, held_out=rows[:8], vocab=32)
    accumulates = {**EACH_STEP, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    smooth = {**EACH_STEP, "label_smoothing_factor": 0.1}
    runs = {
        "beside": ("plain", "beside", {**HALF, "temperature": 2.0, "gate": True, "common_vocab": 32}, accumulates),
        "split": ("tied", "split", {**HALF, "stop_at": "auto"}, {**EACH_STEP, **EVALUATES}),
        "cached": ("tied", "cache", HALF, accumulates),
        "whole": ("tied", "beside", {**HALF, "temperature": 2.0}, {**smooth, "whole_logits": True}),
    }
    torch.save(runs, tmp_path / "runs.pt")
    found = two_processes("ki_tensor_parallel.py", tmp_path)
    for name, (of, taught, settings, options) in runs.items():
        ki = KIConfig(teacher=cache if taught == "cache" else teacher, **settings)
        options = {key: value for key, value in options.items() if key != "whole_logits"}
        assert_steps_of_one(found[name], tmp_path, type(makers[of]).from_pretrained(tmp_path / of), ki, options)


@pytest.mark.slow
def test_parts_of_examples_take_the_steps_of_whole_ones(tmp_path):
    student().save_pretrained(tmp_path / "student")
    teacher = student(seed=1, hidden=8)
    teacher.save_pretrained(tmp_path / "teacher")
    cache_teacher(teacher, examples(16), tmp_path / "cache", data_collator=collate)
    runs = {
        "all targets": ({**HALF, "temperature": 2.0, "gate": True}, {**EACH_STEP, **IN_ORDER}),
        "top-k": ({**HALF, "top_k": 8}, {**EACH_STEP, **IN_ORDER, "max_steps": 2, "gradient_accumulation_steps": 2}),
    }
    torch.save(runs, tmp_path / "runs.pt")
    found = two_processes("ki_context_parallel.py", tmp_path)
    for name, (settings, options) in runs.items():
        assert_steps_of_one(found[name], tmp_path, student(), KIConfig(teacher=teacher, **settings), options)
