"""A teacher's cache: its bytes, its files, what damages it, and training from it."""

import hashlib
import os
import random
import shutil
import signal
import threading
import time

import datasets
import pytest
import torch
from ki_tiny import MAKERS, VOCAB, CountForwards, arguments, bert, collate, examples, llama, parameters, train
from test_ki_teacher import tokenizer
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from growlib import GrowError, KIConfig, KITrainer, cache_teacher
from growlib.ki import MaskedExamples, Targets, TeacherCache, verify_cache
from growlib.ki.cache.data import padded
from growlib.ki.cache.examples import examples_of
from growlib.ki.tasks import Positions

ROWS = examples(40)
CPU = torch.device("cpu")


def write(folder, model=None, rows=ROWS, **options):
    defaults = {"shard_examples": 16, "batch_size": 4, "data_collator": collate, "top_k": 8, "samples": 6}
    return cache_teacher(model or llama(1, hidden=8), rows, folder, **{**defaults, **options})


HIDDEN = {"store": "hidden", "top_k": None, "samples": None}
STORES = pytest.mark.parametrize("store", [{}, HIDDEN], ids=["probabilities", "hidden"])


def content(targets):
    """What tells the targets of one position from another's."""
    return targets.logprobs if isinstance(targets, Targets) else targets.hidden


def bytes_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("samples", [0, 6])
def test_the_cache_holds_what_the_teacher_says(tmp_path, name, samples):
    teacher = MAKERS[name](1, hidden=8)
    cache = write(tmp_path / "cache", teacher, samples=samples, temperature=2.0)
    batch = collate([ROWS[i] for i in (7, 0, 31)])
    targets, (ce, known) = cache.read(batch)
    labels = batch["labels"] if name in {"bert", "t5"} else torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)
    labels = labels[:, -10:].flatten() if name in {"bert", "t5"} else labels[:, 1:].flatten()
    counted = labels != -100
    with torch.no_grad():
        logits = teacher(**batch).logits.flatten(0, 1)[counted]
    online = Targets.top_k(logits, 8, temperature=2.0)
    assert torch.equal(targets.ids[:, :8], online.ids)
    torch.testing.assert_close(targets.logprobs[:, :8], online.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(targets.tail, online.tail, rtol=1e-3, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(logits, labels[counted], reduction="sum")
    assert (ce.item(), known.item()) == (pytest.approx(expected.item(), rel=1e-5), counted.sum().item())
    assert verify_cache(tmp_path / "cache", teacher, ROWS, data_collator=collate).kl < 1e-6


@STORES
def test_a_second_call_continues_and_a_finished_cache_is_left_alone(tmp_path, store):
    folder = tmp_path / "cache"
    write(folder, **store)
    before, times = bytes_of(folder), {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    head = ["head.safetensors"] if store else []
    assert sorted(before) == [*head, "header.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    (folder / "shard-00001.safetensors").unlink()
    (folder / ".shard-00001.safetensors-77").write_bytes(b"half")
    with pytest.raises(GrowError, match=r"shard-00001.* is missing"):
        TeacherCache(folder)
    write(folder, **store)
    assert bytes_of(folder) == before
    assert all(times[p] == p.stat().st_mtime_ns for p in times if p.name != "shard-00001.safetensors")


class Stream(IterableDataset):
    """Rows in their order, `short` of them missing from the second reading on."""

    def __init__(self, short=0):
        self.short, self.readings = short, 0

    def __iter__(self):
        self.readings += 1
        yield from ROWS[: len(ROWS) - (self.short if self.readings > 1 else 0)]


def test_a_dataset_without_an_index_has_the_same_cache(tmp_path):
    expected = write(tmp_path / "rows", held_out=ROWS)
    stream = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in ROWS]).to_iterable_dataset()
    for name, rows in (("torch", Stream()), ("datasets", stream.with_format("torch"))):
        folder = tmp_path / name
        cache = write(folder, rows=rows, held_out=rows)
        assert bytes_of(folder) == bytes_of(expected.path)
        (folder / "shard-00001.safetensors").unlink()
        write(folder, rows=rows, held_out=rows)
        assert bytes_of(folder) == bytes_of(expected.path)
        assert verify_cache(folder, llama(1, hidden=8), rows, data_collator=collate).identical > 0.9
    student = llama(0)
    trainer = train(tmp_path / "out", student, KIConfig(teacher=cache.path), Stream(), max_steps=4)
    assert trainer.state.global_step == 4


def test_a_dataset_that_shrinks_is_named_and_leaves_whole_shards(tmp_path):
    with pytest.raises(GrowError, match="had 40 examples, and no number 39 when it was read again"):
        write(tmp_path / "cache", rows=Stream(short=1))
    assert not (tmp_path / "cache").exists()


@STORES
def test_killed_twenty_times_it_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, store):
    rows = examples(96)
    teacher = llama(1, hidden=8)
    settings = {"shard_examples": 4, "batch_size": 2, **store}
    start = time.perf_counter()
    write(tmp_path / "whole", teacher, rows, **settings)
    whole = time.perf_counter() - start
    moments = random.Random(0)
    killed = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:  # no pytest in here: leave by os._exit alone, and take no lock with it
            try:
                tqdm.set_lock(threading.RLock())
                write(tmp_path / "cache", teacher, rows, **settings)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, whole / 6))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 10
    write(tmp_path / "cache", teacher, rows, **settings)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": lambda: llama(2, hidden=8)}, "another teacher"),
        ({"rows": examples(41)}, "41 examples and not of 40"),
        ({"rows": ROWS[::-1]}, "in another order"),
        ({"tokenizer": tokenizer(VOCAB)}, "another tokenizer"),
        ({"top_k": 4}, "top_k = 4 and not 8"),
        ({"temperature": 2.0}, "temperature = 2.0"),
        ({"seed": 1}, "seed = 1"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, change, says):
    write(tmp_path / "cache")
    before = bytes_of(tmp_path / "cache")
    options = {**change, **({"model": change["model"]()} if "model" in change else {})}
    with pytest.raises(GrowError, match=says):
        write(tmp_path / "cache", **options)
    assert bytes_of(tmp_path / "cache") == before


@STORES
def test_any_flipped_byte_is_named(tmp_path, store):
    """Of every file, at many places: opening or reading says which file; no target is ever silently wrong."""
    whole = write(tmp_path / "cache", **store)
    batches = [collate(ROWS[i : i + 8]) for i in range(0, 40, 8)]
    expected = [whole.read(batch)[0].targets(1.0, CPU).logprobs for batch in batches]
    places = random.Random(0)
    refused = 0
    for path in sorted((tmp_path / "cache").iterdir()):
        size = path.stat().st_size
        for place in [0, 8, *(places.randrange(size) for _ in range(12)), size - 1]:
            damaged = tmp_path / "damaged"
            shutil.copytree(tmp_path / "cache", damaged)
            content = bytearray(path.read_bytes())
            content[place] ^= 0x10
            (damaged / path.name).write_bytes(content)
            try:
                cache = TeacherCache(damaged)
                read = [cache.read(batch)[0].targets(1.0, CPU).logprobs for batch in batches]
            except GrowError as error:
                refused += path.name in str(error)
            else:  # spaces of a JSON header
                assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
                refused += 1
            shutil.rmtree(damaged)
    assert refused == (5 if store else 4) * 15


def test_a_teacher_that_was_cast_is_verified_as_it_was_cast(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "cache"
    cache_teacher(tmp_path / "teacher", ROWS, folder, data_collator=collate, dtype=torch.bfloat16)
    result = verify_cache(folder, tmp_path / "teacher", ROWS, data_collator=collate)
    assert result.sound
    assert result.compared > 0
    with pytest.raises(GrowError, match="dtype = None and not 'bfloat16'"):
        cache_teacher(tmp_path / "teacher", ROWS, folder, data_collator=collate, dtype=None)


def test_another_teacher_tokenizer_or_dataset_is_named_when_the_cache_is_used(tmp_path):
    folder = tmp_path / "cache"
    cache = write(folder, tokenizer=tokenizer(VOCAB))
    with pytest.raises(GrowError, match="another teacher"):
        verify_cache(folder, llama(2, hidden=8))
    with pytest.raises(GrowError, match="41 examples and the cache 40"):
        verify_cache(folder, llama(1, hidden=8), examples(41), data_collator=collate)
    with pytest.raises(GrowError, match="written with another tokenizer"):
        KITrainer(
            model=llama(0), args=arguments(tmp_path), ki=KIConfig(teacher=folder), processing_class=tokenizer(VOCAB - 1)
        )
    longer = collate(examples(48)[40:])
    with pytest.raises(GrowError, match="a longer or changed dataset"):
        cache.read(longer)
    other_labels = collate(ROWS[:2])
    other_labels["labels"][0, 7] = -100
    with pytest.raises(GrowError, match="not among its 40"):
        cache.read(other_labels)
    shuffled = cache.read(collate(ROWS[::-1]))[0]  # known by content, a shuffled dataset has its targets
    assert len(shuffled) == cache.positions


@pytest.mark.parametrize(
    ("student", "options", "says"),
    [
        (llama, {"temperature": 2.0}, "temperature 1.0"),
        (bert, {}, "causal model, the student masked"),
        (lambda seed: llama(seed, vocab=VOCAB - 2), {}, f"vocab={VOCAB - 2}"),
        (lambda seed: llama(seed, vocab=VOCAB + 2), {}, "no tokenizer proves"),
        (llama, {"common_vocab": VOCAB - 2}, f"vocab={VOCAB - 2}"),
        (lambda seed: llama(seed, vocab=VOCAB + 2), {"common_vocab": VOCAB + 2}, f"common_vocab={VOCAB}"),
        (llama, {"top_k": 4}, "no top_k"),
        (llama, {"tail": "bucket"}, "draws"),
    ],
)
def test_a_cache_that_does_not_fit_the_student_is_refused(tmp_path, student, options, says):
    write(tmp_path / "cache")
    ki = KIConfig(teacher=tmp_path / "cache", **options)
    with pytest.raises(GrowError, match=says):
        train(tmp_path, student(0), ki, ROWS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": iter(ROWS)}, "a list_iterator, which cannot be read twice"),
        ({"rows": []}, "the dataset has no examples"),
        ({"rows": [{"input_ids": row["input_ids"]} for row in ROWS]}, "no labels"),
        ({"top_k": VOCAB + 1}, f"0 to {VOCAB}"),
        ({"temperature": 0.0}, "positive"),
        ({"top_k": 0, "samples": 0}, "or draws"),
        ({"batch_size": 0}, "batch_size=0.* 1 or more"),
        ({"shard_examples": 0}, "shard_examples=0.* 1 or more"),
        ({"vocab": VOCAB + 1}, f"1 to {VOCAB}"),
        ({"rows": ["dear", "reader"]}, "an example is a str.* a dict"),
        ({"model": "folder", "task": "decoder"}, "causal, masked, seq2seq, image"),
        ({"vocab": 0}, f"1 to {VOCAB}"),
        ({"samples": -1}, "samples=-1.* 0 or more"),
        ({"top_k": 1.5}, "top_k=1.5.* not a whole number"),
        ({"seed": 1 << 63}, "seed=.* out of range"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"model": torch.nn.Linear(2, 2)}, "a teacher that is a Linear"),
        ({"rows": datasets.DatasetDict(train=datasets.Dataset.from_list([{"input_ids": [1]}]))}, "one split of it"),
        ({"rows": [*ROWS[:3], {"input_ids": torch.arange(4), "labels": torch.arange(4)}]}, "pads where lengths differ"),
        ({"rows": [{"input_ids": torch.arange(4), "labels": torch.arange(3)}]}, "one label for each token"),
        ({"rows": [{"input_ids": torch.tensor([1, VOCAB]), "labels": torch.tensor([1, 2])}]}, f"0 to {VOCAB - 1}"),
        ({"rows": [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, VOCAB])}]}, "labels from 32 to 32"),
        ({"rows": [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, -5])}]}, "labels from -5 to -5"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_anything_is_written(tmp_path, change, says):
    with pytest.raises(GrowError, match=says):
        write(tmp_path / "cache", **change)
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(GrowError, match="the folder holds other files"):
        write(tmp_path)


@pytest.mark.parametrize("tail", ["bucket", "renorm_teacher"])
def test_training_from_a_cache_is_training_with_the_online_top_k(tmp_path, tail):
    """Shuffled, in other batches and two epochs; the teacher's folder is gone."""
    teacher = llama(1, hidden=8)
    write(tmp_path / "cache", teacher, samples=0)
    forwards = CountForwards(teacher)
    settings = {"schedule": "constant", "stop_at": None, "alpha": 0.5, "tail": tail}
    options = {"max_steps": 10, "logging_strategy": "steps", "logging_steps": 5}
    cached, online, plain = llama(0), llama(0), llama(0)
    logs = [
        train(tmp_path, model, KIConfig(teacher=source, **settings, **more), ROWS, **options).state.log_history
        for model, source, more in ((cached, tmp_path / "cache", {}), (online, teacher, {"top_k": 8}))
    ]
    assert forwards.count == 10 + 2
    train(tmp_path, plain, None, ROWS, **options)
    moved = (parameters(online) - parameters(plain)).abs().max()
    assert moved > 0.01
    assert (parameters(cached) - parameters(online)).abs().max() < 1e-3 * moved
    for name in ("loss", "ki/ce", "ki/kd"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-4)
    with torch.no_grad():
        exact = [teacher(**collate(ROWS)).loss.item()]
    assert TeacherCache(tmp_path / "cache").teacher_ce == pytest.approx(exact[0], rel=1e-5)
    assert 0.5 * exact[0] < logs[0][0]["ki/teacher_ce"] < 2 * exact[0]


@STORES
@pytest.mark.parametrize("proof", [{"ki": {"common_vocab": VOCAB}}, {"processing_class": tokenizer(VOCAB - 3)}])
def test_a_student_of_more_ids_learns_from_a_cache_whose_ids_are_proven(tmp_path, proof, store):
    write(tmp_path / "cache", tokenizer=tokenizer(VOCAB - 3), **store)
    ki = KIConfig(teacher=tmp_path / "cache", **proof.get("ki", {}))
    options = {name: value for name, value in proof.items() if name != "ki"}
    assert train(tmp_path, llama(0, vocab=VOCAB + 2), ki, ROWS, trainer_options=options).state.global_step == 1


def test_draws_alone_have_no_gate(tmp_path):
    write(tmp_path / "cache", top_k=0)
    with pytest.raises(GrowError, match="the gate"):
        train(tmp_path, llama(0), KIConfig(teacher=tmp_path / "cache", gate=True), ROWS)


def test_a_sampled_cache_teaches_towards_the_full_distribution(tmp_path):
    teacher = llama(1, hidden=8)
    write(tmp_path / "cache", teacher, top_k=4, samples=24)
    settings = {"schedule": "constant", "stop_at": None, "alpha": 1.0}
    students = [llama(0), llama(0)]
    for student, source in zip(students, (tmp_path / "cache", teacher), strict=True):
        train(tmp_path, student, KIConfig(teacher=source, **settings), ROWS, max_steps=5)
    start = parameters(llama(0))
    updates = [parameters(student) - start for student in students]
    assert torch.nn.functional.cosine_similarity(*updates, dim=0) > 0.97


def test_after_stop_at_the_cache_is_read_no_more(tmp_path, monkeypatch):
    write(tmp_path / "cache")
    reads = []
    read = TeacherCache.read
    monkeypatch.setattr(TeacherCache, "read", lambda self, *batch: reads.append(1) or read(self, *batch))
    trainer = train(tmp_path, llama(0), KIConfig(teacher=tmp_path / "cache", stop_at=0.3), ROWS, max_steps=10)
    assert len(reads) == 3
    assert trainer._ki_provider is None


def test_random_masks_are_refused(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(VOCAB)._tokenizer, mask_token="word1", pad_token="word0")
    collator = DataCollatorForLanguageModeling(words, mlm_probability=0.5)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in ROWS]
    with pytest.raises(GrowError, match="MaskedExamples"):
        write(tmp_path / "cache", bert(1, hidden=8), rows, data_collator=collator)
    assert not (tmp_path / "cache").exists()


@STORES
def test_masks_come_from_seed_epoch_and_example(tmp_path, store):
    plain = [{"input_ids": row["input_ids"]} for row in ROWS]
    masked = MaskedExamples(plain, mask_token=0, vocab=VOCAB, masks=3, share=0.4, special=(1,))
    seen = {}
    for epoch in range(4):
        masked.set_epoch(epoch)
        seen[epoch] = torch.stack([masked[i]["input_ids"] for i in range(len(masked))])
        labels = torch.stack([masked[i]["labels"] for i in range(len(masked))])
        chosen = labels != -100
        assert chosen.any(1).all()
        assert 0.3 < chosen.float().mean() < 0.5
        assert torch.equal(torch.where(chosen, labels, seen[epoch]), torch.stack([row["input_ids"] for row in plain]))
        assert not (labels == 1).any()
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    kinds = [(seen[0] == 0)[chosen].float().mean().item() for chosen in [seen[0] != collate(plain)["input_ids"]]]
    assert 0.7 < kinds[0] <= 1.0
    cache = write(tmp_path / "cache", bert(1, hidden=8), masked.all_masks(), **store)
    assert len(cache) == 3 * len(plain)
    student = bert(0)
    trainer = train(
        tmp_path, student, KIConfig(teacher=tmp_path / "cache", stop_at=1.0), masked, max_steps=20,
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    assert sum("ki/kd" in log for log in trainer.state.log_history) == 20  # four epochs, every example is in the cache


def test_examples_without_a_counted_position_need_no_targets(tmp_path):
    cache = write(tmp_path / "cache")
    batch = collate(ROWS[:2])
    batch["labels"][:] = -100
    targets, known = cache.read(batch)
    assert (len(targets), known.tolist()) == (0, [0.0, 0.0])


def test_labels_on_padding_are_refused():
    batch = padded([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, {"input_ids": [3], "labels": [3]}])
    batch["labels"][:] = 2
    with pytest.raises(GrowError, match="-100 on padding"):
        examples_of(batch, "masked", Positions.of(batch, "masked"))
