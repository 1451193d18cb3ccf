"""A cache's files: what is in them, and what happens when the disk, another process or a person interferes."""

import json
import os
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ki_tiny import VOCAB, bert, collate, llama, shifted, t5, train
from safetensors import safe_open
from safetensors.numpy import save_file
from test_ki_cache import ROWS, bytes_of, write

from growlib import GrowError, KIConfig
from growlib.ki import TeacherCache
from growlib.ki.cache.shards import Shard
from growlib.ki.projection import Projection

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


def test_a_cache_of_another_format_is_refused_and_left_alone(tmp_path):
    """Such as format 3, whose header has no hidden states."""
    folder = write(tmp_path / "cache").path
    fields = json.loads((folder / "header.json").read_text())
    older = {name: value for name, value in fields.items() if name not in ("hidden_size", "hidden_dtype", "head")}
    (folder / "header.json").write_text(json.dumps({**older, "format": 3}))
    before = bytes_of(folder)
    for use in (TeacherCache, write, lambda path: train(tmp_path, llama(0), KIConfig(teacher=path), ROWS)):
        with pytest.raises(GrowError, match=r"is not of format 4.* write the cache again, into a new folder"):
            use(folder)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("leftover", ["header.json", ".header.json-7", ".shard-00000.safetensors-7"])
def test_a_call_that_ended_before_its_first_shard_leaves_nothing_in_the_way(tmp_path, leftover):
    expected = bytes_of(write(tmp_path / "whole").path)
    folder = tmp_path / "cache"
    with pytest.raises(GrowError, match="NaN"):
        write(folder, broken(3))
    assert os.listdir(folder) == ["header.json"]
    (folder / "header.json").rename(folder / leftover)
    write(folder)
    assert bytes_of(folder) == expected


def broken(token):
    """A teacher that overflows at a token."""
    teacher = llama(1, hidden=8)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[token] = torch.inf
    return teacher


def test_logits_that_are_no_numbers_are_named_and_not_written(tmp_path):
    rows = [{name: torch.where(x == 31, 30, x) for name, x in row.items()} for row in ROWS]
    rows[21]["input_ids"][4] = 31
    with pytest.raises(GrowError, match="example 21 "):
        write(tmp_path / "cache", broken(31), rows)
    assert sorted(os.listdir(tmp_path / "cache")) == ["header.json", FIRST]
    with pytest.raises(GrowError, match="held_out"):
        write(tmp_path / "other", broken(31), rows[:8], held_out=rows)


def test_held_out_logits_are_computed_in_chunks(tmp_path, monkeypatch):
    sizes, logits = [], Projection.logits
    monkeypatch.setattr(Projection, "logits", lambda self: sizes.append(len(self.hidden)) or logits(self))
    monkeypatch.setattr("growlib.ki.linear.CHUNK_BYTES", 1)
    write(tmp_path / "cache", held_out=ROWS, batch_size=40)
    assert max(sizes[1:]) == 16  # the first are those that prove the head


def test_settings_of_any_type_of_number_are_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"top_k": np.int64(8), "samples": np.uint8(6), "seed": np.int32(0), "vocab": torch.tensor(VOCAB)}
    write("~/cache", temperature=1, shard_examples=np.int64(16), batch_size=np.int16(4), **options)
    assert bytes_of(write(tmp_path / "cache", temperature=np.float32(1)).path) == bytes_of(write(tmp_path / "b").path)
    assert train(tmp_path, llama(0), KIConfig(teacher="~/cache"), ROWS).state.global_step == 1


@pytest.mark.parametrize(("maker", "task"), [(llama, "causal"), (bert, "masked"), (t5, "seq2seq")])
def test_a_folder_is_loaded_as_its_config_names(tmp_path, maker, task):
    maker(1, hidden=8).save_pretrained(tmp_path / "teacher")
    assert write(tmp_path / "cache", tmp_path / "teacher", ROWS[:4]).header.task == task


def test_a_disk_that_refuses_is_named_and_what_is_finished_stays(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GrowError, match="cannot be written"):
        write(tmp_path / "file" / "cache")
    with limit(resource.RLIMIT_FSIZE, 8000), pytest.raises(GrowError, match="finished shards are kept"):
        write(tmp_path / "cache", shard_examples=39)
    assert os.listdir(tmp_path / "cache") == ["header.json"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_process_that_tidies_up(tmp_path, monkeypatch, finished):
    """It takes a file away that is being written, and may have finished it."""
    expected = bytes_of(write(tmp_path / "whole").path)
    folder = tmp_path / "cache"

    def tidy(_):
        for path in folder.glob(".shard-*"):
            path.unlink()
            if finished:
                name = path.name[1 : path.name.rindex("-")]
                shutil.copy(tmp_path / "whole" / name, folder / name)

    monkeypatch.setattr(os, "fsync", tidy)
    if finished:
        assert bytes_of(write(folder).path) == expected
    else:
        with pytest.raises(GrowError, match="no other call writes to"):
            write(folder)
