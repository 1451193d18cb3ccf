"""A cache's data, place and files, each of which may be anything: only GrowError comes out, and before the work."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ki_tiny import VOCAB, bert, collate, examples, llama
from test_ki_cache import HIDDEN, STORES, bytes_of, write
from test_ki_cache_files import FIRST
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from growlib import GrowError, cache_teacher
from growlib.cli import main
from growlib.ki import TeacherCache, verify_cache
from growlib.ki.cache import shards
from growlib.ki.cache.data import padded, read_examples
from growlib.ki.cache.examples import examples_of
from growlib.ki.tasks import Positions

TEMPLATE = (
    "{% for m in messages %}{{ 'word1' if m['role'] == 'user' else 'word2' }} {{ m['content'] }} word31 {% endfor %}"
)


def words(template=TEMPLATE):
    table = {f"word{i}": i for i in range(VOCAB)}
    inner = Tokenizer(WordLevel(table, unk_token="word0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="word31", chat_template=template)


@pytest.fixture
def teacher(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    words().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# What is cached


CHAT = [{"role": "user", "content": "word5 word6"}, {"role": "assistant", "content": "word7"}]


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"text": "word5 word6 word7"}, [[5, 6, 7]]),
        ({"text": "word5 " * 9}, [[5] * 4, [5] * 4, [5]]),
        ({"messages": CHAT}, [[1, 5, 6, 31], [2, 7, 31]]),
        ({"messages": CHAT, "text": "word9", "source": "a"}, [[1, 5, 6, 31], [2, 7, 31]]),
        ({"input_ids": [3, 4], "text": "word9"}, [[3, 4]]),
    ],
)
def test_lines_of_text_and_of_messages_are_tokenised(tmp_path, teacher, row, ids):
    data = lines(tmp_path / "x.jsonl", {"input_ids": [9, 9]}, row)
    assert main(["cache", str(teacher), str(data), str(tmp_path / "cache"), "--top-k", "4", "--length", "4"]) == 0
    rows = read_examples(data, words(), 4)
    assert [x["input_ids"] for x in rows[1:]] == ids
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == 1 + len(ids)
    assert len(cache.find([e for row in rows for e in shown(row)])) == sum(len(x) > 1 for x in [[9, 9], *ids])


def shown(row):
    batch = padded([row])
    return examples_of(batch, "causal", Positions.of(batch, "causal"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "it has 'prompt', 'completion', and no input_ids.*messages",
        ),
        ({}, "it has no columns, and no input_ids"),
        ({"text": 3}, "its text is a int"),
        ({"text": ["a"]}, "its text is a list"),
        ({"text": ""}, "its text has no tokens"),
        ({"messages": "word5"}, "its messages cannot be encoded"),
        ({"messages": [{"role": 3}]}, "."),
        ({"messages": [1, 2]}, "its messages cannot be encoded"),
        ({"messages": None}, "its messages cannot be encoded"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "it has 1 attention_mask for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [0.5, 1]}, "its labels are not token ids"),
        ({"input_ids": [1, VOCAB]}, f"there are input_ids from 1 to {VOCAB}"),
        ({"input_ids": [1, 2], "labels": [1, VOCAB]}, f"there are labels from {VOCAB} to {VOCAB}"),
        ({"input_ids": [1, 2], "labels": [1, -7]}, "there are labels from -7 to -7"),
        ({"input_ids": "word1"}, "its input_ids are not token ids"),
        ("[1, 2]", "not an example but a list"),
        ("{" * 99_999, "line 2: it is not an example"),
    ],
)
def test_a_line_that_is_no_example_says_what_one_is(tmp_path, teacher, row, says, capsys):
    data = lines(tmp_path / "x.jsonl", {"input_ids": [9, 9]}, row)
    code = main(["cache", str(teacher), str(data), str(tmp_path / "cache"), "--top-k", "4"])
    if code == 0:  # a template may take what it does not need
        assert says == "."
        return
    assert code == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "cache" / FIRST).exists()


@pytest.mark.parametrize(("column", "says"), [("text", "need a tokenizer"), ("messages", "need a tokenizer")])
def test_text_needs_a_tokenizer_and_messages_a_template(tmp_path, teacher, column, says, capsys):
    data = lines(tmp_path / "x.jsonl", {column: CHAT if column == "messages" else "word1 word2"})
    with pytest.raises(GrowError, match=says):
        read_examples(data)
    if column == "messages":
        with pytest.raises(GrowError, match="the teacher's tokenizer has no chat template"):
            read_examples(data, words(None))
        with pytest.raises(GrowError, match="its messages cannot be encoded"):
            read_examples(data, words("{{ raise_exception('no') }}"))


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": CHAT}, {"prompt": "a", "completion": "b"}])
def test_rows_of_text_in_python_are_told_which_columns_are_needed(tmp_path, row):
    with pytest.raises(GrowError, match=r"an example has the columns .*Valid: input_ids and labels: tokenise"):
        cache_teacher(llama(1, hidden=8), [row] * 3, tmp_path / "cache", top_k=4)


# Where it is read from


def odd_files(folder):
    """name -> a path that is no file to read."""
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "dangling.npy").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zero.npy").symlink_to("/dev/zero")
    (folder / "empty").mkdir()
    (folder / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(folder)  # the name of a socket is short
        unix.bind("socket")
        os.chdir(here)


@pytest.mark.parametrize(
    "name",
    ["fifo", "fifo.jsonl", "dangling.npy", "loop", "zero.npy", "empty", "folder.jsonl", "socket", "/dev/zero",
     "/dev/stdin", "/dev/null", "/proc/self/mem", "x" * 300, "a\0b", "no"],
)  # fmt: skip
def test_data_that_is_no_file_is_named_at_once(tmp_path, teacher, name, capsys):
    (tmp_path / "odd").mkdir()
    odd_files(tmp_path / "odd")
    words_ = ["cache", str(teacher), str(tmp_path / "odd" / name), str(tmp_path / "cache"), "--top-k", "4"]
    assert main(words_) == 2
    assert "reading examples" in capsys.readouterr().err


PUT = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "dangling": lambda path: path.symlink_to("no"),
    "device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", PUT)
def test_a_teachers_file_that_is_none(tmp_path, teacher, name, kind):
    path = teacher / name
    path.unlink()
    PUT[kind](path)
    with suppress(GrowError):
        write(tmp_path / "cache", teacher)
        assert name.startswith("tokenizer")


@pytest.mark.parametrize("name", ["header.json", FIRST, "head.safetensors"])
@pytest.mark.parametrize("kind", PUT)
def test_a_caches_file_that_is_none(tmp_path, name, kind):
    store = HIDDEN if name == "head.safetensors" else {}
    path = write(tmp_path / "cache", **store).path / name
    path.unlink()
    PUT[kind](path)
    with pytest.raises(GrowError):
        verify_cache(tmp_path / "cache")
    with suppress(GrowError):  # a link that leads nowhere is a file that is missing
        write(tmp_path / "cache", **store)
        assert kind == "dangling"
        verify_cache(tmp_path / "cache")


# Where it is written


def occupied(folder):
    (folder / "file").write_text("kept")
    (folder / "link").symlink_to(folder / "file")
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo")
    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("kept")


@pytest.mark.parametrize(
    "name",
    ["file", "link", "dangling", "loop", "fifo", "file/cache", "loop/cache", "x" * 300, "a\0b", "/dev/null",
     "/dev/full", "/proc/cache", "/proc/self/cache", "/sys/cache"],
)  # fmt: skip
def test_a_place_where_nothing_can_be_written_is_named_before_the_work(tmp_path, monkeypatch, name):
    occupied(tmp_path)
    monkeypatch.setattr("growlib.ki.cache.capture.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(GrowError, match="caching a teacher in"):
        write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("path", [None, 3, ["a"], {}, b"\xff\0", torch.zeros(1)])
def test_what_is_no_path(path):
    with pytest.raises(GrowError):
        write(path)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    occupied(tmp_path)
    with pytest.raises(GrowError, match="the folder holds other files"):
        write(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["kept.txt"]


@pytest.mark.parametrize("free", [0, 1000])
@STORES
def test_a_disk_without_room_is_named_before_the_work(tmp_path, monkeypatch, free, store):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))
    monkeypatch.setattr("growlib.ki.cache.capture._fill", lambda *_: pytest.fail("it began"))
    with pytest.raises(GrowError, match=r"it takes about .* GB more, and .* GB of the disk are free"):
        write(tmp_path / "cache", **store)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no"), OSError(5, "io")])
@pytest.mark.parametrize("what", ["save_file", "os.replace", "os.fsync"])
@STORES
def test_a_disk_that_fails_in_the_middle(tmp_path, monkeypatch, error, what, store):
    """One line says it, and the same call goes on. The second file is the head, or a shard."""
    expected, calls = bytes_of(write(tmp_path / "whole", **store).path), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    owner, name = (os, what[3:]) if what.startswith("os.") else (shards, what)
    real = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(GrowError, match="a file cannot be written"):
            write(tmp_path / "cache", **store)
    assert all(not file.startswith(".") for file in os.listdir(tmp_path / "cache"))
    assert bytes_of(write(tmp_path / "cache", **store).path) == expected


@STORES
def test_the_second_of_two_writers_is_told(tmp_path, store):
    cache = write(tmp_path / "cache", **store)
    (cache.path / FIRST).unlink()
    before = bytes_of(cache.path)
    with shards.alone(cache.path), pytest.raises(GrowError, match="another call writes to it now"):
        write(tmp_path / "cache", **store)
    assert bytes_of(cache.path) == before
    write(tmp_path / "cache", **store)


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002, 0o027])
@STORES
def test_modes_are_those_that_the_umask_asks_for(tmp_path, umask, store):
    before = os.umask(umask)
    try:
        path = write(tmp_path / "a" / "cache", **store).path
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}
    assert {folder.stat().st_mode & 0o777 for folder in (path, path.parent)} == {0o777 & ~umask}


@pytest.mark.parametrize(
    "left", [[], [".header.json-1"], [".shard-00000.safetensors-1", ".shard-00001.safetensors-22"]]
)
def test_what_a_killed_call_left_is_removed_by_the_next(tmp_path, left):
    expected = bytes_of(write(tmp_path / "whole").path)
    cache = write(tmp_path / "cache").path
    for name in left:
        (cache / name).write_text("half")
    assert bytes_of(write(cache).path) == expected


@pytest.mark.slow
def test_without_a_home(tmp_path):
    code = (
        "import growlib.ki, sys; from growlib import KIConfig, GrowError\n"
        "try: growlib.ki.TeacherCache('~/nowhere')\n"
        "except GrowError as error: print('refused')\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


def test_a_masked_models_labels_out_of_range(tmp_path):
    rows = examples(4)
    rows[2]["labels"][7] = VOCAB + 3
    with pytest.raises(GrowError, match=f"there are labels from .* to {VOCAB + 3}"):
        cache_teacher(bert(1, hidden=8), rows, tmp_path / "cache", data_collator=collate, top_k=4)
