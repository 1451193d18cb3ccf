"""Caches on object storage: fsspec's own `memory://` stands in for it."""

import fsspec
import pytest
import torch
from tiny import tiny
from transformers import TrainingArguments

import growlib
from growlib import GrowError, KIConfig, KITrainer
from growlib.ki import TeacherCache
from growlib.ki.cache import remote

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(61, (6, 8), generator=torch.manual_seed(0)).tolist()]


STORES = {"probabilities": {"top_k": 4, "samples": 2}, "hidden": {"store": "hidden"}}


@pytest.fixture(params=STORES)
def store(request):
    return STORES[request.param]


@pytest.fixture
def place(store, tmp_path, monkeypatch):
    """A cache at memory://bucket/cache, and nowhere on this machine."""
    monkeypatch.setattr(remote, "KEPT", tmp_path / "kept")
    growlib.cache_teacher(tiny("llama", seed=1), ROWS, tmp_path / "cache", shard_examples=2, **store)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "cache"), "/bucket/cache", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_student_learns_from_a_cache_elsewhere(place, tmp_path):
    losses = []
    for teacher in ("memory://bucket/cache", tmp_path / "cache"):
        settings = TrainingArguments(tmp_path / "out", max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
        trainer = KITrainer(tiny("llama", seed=2), settings, train_dataset=ROWS, ki=KIConfig(teacher=teacher))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_files_are_fetched_once(place, tmp_path, monkeypatch):
    cache, there = TeacherCache("memory://bucket/cache"), TeacherCache(tmp_path / "cache")
    assert cache.header == there.header
    assert cache.positions == there.positions
    fetches = []
    get = type(place).get_file
    monkeypatch.setattr(type(place), "get_file", lambda self, *a, **k: fetches.append(a) or get(self, *a, **k))
    TeacherCache("memory://bucket/cache")
    assert not fetches
    kept = remote.fetched("memory://bucket/cache")
    (kept / "shard-00001.safetensors").write_bytes(b"cut")  # as a full disk leaves it
    TeacherCache("memory://bucket/cache")
    assert [name.rpartition("/")[2] for name, _ in fetches] == ["shard-00001.safetensors"]


@pytest.mark.parametrize(("count", "options"), [(5, {}), (6, {"shard_examples": 2})])
def test_another_cache_at_the_same_place_is_fetched_anew(place, store, tmp_path, count, options):
    """Its files may be of the same sizes."""
    first = TeacherCache("memory://bucket/cache")
    new = growlib.cache_teacher(tiny("llama", seed=3), ROWS[:count], tmp_path / "new", **store, **options)
    place.rm("/bucket/cache", recursive=True)
    place.put(str(tmp_path / "new"), "/bucket/cache", recursive=True)
    assert len(first) == 6
    assert TeacherCache("memory://bucket/cache").header == new.header


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://bucket/nothing", r"memory://bucket/nothing.*no folder with files.*cache_teacher wrote"),
        ("nosuch://bucket/cache", "Protocol not known"),
    ],
)
def test_what_is_not_there_is_refused(url, said, place):
    with pytest.raises(GrowError, match=said):
        TeacherCache(url)
    assert not remote.KEPT.exists()  # nothing is left of it


def test_a_storage_that_fails_keeps_what_was_fetched(place, tmp_path, monkeypatch):
    get = type(place).get_file

    def fails(self, source, target, **more):
        if "shard-00002" in source:
            raise ConnectionError("the line is cut")
        return get(self, source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(place), "get_file", fails)
        with pytest.raises(GrowError, match=r"shard-00002.*the line is cut.*the same call continues"):
            TeacherCache("memory://bucket/cache")
    assert len(list((tmp_path / "kept").rglob("shard-*"))) == 2
    assert len(TeacherCache("memory://bucket/cache")) == 6
