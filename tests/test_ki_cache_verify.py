"""What the verification of a cache compares, and what it names."""

import json

import pytest
import torch
from ki_tiny import VOCAB, collate, examples, llama
from test_ki_cache import ROWS, STORES, write
from test_ki_teacher import tokenizer

from growlib import GrowError
from growlib.cli import main
from growlib.ki import verify_cache


def verify(cache, *sources, **options):
    return verify_cache(cache.path, *sources, data_collator=collate, **options)


@STORES
def test_a_sample_may_hold_no_position(tmp_path, store):
    rows = [*ROWS[:3], {**ROWS[3], "labels": torch.full((10,), -100)}]
    cache = write(tmp_path / "cache", rows=rows, **store)
    assert verify(cache, llama(1, hidden=8), rows).compared == cache.positions
    nothing = verify(cache, llama(1, hidden=8), rows, sample=0)
    assert (nothing.compared, nothing.identical, nothing.kl) == (0, 1.0, 0.0)


def test_a_teacher_that_is_given_is_not_cast(tmp_path):
    teacher = llama(1, hidden=8)
    teacher.save_pretrained(tmp_path / "teacher")
    cache = write(tmp_path / "cache", tmp_path / "teacher", dtype=torch.bfloat16)
    with pytest.raises(GrowError, match=r"in torch.float32, and the cache was written in torch.bfloat16"):
        verify(cache, teacher, ROWS)
    assert teacher.dtype == torch.float32
    assert verify(cache, teacher.bfloat16(), ROWS).sound
    tokenizer(VOCAB).save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({k: x.tolist() for k, x in row.items()}) for row in ROWS))
    words = ["cache", "verify", str(cache.path), str(tmp_path / "teacher"), str(tmp_path / "rows.jsonl")]
    assert main(words) == 0
    other = write(tmp_path / "other", teacher, dtype=torch.bfloat16, tokenizer=tokenizer(VOCAB - 1))
    assert main([*words[:2], str(other.path), *words[3:]]) == 2


@STORES
@pytest.mark.parametrize("teacher", [(llama(1, hidden=8),), (None,)])
def test_a_changed_or_shuffled_dataset_is_named_with_and_without_a_teacher(tmp_path, teacher, store):
    cache = write(tmp_path / "cache", **store)
    verify(cache, *teacher, ROWS)
    changed = [*ROWS]
    changed[7] = examples(41)[40]
    with pytest.raises(GrowError, match="not among its 40"):
        verify(cache, *teacher, changed, sample=2)
    with pytest.raises(GrowError, match="in another order"):
        verify(cache, *teacher, ROWS[::-1])


def test_another_tokenizer_is_named(tmp_path):
    cache = write(tmp_path / "cache", tokenizer=tokenizer(VOCAB))
    verify(cache, tokenizer=tokenizer(VOCAB))
    with pytest.raises(GrowError, match="written with another tokenizer"):
        verify(cache, tokenizer=tokenizer(VOCAB - 1))
