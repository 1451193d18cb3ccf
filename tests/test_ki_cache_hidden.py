"""A cache of hidden states with the teacher's head: what the online teacher says, bit for bit, at any temperature."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from ki_tiny import MAKERS, VOCAB, arguments, bert, collate, half, llama, parameters, t5, train
from test_ki_cache import ROWS, bytes_of, write
from test_ki_providers import SPECIAL
from tiny import randomise
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from growlib import GrowError, KIConfig, KITrainer
from growlib.cli import main
from growlib.ki import Projection, Targets, TeacherCache, linear_ki_loss, verify_cache
from growlib.ki.cache import heads
from growlib.ki.guard import Guard
from growlib.ki.providers import load_provider
from growlib.ki.tasks import Positions, task_of
from growlib.ki.treatments import WITHOUT_DRAWS

FIRST, HEAD = "shard-00000.safetensors", "head.safetensors"
MODELS = {**MAKERS, **SPECIAL}
TOP_5 = {tail: {"top_k": 5, "tail": tail, "temperature": 2.0} for tail in WITHOUT_DRAWS}
SETTINGS = [{}, {"temperature": 2.5}, {"temperature": 0.5}, {"temperature": 2.5, "gate": True}, *TOP_5.values()]


def hidden(folder, teacher=None, rows=ROWS, **options):
    return write(folder, teacher, rows, **{"store": "hidden", "top_k": None, "samples": None, **options})


def made(name, seed=1):
    return randomise(MODELS[name](seed), seed).eval()


def said(source, student, batch, **options):
    """The part that a teacher gives, and the batch's positions."""
    provider = load_provider(half(source, **options), student, None, torch.device("cpu"), Guard())
    positions = Positions.of(batch, task_of(student))
    (part,) = provider.parts(batch, positions)
    return part.predictions, positions


def loss_of(predictions, positions, alpha, temperature=1.0, gate=False, **_):
    """Loss, CE, KL, and the gradients of a random student's hidden states and head."""
    torch.manual_seed(5)
    states, weight = torch.randn(positions.count, 12), torch.randn(VOCAB, 12)
    ends = [states.requires_grad_(), weight.requires_grad_()]
    settings = {"alpha": alpha, "temperature": temperature, "gate": gate}
    result = linear_ki_loss(*ends, positions.labels, predictions, **settings)
    return [*result, *torch.autograd.grad(result.loss, ends)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_online_teacher_bit_for_bit(tmp_path, name, dtype):
    """In batches like those that were cached."""
    teacher, student = made(name).to(dtype), MODELS[name](0)
    cache = hidden(tmp_path / "cache", teacher, batch_size=8)
    assert cache.header.record_format.bytes_per_position == 16 * dtype.itemsize
    batch, values = collate(ROWS[8:16]), set()
    for settings in SETTINGS:
        for alpha in (0.3, 1.0):
            pair = [said(source, student, batch, **settings) for source in (teacher, cache.path)]
            assert type(pair[0][0]) is type(pair[1][0]) is (Targets if "top_k" in settings else Projection)
            online, cached = (loss_of(*one, alpha, **settings) for one in pair)
            assert all(torch.equal(a, b) for a, b in zip(online, cached, strict=True)), settings
            values.add(online[0].item())
    assert len(values) == 2 * len(SETTINGS)


@pytest.mark.parametrize("name", MODELS)
def test_training_from_it_is_training_with_the_online_teacher(tmp_path, name):
    """In other batches, shuffled, over two epochs."""
    teacher = made(name)
    cache = hidden(tmp_path / "cache", teacher, batch_size=3)
    students, logs = [MODELS[name](0), MODELS[name](0)], []
    for student, source in zip(students, (teacher, cache.path), strict=True):
        options = {"max_steps": 10, "logging_strategy": "steps", "logging_steps": 5, "learning_rate": 0.02}
        logs.append(train(tmp_path, student, half(source, temperature=2.0), ROWS, **options).state.log_history[0])
    assert (parameters(students[0]) - parameters(MODELS[name](0))).abs().max() > 1e-3
    torch.testing.assert_close(*map(parameters, students), rtol=1e-4, atol=1e-5)
    keys = ("loss", "ki/ce", "ki/kd", "ki/teacher_ce")
    assert [logs[0][key] for key in keys] == pytest.approx([logs[1][key] for key in keys], rel=1e-4)


def test_a_cache_over_fewer_ids_is_a_teacher_of_fewer_ids(tmp_path):
    teacher, vocab = made("llama"), VOCAB - 8
    cache = hidden(tmp_path / "cache", teacher, vocab=vocab, batch_size=8)
    pair = [said(source, llama(0), collate(ROWS[:8]), common_vocab=vocab) for source in (teacher, cache.path)]
    assert pair[1][0].vocab == vocab
    online, cached = (loss_of(*one, 0.5) for one in pair)
    assert all(torch.equal(a, b) for a, b in zip(online, cached, strict=True))
    with pytest.raises(GrowError, match=f"the cache is over {vocab} token ids"):
        said(cache.path, llama(0), collate(ROWS[:8]))


@pytest.mark.parametrize("several", [tuple, dict])
def test_it_is_averaged_with_online_teachers_and_teaches_a_domain(tmp_path, several):
    """A probability cache has no whole distribution that could be averaged with a teacher's."""
    teachers = [made("llama", seed) for seed in (1, 2)]
    cache = hidden(tmp_path / "cache", teachers[0])
    rows = [{**row, "domain": ("a", "b")[i % 2]} for i, row in enumerate(ROWS)]
    students = [llama(0), llama(0)]
    for student, first in zip(students, (teachers[0], cache.path), strict=True):
        both = (first, teachers[1])
        ki = half(both) if several is tuple else half({"a": both[0], "b": both[1]}, domain="domain")
        options = {"remove_unused_columns": False, "max_steps": 3}
        KITrainer(
            model=student, args=arguments(tmp_path, **options), train_dataset=rows, data_collator=collate_text, ki=ki
        ).train()
    assert (parameters(students[0]) - parameters(llama(0))).abs().max() > 1e-3
    torch.testing.assert_close(*map(parameters, students), rtol=1e-4, atol=1e-5)


def collate_text(rows):
    return collate([{name: x for name, x in row.items() if name != "domain"} for row in rows])


def test_its_teachers_ce_and_held_out_ce_are_those_of_a_cache_of_probabilities(tmp_path):
    one = write(tmp_path / "one", held_out=ROWS[:9])
    other = hidden(tmp_path / "other", held_out=ROWS[:9])
    assert (one.teacher_ce, one.header.held_out_ce) == (other.teacher_ce, other.header.held_out_ce)
    batch = collate(ROWS[:5])
    assert torch.equal(one.read(batch)[1], other.read(batch)[1])
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert other.read(empty)[0].logits().shape == (0, VOCAB)
    assert other.bytes_on_disk == sum(x.stat().st_size for x in other.path.iterdir() if x.suffix == ".safetensors")


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 16}, r"top_k=16\).*the whole distribution"),
        ({"top_k": 0}, r"top_k=0\)"),
        ({"samples": 12}, "samples=12"),
        ({"temperature": 1.0}, "temperature=1.0.*KIConfig"),
        ({"seed": 0}, "seed=0"),
        ({"store": "logits"}, r"store='logits'.*'probabilities' or 'hidden'"),
        ({"store": None}, "store=None.*'probabilities' or 'hidden'"),
    ],
)
def test_settings_of_the_other_store_are_refused(tmp_path, options, says):
    with pytest.raises(GrowError, match=says):
        hidden(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


class Doubled(LlamaForCausalLM):
    """Its logits are not those of its head."""

    def forward(self, input_ids=None, **options):
        outputs = super().forward(input_ids, **options)
        outputs.logits = outputs.logits * 2
        return outputs


class NoLinear(torch.nn.Module):
    """A head of another kind."""

    def __init__(self, head):
        super().__init__()
        self.matrix = head.weight

    def forward(self, states):
        return states @ self.matrix.T


def other_head():
    model = llama(1)
    model.lm_head = NoLinear(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Doubled(llama(1).config), "it changes its logits after the head"),
        (other_head, "its head is a NoLinear"),
        (lambda: LlamaForTokenClassification(llama(1).config), "its head is missing"),
    ],
)
def test_a_teacher_without_access_to_its_head_is_refused(tmp_path, make, says):
    with pytest.raises(GrowError, match=f"no access to the head of the teacher .*{says}.*store='probabilities'"):
        hidden(tmp_path / "cache", make(), rows=[{**row, "labels": row["labels"].clamp(max=1)} for row in ROWS])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("student", "options", "says"),
    [
        (llama, {"tail": "bucket"}, "with a cache of hidden states.*top_k beside it"),
        (llama, {"top_k": VOCAB + 1}, f"at most {VOCAB}"),
        (bert, {}, "causal model, the student masked"),
        (lambda seed: llama(seed, vocab=VOCAB - 2), {}, f"vocab={VOCAB - 2}"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(tmp_path, student, options, says):
    cache = hidden(tmp_path / "cache")
    with pytest.raises(GrowError, match=says):
        train(tmp_path, student(0), KIConfig(teacher=cache.path, **options), ROWS)


def test_states_that_are_no_numbers_are_not_written(tmp_path):
    """A soft-cap makes finite logits of infinite states."""
    teacher = made("gemma2")
    with torch.no_grad():
        teacher.model.norm.weight[0] = 3e38
    assert teacher(**collate(ROWS)).logits.isfinite().all()
    with pytest.raises(GrowError, match="on example 0 are not numbers"):
        hidden(tmp_path / "cache", teacher)
    assert not (tmp_path / "cache" / FIRST).exists()


# Its head, which is stored once


def test_one_head_of_the_teachers_dtype_is_stored(tmp_path):
    teacher = made("bert").bfloat16()
    cache = hidden(tmp_path / "cache", teacher, vocab=VOCAB - 1)
    head = heads.read_head(cache.path, cache.header)
    assert torch.equal(head.weight, teacher.get_output_embeddings().weight[: VOCAB - 1])
    assert torch.equal(head.bias, teacher.get_output_embeddings().bias[: VOCAB - 1])
    assert sorted(os.listdir(cache.path)) == [HEAD, "header.json", *(f"shard-0000{i}.safetensors" for i in range(3))]


@pytest.mark.parametrize("change", ["missing", "cut", "empty", "of another teacher", "a folder", "of another dtype"])
def test_a_head_that_is_not_the_caches_is_named_and_written_again(tmp_path, change):
    cache, other = hidden(tmp_path / "cache"), hidden(tmp_path / "other", llama(2, hidden=8))
    path, before = cache.path / HEAD, bytes_of(cache.path)
    content = path.read_bytes()
    path.unlink()
    if change == "cut":
        path.write_bytes(content[:-5])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "a folder":
        path.mkdir()
    elif change == "of another teacher":
        shutil.copy(other.path / HEAD, path)
    elif change == "of another dtype":
        weight = llama(1, hidden=8).lm_head.weight.double()
        heads.write_head(cache.path, Projection(weight[:0], weight))
    for use in (TeacherCache, verify_cache, lambda folder: train(tmp_path, llama(0), half(folder), ROWS)):
        with pytest.raises(GrowError, match=rf"{HEAD} (is|was) (missing|damaged|changed).*cache_teacher call"):
            use(cache.path)
    if change != "missing":
        with pytest.raises(GrowError, match=HEAD):
            hidden(tmp_path / "cache")
        path.rmdir() if path.is_dir() else path.unlink()
    hidden(tmp_path / "cache")
    assert bytes_of(cache.path) == before


@pytest.mark.parametrize(
    "change",
    [{"vocab": 31}, {"width": 4}, {"dtype": torch.float64}, {"bias": 31}, {"scale": float("nan")}, {"softcap": -1.0}],
)
def test_a_head_that_fits_no_such_states_is_damaged_whatever_its_hash(tmp_path, change):
    def head(vocab=VOCAB, width=8, dtype=torch.float32, bias=VOCAB, scale=1.0, softcap=None):
        weight = torch.ones(vocab, width, dtype=dtype)
        return Projection(weight[:0], weight, torch.ones(bias, dtype=dtype), scale, softcap)

    cache = hidden(tmp_path / "cache")
    for fits, one in ((True, head()), (False, head(**change))):
        heads.write_head(cache.path, one)
        header = replace(cache.header, head=heads.head_hash(one))
        if fits:
            assert torch.equal(heads.read_head(cache.path, header).weight, one.weight)
        else:
            with pytest.raises(GrowError, match="it is no head of such states"):
                heads.read_head(cache.path, header)


def test_a_head_that_is_written_to_while_it_is_used_changes_nothing(tmp_path):
    cache, batch = hidden(tmp_path / "cache"), collate(ROWS)
    before = cache.read(batch)[0].logits()
    with (cache.path / HEAD).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert torch.equal(cache.read(batch)[0].logits(), before)


def test_a_call_that_ended_before_its_first_shard_may_be_followed_by_any_other(tmp_path, monkeypatch):
    """The head is always that of the header beside it."""
    teachers = {seed: llama(seed, hidden=8) for seed in (1, 2)}
    whole = {seed: bytes_of(hidden(tmp_path / f"{seed}", model).path) for seed, model in teachers.items()}
    for second, expected in (
        (lambda folder: hidden(folder, teachers[2]), whole[2]),
        (lambda folder: hidden(folder, teachers[1]), whole[1]),
        (write, bytes_of(write(tmp_path / "probabilities").path)),
    ):
        interrupt(monkeypatch, "_fill", lambda: hidden(tmp_path / "cache", teachers[1]))
        assert sorted(os.listdir(tmp_path / "cache")) == [HEAD, "header.json"]
        (tmp_path / "cache" / f".{HEAD}-7").write_bytes(b"half")
        assert bytes_of(second(tmp_path / "cache").path) == expected
        shutil.rmtree(tmp_path / "cache")


def interrupt(monkeypatch, name, call):
    """The call ends where it comes to this function."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"growlib.ki.cache.capture.{name}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_a_call_that_ended_between_two_headers_left_no_head_of_the_first(tmp_path, monkeypatch):
    teachers = [llama(seed, hidden=8) for seed in (1, 2)]
    interrupt(monkeypatch, "_fill", lambda: hidden(tmp_path / "cache", teachers[0]))
    for name in ("shards.write_header", "write_head"):
        interrupt(monkeypatch, name, lambda: hidden(tmp_path / "cache", teachers[1]))
        assert os.listdir(tmp_path / "cache") == ["header.json"]
    assert hidden(tmp_path / "cache", teachers[1]).positions


@pytest.mark.parametrize(("first", "second", "says"), [(hidden, write, "probabilities"), (write, hidden, "hidden")])
def test_the_other_store_is_another_cache(tmp_path, first, second, says):
    before = bytes_of(first(tmp_path / "cache").path)
    with pytest.raises(GrowError, match=f"another cache was begun there; this call has store='{says}'"):
        second(tmp_path / "cache")
    assert bytes_of(tmp_path / "cache") == before


def test_a_config_that_scales_otherwise_is_another_head(tmp_path):
    """The weights, and so their hash, are the same."""
    cache = hidden(tmp_path / "cache", made("cohere"))
    (cache.path / FIRST).unlink()
    other = made("cohere")
    other.config.logit_scale = other.logit_scale = 0.5
    with pytest.raises(GrowError, match="another head of the teacher"):
        hidden(tmp_path / "cache", other)
    hidden(tmp_path / "cache", made("cohere"))
    assert verify_cache(cache.path, made("cohere"), ROWS, data_collator=collate).kl == pytest.approx(0, abs=1e-6)
    assert not verify_cache(cache.path, other, ROWS, data_collator=collate).sound


def test_the_room_for_the_head_is_asked_for(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 280 * 32  # of the shards' records, less than a tenth of the head's
    teacher = llama(1, hidden=8, vocab=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 2 * needed))
    with pytest.raises(GrowError, match=r"it takes about .* GB more"):
        hidden(tmp_path / "cache", teacher)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 2 * needed + 4 * 4096 * 8))
    hidden(tmp_path / "cache", teacher)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, needed))
    (tmp_path / "cache" / FIRST).unlink()
    hidden(tmp_path / "cache", teacher)  # the head is there


# The same cache on the command line


def test_the_command_line(tmp_path, capsys):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"input_ids": {row["input_ids"].tolist()}}}' for row in ROWS))
    words = ["cache", str(tmp_path / "teacher"), str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]
    assert main([*words, "--store", "hidden", "--top-k", "4"]) == 2
    assert "no top_k, samples, temperature or seed" in capsys.readouterr().err
    assert main([*words, "--store", "hidden"]) == 0
    assert TeacherCache(tmp_path / "cache").header.store == "hidden"
    assert main(["cache", "verify", words[3], *words[1:3]]) == 0
    assert "positions of 32 bytes: whole; the teacher" in capsys.readouterr().out
    for served in ("answers", "http://localhost:1/v1"):
        assert main(["cache", served, words[2], str(tmp_path / "x"), "--store", "hidden"]) == 2
        assert "do not give hidden states" in capsys.readouterr().err


@pytest.mark.parametrize("maker", [llama, bert, t5])
def test_a_teacher_that_is_cast_is_exact_in_what_it_was_cast_to(tmp_path, maker):
    maker(1, hidden=8).save_pretrained(tmp_path / "teacher")
    cache = hidden(tmp_path / "cache", tmp_path / "teacher", dtype=torch.bfloat16)
    assert cache.header.record_format.bytes_per_position == 2 * 8
    result = verify_cache(cache.path, tmp_path / "teacher", ROWS, data_collator=collate)
    assert result.sound
    assert result.identical > 0.9


def test_a_shard_that_was_cut_is_named_and_a_flipped_bit_of_a_state_is_too(tmp_path):
    cache = hidden(tmp_path / "cache")
    content = (cache.path / FIRST).read_bytes()
    (cache.path / FIRST).write_bytes(content[:-3])
    with pytest.raises(GrowError, match=f"{FIRST} is damaged"):
        TeacherCache(cache.path)
    place = content.index(cache.shards[0].records[5].tobytes())
    (cache.path / FIRST).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(GrowError, match="its bytes do not match their checksum"):
        TeacherCache(cache.path).read(collate(ROWS[:16]))
