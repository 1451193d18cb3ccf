"""Run a teacher over a dataset once, and keep what it says."""

import os
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from growlib.errors import GrowError
from growlib.ki.cache import hashes
from growlib.ki.cache.data import Examples
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.cache.records import Layout
from growlib.ki.cache.shards import FORMAT, Header, read_header, shard_path, write_header, write_shard
from growlib.ki.cache.source import Collator, Source
from growlib.ki.heads import outcomes
from growlib.ki.teacher import Teacher, load_teacher, tokenizer_at


def cache_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str],
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    top_k: int = 16,
    samples: int = 12,
    temperature: float = 1.0,
    seed: int = 0,
    vocab: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_collator: Collator = default_data_collator,
    held_out: Any = None,
    batch_size: int = 8,
    shard_examples: int = 1024,
    head: str | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherCache:
    """Write what a teacher says about every example of a dataset, for `KIConfig(teacher=path)`.

    A call that was interrupted, at any moment, goes on where it was, with any number of processes (`accelerate
    launch`); the result has the same bytes. With the defaults a position takes 104 bytes (92 where the vocabulary has
    at most 2^16 ids); `top_k=4, samples=6` takes 38.

    Args:
        teacher: as in `KIConfig`.
        dataset: of examples as the Trainer takes them, with an index, or iterable (it is then read from its beginning
            three times); a masked language model's masks must not change from one reading to the next
            (`MaskedExamples`).
        path: a folder, new or of an interrupted call.
        top_k: exact tokens per position.
        samples: draws per position from the rest; 0: none, and the rest is a bucket.
        temperature: τ of the stored probabilities, at which alone they can be used.
        seed: of the draws.
        vocab: how many token ids, from 0, the student shares; None: the teacher's.
        tokenizer: the one that made the tokens; None: the one beside the teacher's weights.
        data_collator: makes a batch with labels of a list of examples.
        held_out: a dataset on which the teacher's CE is measured, for `KIConfig(stop_at="auto")`.
        batch_size: examples per forward pass.
        shard_examples: examples per file; at most one file's work is lost.
        head: "causal", "masked" or "seq2seq", for a teacher that is given by its folder; None: causal.
        dtype: what the teacher is cast to.

    Raises:
        GrowError: the dataset can be read only once, the settings cannot be, or the folder holds another cache.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes of accelerate or torchrun
    for name, size in (("batch_size", batch_size), ("shard_examples", shard_examples)):
        if size < 1:
            raise GrowError(f"cache_teacher({name}={size})", "that is no number of examples", "1 or more")
    examples = Examples(dataset, "dataset")
    held_out = None if held_out is None else Examples(held_out, "held_out")
    model = placed(teacher, head or "causal", dtype)
    tokenizer = tokenizer or tokenizer_at(model.name_or_path or "")
    layout = Layout(vocab or outcomes(model), top_k, samples, temperature)
    if layout.vocab > outcomes(model):
        raise GrowError(
            f"cache_teacher(vocab={vocab})", "the teacher has not so many ids", f"at most {outcomes(model)}"
        )
    source = Source(Teacher(model, layout.vocab), data_collator, batch_size)
    header = Header(
        format=FORMAT,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        teacher=hashes.weights_hash(model),
        tokenizer=None if tokenizer is None else hashes.tokenizer_hash(tokenizer),
        head=source.head,
        vocab=layout.vocab,
        top_k=top_k,
        samples=samples,
        temperature=temperature,
        seed=seed,
        examples=len(examples),
        dataset=hashes.digests_hash(map(source.digest, examples.at(hashes.spread(len(examples))))),
        shard_examples=shard_examples,
        batch_size=batch_size,
        held_out_ce=None if held_out is None else source.mean_ce(held_out),
    )
    folder = Path(path)
    if state.is_main_process:
        _begin(folder, header)
    state.wait_for_everyone()
    _fill(folder, header, source, examples, state)
    return TeacherCache(folder)


def placed(teacher: PreTrainedModel | str | os.PathLike[str], head: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """A teacher, loaded where it is not yet, on this process's device, unless it has a device map of its own."""
    model: Any = teacher if isinstance(teacher, PreTrainedModel) else load_teacher(os.fspath(teacher), head, dtype)
    if getattr(model, "hf_device_map", None) is None:
        model.to(device=PartialState().device, dtype=dtype)
    return model


def _fill(folder: Path, header: Header, source: Source, dataset: Examples, state: PartialState) -> None:
    """Write the shards that are missing, shared out among the processes."""
    missing = [number for number in range(header.shards) if not shard_path(folder, number).exists()]
    missing = broadcast_object_list([missing])[0]
    mine = {}
    for number in missing[state.process_index :: state.num_processes]:
        first = number * header.shard_examples
        mine[number] = range(first, min(first + header.shard_examples, len(dataset)))
    examples = dataset.at(chain.from_iterable(mine.values()))
    shards = tqdm(mine.items(), desc="teacher", unit="shard", disable=not state.is_main_process, mininterval=1.0)
    for number, numbers in shards:
        rows = source.rows(islice(examples, len(numbers)), header.layout, header.seed)
        write_shard(shard_path(folder, number), header.key, rows)
    state.wait_for_everyone()


def _begin(folder: Path, header: Header) -> None:
    """Write the header, or find the one of an interrupted call."""
    asked = f"caching a teacher in {str(folder)!r}"
    if is_cache(folder):
        difference = read_header(folder).difference(header)
        if difference:
            raise GrowError(asked, f"a cache was begun there with something else: now {difference}", "a new folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GrowError(asked, "something else stands there", "a new folder, or that of an interrupted call")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_header(folder, header)
    for abandoned in folder.glob(".shard-*"):
        abandoned.unlink(missing_ok=True)
