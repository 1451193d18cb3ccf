"""Run a teacher over a dataset once, and keep its targets."""

import dataclasses
import operator
import os
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from growlib.errors import GrowError
from growlib.ki.cache import shards
from growlib.ki.cache.batches import Collator
from growlib.ki.cache.data import Examples
from growlib.ki.cache.heads import HEAD, head_bytes, head_hash, write_head
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.cache.recorder import Recorder
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.states import state_format
from growlib.ki.head_access import tensor_parallel
from growlib.ki.projection import Projection
from growlib.ki.sources import load_teacher, model_in, name_of, short, tokenizer_at
from growlib.ki.tasks import outcomes, task_of
from growlib.ki.teacher import Teacher, place

DEFAULTS = {"top_k": 16, "samples": 12, "temperature": 1.0, "seed": 0}  # of stored probabilities


def cache_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str],
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    store: Literal["probabilities", "hidden"] = "probabilities",
    top_k: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    vocab: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_collator: Collator = default_data_collator,
    held_out: Any = None,
    batch_size: int = 8,
    shard_examples: int = 1024,
    task: str | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherCache:
    """Write a teacher's targets for every example of a dataset, for `KIConfig(teacher=path)`.

    An interrupted call continues where it stopped, with any number of processes (`accelerate launch`); the result has
    the same bytes. With the defaults a position takes 104 bytes (92 with at most 2^16 token ids), with `top_k=4,
    samples=6` 38, and with `store="hidden"` 2 H (H: the teacher's hidden size; float32: 4 H).

    Args:
        teacher: as in `KIConfig`.
        dataset: of examples as the Trainer takes them, with an index, or iterable (it is then read four times); a
            masked language model's masks must be the same each time (`MaskedExamples`).
        path: a folder, new or of an interrupted call.
        store: "probabilities" of the most probable tokens and of draws; or "hidden", the states that the teacher's
            head reads and, once, this head: its whole distribution, exact, at any temperature.
        top_k: with probabilities, as all until `seed`: exact tokens per position; None: 16.
        samples: draws per position from the tail; 0: none, and the tail is a bucket; None: 12.
        temperature: τ of the stored probabilities. They can be used at this τ only. None: 1.
        seed: of the draws; None: 0.
        vocab: how many token ids, from 0, teacher and student share; None: all of the teacher's.
        tokenizer: what made the tokens; None: the tokenizer beside the teacher's weights.
        data_collator: makes a batch with labels of a list of examples.
        held_out: a dataset on which the teacher's CE is measured, for `KIConfig(stop_at="auto")`.
        batch_size: examples per forward pass.
        shard_examples: examples per file; at most one file's work is lost.
        task: such as "causal", "masked" or "seq2seq", of a teacher that is given by its folder; None: what its config
            names.
        dtype: what a teacher that is given by its folder is loaded in.

    Raises:
        GrowError: the dataset can be read only once or changes from one reading to the next; a setting is out of range,
            or not for this store; the teacher cannot read it, its logits are no numbers, or depend on the examples
            before in a packed row; growlib has no access to its head, whose states are asked for; or the folder holds
            another cache, is written to by another call, or cannot be written to.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes of accelerate or torchrun
    batch_size = _whole("batch_size", batch_size, 1)
    shard_examples = _whole("shard_examples", shard_examples, 1)
    settings = _settings(store, {"top_k": top_k, "samples": samples, "temperature": temperature, "seed": seed})
    folder = _folder(path)
    shards.check_place(folder)
    examples = Examples(dataset, "dataset")
    held_out = None if held_out is None else Examples(held_out, "held_out")
    model, lent = placed(teacher, task, dtype)
    if tokenizer is None:
        tokenizer = tokenizer_at(model.name_or_path or "")
    vocab = outcomes(model) if vocab is None else _whole("vocab", vocab, 1, outcomes(model))
    reader = Teacher(model, vocab, device=state.device, lent=lent)
    seed = settings.pop("seed")
    record_format = RecordFormat(vocab, **settings) if store == "probabilities" else state_format(reader, vocab)
    try:
        recorder = Recorder(reader, data_collator, batch_size, record_format, seed)
        glance = recorder.batches.glance(examples)
        head = recorder.head(glance.longest)
        header = shards.Header(
            format=shards.FORMAT,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            teacher=shards.weights_hash(model),
            tokenizer=None if tokenizer is None else shards.tokenizer_hash(tokenizer),
            task=recorder.batches.task,
            **({"top_k": 0, "samples": 0, "temperature": 1.0} | dataclasses.asdict(record_format)),
            seed=seed,
            examples=len(examples),
            dataset=glance.hash,
            shard_examples=shard_examples,
            batch_size=batch_size,
            held_out_ce=None if held_out is None else recorder.mean_ce(held_out),
            head=None if head is None else head_hash(head),
        )
        write_cache(folder, header, glance.positions, recorder, examples, state, head)
    finally:
        reader.give_back()
    return TeacherCache(folder)


def _folder(path: Any) -> Path:
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "\0"
    if "\0" in text:
        raise GrowError(f"caching a teacher in {short(path)}", "it is no path", "a folder")
    return Path(os.path.expanduser(text))


def _settings(store: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of stored probabilities, checked; None is the default. Raises GrowError where the store has none."""
    if store not in ("probabilities", "hidden"):
        raise GrowError(f"cache_teacher(store={short(store)})", "there is no such store", "'probabilities' or 'hidden'")
    given = {name: value for name, value in given.items() if value is not None}
    if store == "hidden" and given:
        asked = f"cache_teacher(store='hidden', {', '.join(f'{name}={short(x)}' for name, x in given.items())})"
        wrong = "hidden states give the whole distribution, at the temperature that KIConfig names when they are read"
        raise GrowError(asked, wrong, "no top_k, samples, temperature or seed; or store='probabilities'")
    of_all = DEFAULTS | given
    if not isinstance(of_all["temperature"], Real):
        raise GrowError(f"cache_teacher(temperature={of_all['temperature']!r})", "it is not a number", "such as 1.0")
    return {
        "top_k": _whole("top_k", of_all["top_k"], 0),
        "samples": _whole("samples", of_all["samples"], 0),
        "temperature": float(of_all["temperature"]),
        "seed": _whole("seed", of_all["seed"], -(1 << 63), (1 << 63) - 1),
    }


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A setting of any type of whole number, such as numpy's."""
    valid = f"a whole number, {least} " + ("or more" if most is None else f"to {most}")
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise GrowError(f"cache_teacher({name}={value!r})", "it is not a whole number", valid) from error
    if number < least or (most is not None and number > most):
        raise GrowError(f"cache_teacher({name}={number})", "it is out of range", valid)
    return number


def placed(teacher: Any, task: str | None, dtype: torch.dtype | None) -> tuple[PreTrainedModel, bool]:
    """A teacher, and whether it is somebody's; one that was loaded is on this process's device."""
    model, lent = load_teacher(teacher, task, dtype), model_in(teacher) is not None
    if task_of(model) == "question-answering":
        wrong = "its outcomes are the positions of each row, and a cache is of a fixed number of them"
        raise GrowError(f"caching the teacher {name_of(model)}", wrong, "the teacher itself in KIConfig")
    if tensor_parallel(model) > 1:
        wrong = f"it is split over {tensor_parallel(model)} processes, each of which caches other examples"
        raise GrowError(f"caching the teacher {name_of(model)}", wrong, "its folder or hub id, or a device_map")
    if not lent:
        place(model, PartialState().device)
    return model, lent


class Stores(Protocol):
    """What makes the contents of a shard."""

    def stored(self, examples: Iterable[Any], first: int) -> list[shards.StoredExample]:
        """Of these examples, the first of which has the number `first`."""
        ...


def write_cache(
    folder: Path,
    header: shards.Header,
    positions: float,
    recorder: Stores,
    dataset: Examples,
    state: PartialState,
    head: Projection | None = None,
) -> None:
    """Write all files that are missing; GrowError, in every process, where the main one cannot begin."""
    with ExitStack() as stack:
        begun = _begin(folder, header, positions, head, stack) if state.is_main_process else None
        refusal = broadcast_object_list([begun])[0]
        if refusal is not None:
            raise refusal
        _fill(folder, header, recorder, dataset, state)


def _fill(folder: Path, header: shards.Header, recorder: Stores, dataset: Examples, state: PartialState) -> None:
    """Write the shards that are missing, shared out among the processes."""
    missing = [number for number in range(header.shards) if not shards.shard_path(folder, number).exists()]
    missing = broadcast_object_list([missing])[0]
    size, every = header.shard_examples, range(len(dataset))
    mine = {n: every[n * size : (n + 1) * size] for n in missing[state.process_index :: state.num_processes]}
    examples = dataset.at(chain.from_iterable(mine.values()))
    bar = tqdm(mine.items(), desc="teacher", unit="shard", disable=not state.is_main_process, mininterval=1.0)
    for number, numbers in bar:
        stored = recorder.stored(islice(examples, len(numbers)), numbers.start)
        shards.write_shard(shards.shard_path(folder, number), header.key, stored)
    state.wait_for_everyone()


def _begin(
    folder: Path, header: shards.Header, positions: float, head: Projection | None, stack: ExitStack
) -> GrowError | None:
    """Write header and head, or read those of an interrupted call. Returns an error where this call cannot continue it.

    Until `stack` ends, no other call does. `positions` is how many an example has on average.
    """
    asked, valid = f"caching a teacher in {str(folder)!r}", "a new folder, or that of an interrupted call"
    try:
        if folder.is_dir():
            stack.enter_context(shards.alone(folder))
        abandoned = [*folder.glob(".header.json-*"), *folder.glob(".shard-*"), *folder.glob(f".{HEAD}-*")]
        begun = shards.read_header(folder) if is_cache(folder) else None
        difference = begun and begun.difference(header)
        if difference and any(folder.glob("shard-*")):
            return GrowError(asked, f"another cache was begun there; this call has {difference}", valid)
        if begun is None and folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {*abandoned}):
            return GrowError(asked, "the folder holds other files", valid)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(shards.alone(folder))
        for path in abandoned:
            path.unlink(missing_ok=True)
        missing = sum(not shards.shard_path(folder, number).exists() for number in range(header.shards))
        examples = min(missing * header.shard_examples, header.examples)
        needed = examples * positions * header.record_format.bytes_per_position
        missing_head = head if difference or not (folder / HEAD).exists() else None
        shards.check_room(folder, needed + (0 if missing_head is None else head_bytes(missing_head)))
        if begun is None or difference:
            (folder / HEAD).unlink(missing_ok=True)  # first: a head always belongs to the header beside it
            shards.write_header(folder, header)
        if missing_head is not None:
            write_head(folder, missing_head)
    except GrowError as error:
        return error
    except OSError as error:
        return shards.not_written(folder, error)
    return None
