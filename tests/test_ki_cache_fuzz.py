"""Data and files of a cache that hold anything: only GrowError comes out."""

import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ki_tiny import VOCAB, collate, llama
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_ki_cache import HIDDEN, ROWS, bytes_of, content, write
from test_ki_cache_faults import words
from test_ki_cache_files import FIRST
from test_ki_sources_fuzz import JSON

from growlib import GrowError
from growlib.ki import TeacherCache, verify_cache
from growlib.ki.cache import shards
from growlib.ki.cache.data import padded, read_examples

FUZZ = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


COLUMNS = dict.fromkeys(("labels", "attention_mask", "position_ids", "token_type_ids"), JSON)
LINES = (
    st.lists(JSON.map(json.dumps) | st.text(max_size=8), max_size=3)
    | st.lists(st.fixed_dictionaries({"input_ids": JSON}, optional=COLUMNS).map(json.dumps), min_size=1, max_size=2)
    | st.fixed_dictionaries({"messages": JSON}).map(lambda row: [json.dumps(row)])
)


@settings(max_examples=80, **FUZZ)
@given(rows=LINES)
@example(rows=['{"input_ids": [1, 2], "labels": [[1], [2]]}'])
@example(rows=['{"input_ids": [1, 2], "labels": null}'])
def test_lines_of_anything_are_cached_or_refused(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    (folder / "x.jsonl").write_text("\n".join(rows), encoding="utf-8", errors="replace")
    with suppress(GrowError):
        found = read_examples(folder / "x.jsonl", words())
        write(folder / "cache", SMALL, found, data_collator=padded, top_k=2, samples=1)


SMALL = llama(1, hidden=8)


@settings(max_examples=80, **FUZZ)
@given(data=st.data())
def test_an_array_with_a_broken_byte_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.npy"
    np.save(path, np.arange(24, dtype=np.int32).reshape(3, 8))
    _break(path, data)
    with suppress(GrowError):
        write(path.parent / "cache", SMALL, read_examples(path), data_collator=padded, top_k=2, samples=1)


def _break(path, data):
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, min(len(content) - 1, 200)))
    content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "cache", shard_examples=64).path


@pytest.fixture(scope="module")
def whole_hidden(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hidden") / "cache", shard_examples=64, **HIDDEN).path


@settings(max_examples=60, **FUZZ)
@given(data=st.data())
@pytest.mark.parametrize("name", ["header.json", FIRST, "head.safetensors"])
def test_no_broken_byte_of_a_cache_passes(whole, whole_hidden, tmp_path_factory, name, data):
    whole = whole_hidden if name == "head.safetensors" else whole
    folder = tmp_path_factory.mktemp("any") / "cache"
    shutil.copytree(whole, folder)
    _break(folder / name, data)
    if bytes_of(folder) == bytes_of(whole):
        return
    with suppress(GrowError):
        verify_cache(folder)
        assert json.loads((folder / "header.json").read_text()) == json.loads((whole / "header.json").read_text())
        assert all(load_equal(folder / path.name, path) for path in whole.glob("*.safetensors"))


def load_equal(one, other):
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=False) for name in a)


@settings(max_examples=30, **FUZZ)
@given(fields=st.dictionaries(st.sampled_from([*shards.FIELDS, "key", "more"]), JSON, min_size=1, max_size=2))
@example(fields={"hidden_size": 8, "hidden_dtype": "float32"})
@example(fields={"hidden_size": 4, "hidden_dtype": "float64"})
@example(fields={"head": None})
@example(fields={"head": "0", "hidden_size": None})
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("store", [{}, HIDDEN], ids=["probabilities", "hidden"])
def test_a_header_of_any_fields_is_read_or_refused(whole, whole_hidden, tmp_path_factory, fields, signed, store):
    """Signed: its own hash is made to match, as by somebody who edits it on purpose."""
    whole = whole_hidden if store else whole
    folder = tmp_path_factory.mktemp("any") / "cache"
    shutil.copytree(whole, folder)
    header = json.loads((folder / "header.json").read_text()) | fields
    with suppress(TypeError, ValueError):
        if signed:
            known = {name: header[name] for name in shards.FIELDS}
            header["key"] = shards.Header(**known).key
    (folder / "header.json").write_text(json.dumps(header))
    with suppress(GrowError):
        cache = TeacherCache(folder)
        assert content(cache.read(collate(ROWS))[0]).isfinite().all()
    with suppress(GrowError):
        write(folder, shard_examples=64, **store)


@settings(max_examples=40, **FUZZ)
@given(data=st.data())
@pytest.mark.parametrize("store", [{}, HIDDEN], ids=["probabilities", "hidden"])
def test_records_of_anything_are_refused_or_numbers(whole, whole_hidden, tmp_path_factory, data, store):
    """With checksums that match."""
    whole = whole_hidden if store else whole
    folder = tmp_path_factory.mktemp("any") / "cache"
    shutil.copytree(whole, folder)
    with safe_open(folder / FIRST, "numpy") as file:
        key = file.metadata()["cache"].split(" ")[0]
        tensors = {name: np.array(file.get_tensor(name)) for name in (*shards.INDEX, "records")}
    row = data.draw(st.integers(0, len(tensors["records"]) - 1))
    width = tensors["records"].shape[1]
    tensors["records"][row] = data.draw(st.lists(st.integers(0, 255), min_size=width, max_size=width))
    number = int(np.searchsorted(tensors["starts"], row, "right")) - 1
    part = tensors["records"][tensors["starts"][number] : tensors["starts"][number + 1]]
    tensors["checksums"][number] = zlib.crc32(part.tobytes())
    index = {name: tensors[name] for name in shards.INDEX}
    metadata = {"cache": f"{key} {Path(FIRST).stem} {shards._checksum(index)}"}
    save_file(tensors, folder / FIRST, metadata)
    with suppress(GrowError):
        targets, _ = TeacherCache(folder).read(collate(ROWS))
        assert content(targets).isfinite().all()
        if store:
            return
        assert targets.ids.max() < VOCAB
        assert not targets.logprobs.isnan().any()
        assert not targets.tail.isnan().any()
