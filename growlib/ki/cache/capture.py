"""Run a teacher over a dataset once, and keep what it says."""

import operator
import os
from itertools import chain, islice
from numbers import Real
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
from growlib.ki.cache.shards import FORMAT, Header, not_written, read_header, shard_path, write_header, write_shard
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
            four times); a masked language model's masks must not change from one reading to the next
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
        head: "causal", "masked" or "seq2seq", for a teacher that is given by its folder; None: what its config names.
        dtype: what the teacher is cast to.

    Raises:
        GrowError: the dataset can be read only once or is another each time, the settings cannot be, the teacher's
            logits are no numbers or mix packed examples, or the folder holds another cache or cannot be written to.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes of accelerate or torchrun
    batch_size = _whole("batch_size", batch_size, 1)
    shard_examples = _whole("shard_examples", shard_examples, 1)
    seed = _whole("seed", seed, -(1 << 63), (1 << 63) - 1)
    if not isinstance(temperature, Real):
        raise GrowError(f"cache_teacher(temperature={temperature!r})", "that is no number", "such as 1.0")
    examples = Examples(dataset, "dataset")
    held_out = None if held_out is None else Examples(held_out, "held_out")
    model = placed(teacher, head, dtype)
    if tokenizer is None:
        tokenizer = tokenizer_at(model.name_or_path or "")
    size = outcomes(model)
    layout = Layout(
        size if vocab is None else _whole("vocab", vocab, 1, size),
        _whole("top_k", top_k, 0),
        _whole("samples", samples, 0),
        float(temperature),
    )
    source = Source(Teacher(model, layout.vocab), data_collator, batch_size)
    header = Header(
        format=FORMAT,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        teacher=hashes.weights_hash(model),
        tokenizer=None if tokenizer is None else hashes.tokenizer_hash(tokenizer),
        head=source.head,
        vocab=layout.vocab,
        top_k=layout.top_k,
        samples=layout.samples,
        temperature=layout.temperature,
        seed=seed,
        examples=len(examples),
        dataset=source.dataset_hash(examples),
        shard_examples=shard_examples,
        batch_size=batch_size,
        held_out_ce=None if held_out is None else source.mean_ce(held_out),
    )
    folder = Path(os.path.expanduser(path))
    refusal = broadcast_object_list([_begin(folder, header) if state.is_main_process else None])[0]
    if refusal is not None:  # in every process
        raise refusal
    _fill(folder, header, source, examples, state)
    return TeacherCache(folder)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A setting of any type of whole number, such as numpy's."""
    valid = f"a whole number, {least} " + ("or more" if most is None else f"to {most}")
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise GrowError(f"cache_teacher({name}={value!r})", "that is no whole number", valid) from error
    if number < least or (most is not None and number > most):
        raise GrowError(f"cache_teacher({name}={number})", "that is out of range", valid)
    return number


def placed(
    teacher: PreTrainedModel | str | os.PathLike[str], head: str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A teacher, loaded where it is not yet, on this process's device, unless it has a device map of its own."""
    if not isinstance(teacher, PreTrainedModel | str | os.PathLike):
        wrong = f"the teacher is a {type(teacher).__name__}"
        raise GrowError("cache_teacher", wrong, "a PreTrainedModel, a folder or a hub id")
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
        rows = source.rows(islice(examples, len(numbers)), header.layout, header.seed, numbers.start)
        write_shard(shard_path(folder, number), header.key, rows)
    state.wait_for_everyone()


def _begin(folder: Path, header: Header) -> GrowError | None:
    """Write the header, or find the one of an interrupted call. Returns what speaks against it."""
    asked, valid = f"caching a teacher in {str(folder)!r}", "a new folder, or that of an interrupted call"
    try:
        abandoned = [*folder.glob(".header.json-*"), *folder.glob(".shard-*")]
        begun = read_header(folder) if is_cache(folder) else None
        difference = begun and begun.difference(header)
        if difference and any(folder.glob("shard-*")):
            return GrowError(asked, f"a cache was begun there with something else: now {difference}", valid)
        if begun is None and folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {*abandoned}):
            return GrowError(asked, "something else stands there", valid)
        folder.mkdir(parents=True, exist_ok=True)
        for path in abandoned:
            path.unlink(missing_ok=True)
        if begun is None or difference:
            write_header(folder, header)
    except GrowError as error:
        return error
    except OSError as error:
        return not_written(folder, error)
    return None
