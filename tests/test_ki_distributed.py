"""Two CPU processes against one: the cache's files, training from it (DDP), the loss under FSDP2, DeepSpeed ZeRO-3.

DDP with an online teacher stands in test_ki_composition.py. The Trainer itself has no FSDP on CPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ki_tiny import collate, examples, llama, shifted, train

from growlib import KIConfig, cache_teacher
from growlib.ki import ki_loss


def two_processes(name, folder, leaves="result.pt"):
    """What a script of this folder leaves, if anything."""
    script = Path(__file__).with_name(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, script, folder], env=environment, check=True, timeout=240)
    return None if leaves is None else torch.load(folder / leaves)


def one_process(folder, ki):
    """The student of three steps, and its trainer."""
    student = llama(0, num_hidden_layers=2)
    options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4}
    return student, train(folder, student, ki, examples(16), **options)


def assert_same_steps(both, student, trainer):
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(both["parameters"][name], parameter.detach(), rtol=1e-5, atol=1e-6)
    for two, single in zip(both["logs"][:3], trainer.state.log_history[:3], strict=True):
        names = [name for name in single if name.startswith("ki/")] + ["loss"]
        assert [two[name] for name in names] == pytest.approx([single[name] for name in names], rel=1e-4)


def test_two_processes_do_what_one_does(tmp_path):
    both = two_processes("ki_sharded.py", tmp_path)
    rows, teacher = examples(16), llama(1, hidden=8)
    one = cache_teacher(teacher, rows, tmp_path / "one", data_collator=collate, shard_examples=3, top_k=8, samples=0)
    files = sorted(path.name for path in one.path.iterdir())
    assert len(files) == 1 + 6
    assert all((one.path / name).read_bytes() == (tmp_path / "cache" / name).read_bytes() for name in files)

    alike = cache_teacher(teacher, rows, tmp_path / "alike", data_collator=collate, shard_examples=3, store="hidden")
    for path in alike.path.iterdir():
        assert path.read_bytes() == (tmp_path / "hidden" / path.name).read_bytes()

    # Interrupted with two processes, finished by one.
    shard = tmp_path / "cache" / files[3]
    shard.unlink()
    cache_teacher(teacher, rows, tmp_path / "cache", data_collator=collate, shard_examples=3, top_k=8, samples=0)
    assert shard.read_bytes() == (one.path / files[3]).read_bytes()

    assert_same_steps(both, *one_process(tmp_path / "alone", KIConfig(teacher=one.path, stop_at=0.7)))

    model, batch = llama(0, num_hidden_layers=2), collate(rows)
    with torch.no_grad():
        logits = teacher(**batch).logits
    # FSDP means the gradients of the two processes, each of which has half of the positions.
    ki_loss(model(**batch).logits, shifted(batch["labels"]), logits, alpha=0.5, num_items=200).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(both["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_zero3_takes_the_steps_of_one_process(tmp_path):
    """DeepSpeed on two CPUs, where it is installed (it is built from source, which CI does not do)."""
    pytest.importorskip("deepspeed")
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    both = two_processes("ki_zero3.py", tmp_path)
    assert_same_steps(both, *one_process(tmp_path / "alone", KIConfig(teacher=tmp_path / "teacher", stop_at=0.6)))
