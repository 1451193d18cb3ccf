"""A cache's files: what is in them, and what happens when the disk, another process or a person interferes."""

import os
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ki_tiny import VOCAB, collate, llama, shifted, train
from safetensors import safe_open
from safetensors.numpy import save_file
from test_ki_cache import ROWS, write

from growlib import GrowError, KIConfig
from growlib.ki import TeacherCache
from growlib.ki.cache.shards import Shard

FIRST = "shard-00000.safetensors"


@contextmanager
def limit(what, most):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_shards_need_no_file_descriptors_and_too_few_of_them_are_no_damage(tmp_path):
    header = write(tmp_path / "cache", shard_examples=1).header
    with limit(resource.RLIMIT_NOFILE, open_files() + 8):
        cache = TeacherCache(tmp_path / "cache")
        assert len(cache.read(collate(ROWS))[0]) == cache.positions
    with limit(resource.RLIMIT_NOFILE, open_files() - 1), pytest.raises(GrowError, match="cannot be opened"):
        Shard(tmp_path / "cache" / FIRST, header)


def test_a_shard_in_the_place_of_another_is_named(tmp_path):
    write(tmp_path / "cache")
    shutil.copy(tmp_path / "cache" / FIRST, tmp_path / "cache" / "shard-00001.safetensors")
    with pytest.raises(GrowError, match=r"shard-00001.* another of its shards"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("records", lambda x: x.reshape(-1)),
        ("records", lambda x: x.view(np.int8)),
        ("digests", lambda x: x.reshape(-1, 8)),
        ("starts", lambda x: x.view(np.float64)),
        ("checksums", lambda x: x.view(np.int32)),
        ("teacher_ce", lambda x: x.view(np.int32)),
        ("known", lambda x: x[:, None]),
    ],
)
def test_every_tensor_has_its_dtype_and_shape(tmp_path, name, change):
    """The bytes, which the checksum is of, are the same."""
    path = write(tmp_path / "cache").path / FIRST
    with safe_open(path, framework="numpy") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, name: change(tensors[name])}, path, metadata)
    with pytest.raises(GrowError, match=f"{FIRST} is damaged"):
        TeacherCache(tmp_path / "cache")


def test_the_teachers_ce_is_a_mean_over_the_labels_that_it_knows(tmp_path):
    vocab, teacher = VOCAB - 8, llama(1, hidden=8)
    cache = write(tmp_path / "cache", teacher, rows=ROWS[:8], vocab=vocab, held_out=ROWS[:8])
    batch = collate(ROWS[:8])
    labels = shifted(batch["labels"]).flatten()
    assert (labels >= vocab).any()
    with torch.no_grad():
        logits = teacher(**batch).logits.flatten(0, 1)[:, :vocab]
    known = (labels != -100) & (labels < vocab)
    expected = pytest.approx(torch.nn.functional.cross_entropy(logits[known], labels[known]).item(), rel=1e-5)
    assert cache.teacher_ce == expected
    assert cache.header.held_out_ce == expected
    ki = KIConfig(teacher=cache.path, common_vocab=vocab)
    logs = train(tmp_path, llama(0), ki, ROWS[:8], logging_strategy="steps", logging_steps=1).state.log_history
    assert logs[0]["ki/teacher_ce"] == expected
