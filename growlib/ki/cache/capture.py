"""Run a teacher over a dataset once, and keep what it says."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from growlib.errors import GrowError
from growlib.ki.cache import hashes
from growlib.ki.cache.data import Examples, batched
from growlib.ki.cache.examples import draw_keys, examples_of
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.cache.records import Layout
from growlib.ki.cache.shards import FORMAT, Header, read_header, shard_path, write_header, write_shard
from growlib.ki.heads import outcomes
from growlib.ki.linear import CHUNK_BYTES
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher, load_teacher, tokenizer_at

LABELS = {"labels", "label", "label_ids", "shift_labels"}
OF_TRL = {"seq_lengths", "completion_mask", "assistant_masks"}  # what its SFTTrainer leaves for its collator
Collator = Callable[[list[Any]], dict[str, Any]]


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


def _fill(folder: Path, header: Header, source: "Source", dataset: Examples, state: PartialState) -> None:
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


class Source:
    """A teacher with what turns examples into batches."""

    def __init__(self, teacher: Teacher, collator: Collator, batch_size: int) -> None:
        self.teacher, self.collator, self.batch_size = teacher, collator, batch_size
        self.head = teacher.head
        self.columns = {*teacher.names, *LABELS, *OF_TRL}

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Collated, without the columns that the Trainer drops."""
        if not isinstance(examples[0], Mapping):
            wrong = f"an example is a {type(examples[0]).__name__}"
            raise GrowError("cache_teacher", wrong, 'a dict, such as {"input_ids": [5, 3, 8], "labels": [5, 3, 8]}')
        kept = [{name: x for name, x in row.items() if name in self.columns} for row in examples]
        batch = self.collator(kept)
        if "labels" not in batch and "shift_labels" not in batch:
            raise GrowError("cache_teacher", "the batches have no labels", "a dataset or data_collator that gives them")
        return dict(batch)

    def digest(self, example: Any) -> bytes:
        """Of an example, or of all that one row packs."""
        return b"".join(found.digest for found in examples_of(self.batch([example]), self.head))

    def forward(self, batch: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The teacher's logits at the counted positions, or what they are computed from, and their labels [N]."""
        found, labels = self.teacher.at_labels(batch)
        return found, labels.to(found.device)

    def rows(self, examples: Iterable[Any], layout: Layout, seed: int) -> list[tuple[bytes, float, np.ndarray]]:
        """(digest, teacher's summed CE, records) of each example."""
        rows = []
        for chosen in batched(examples, self.batch_size):
            batch = self.batch(chosen)
            found = examples_of(batch, self.head)
            records, ce = self.records(batch, draw_keys(found), layout, seed)
            ends = np.cumsum([0, *(example.counted for example in found)])
            for example, low, high in zip(found, ends, ends[1:], strict=False):
                rows.append((example.digest, float(ce[low:high].sum()), records[low:high]))
        return rows

    @torch.no_grad()
    def records(
        self, batch: dict[str, Any], keys: torch.Tensor, layout: Layout, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Records [N, R] and the teacher's CE [N] of a batch, chunk by chunk of its positions."""
        source, labels = self.forward(batch)
        chunk = max(CHUNK_BYTES // (4 * layout.vocab), 16)
        records, ce = [np.empty((0, layout.bytes_per_position), np.uint8)], [np.empty(0, np.float32)]
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = source[part] if isinstance(source, torch.Tensor) else source.rows(part).logits()
            logits, tau = logits.float(), layout.temperature
            if layout.samples:
                of_part = keys[part].to(logits.device)
                targets = Targets.sample(logits, layout.top_k, layout.samples, seed=seed, keys=of_part, temperature=tau)
            else:
                targets = Targets.top_k(logits, layout.top_k, temperature=tau)
            records.append(layout.encode(targets))
            ce.append(_ce(logits, labels[part]).cpu().numpy())
        return np.concatenate(records), np.concatenate(ce)

    @torch.no_grad()
    def mean_ce(self, dataset: Examples) -> float:
        """The teacher's CE over a dataset's counted positions, nats."""
        total, positions = 0.0, 0
        for chosen in dataset.batches(self.batch_size):
            source, labels = self.forward(self.batch(chosen))
            logits = source if isinstance(source, torch.Tensor) else source.logits()
            total += float(_ce(logits.float(), labels).sum())
            positions += int((labels < logits.shape[1]).sum())
        return total / max(positions, 1)


def _ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The CE at each position, [N]; 0 where the label is not among the teacher's token ids."""
    vocab = logits.shape[1]
    return F.cross_entropy(logits, labels.clamp(max=vocab - 1), reduction="none") * (labels < vocab)
