"""Whether a cache is whole, and on a sample whether it holds the teacher's targets."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from growlib.errors import GrowError
from growlib.ki.cache.batches import Batches, Collator
from growlib.ki.cache.capture import placed
from growlib.ki.cache.data import Examples, spread
from growlib.ki.cache.examples import draw_keys
from growlib.ki.cache.reader import TeacherCache
from growlib.ki.cache.recorder import Recorder
from growlib.ki.cache.shards import Header, weights_hash
from growlib.ki.projection import Projection
from growlib.ki.sources import model_in
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher
from growlib.ki.treatments import product


@dataclass(frozen=True)
class CacheVerification:
    """The result of `verify_cache`.

    Attributes:
        examples, positions: how many were read, all with the right checksum.
        bytes_per_position: of the records.
        compared: positions of the sample that the teacher was run on again; 0 without a teacher and a dataset.
        identical: the share of them whose record is the same byte for byte (another batch size rounds otherwise).
        kl: mean KL(teacher ‖ cache) there, nats, over the listed tokens and the tail, of hidden states over all tokens:
            what rounding cost.
    """

    examples: int
    positions: int
    bytes_per_position: int
    compared: int = 0
    identical: float = 1.0
    kl: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether the stored probabilities are the teacher's."""
        return self.kl < 1e-3

    def __str__(self) -> str:
        text = f"{self.examples:,} examples, {self.positions:,} positions of {self.bytes_per_position} bytes: whole"
        of = f"KL {self.kl:.1e} nats and {self.identical:.1%} identical records on {self.compared:,} positions"
        return f"{text}; {'the teacher' if self.sound else 'NOT the teacher'}: {of}" if self.compared else text


def verify_cache(
    path: str | os.PathLike[str],
    teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
    dataset: Any = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_collator: Collator = default_data_collator,
    sample: int = 32,
) -> CacheVerification:
    """Read every record of a cache, and compare it with the teacher, the dataset and the tokenizer that are given.

    Every example of the dataset is looked up. With teacher and dataset, the teacher runs again on a sample.

    Args:
        path: a finished cache.
        teacher: a folder is loaded in the dtype of the cache; a model is taken as it is.
        sample: number of examples, evenly spread over the dataset.

    Raises:
        GrowError: a byte was damaged, or teacher, dataset or tokenizer are others than the cache's.
    """
    cache = TeacherCache(path)
    for shard in cache.shards:
        for number in range(len(shard.checksums)):
            shard.example(number)
    header = cache.header
    result = CacheVerification(len(cache), cache.positions, header.record_format.bytes_per_position)
    cache.check_tokenizer(tokenizer)
    asked = f"verifying the teacher's cache {str(cache.path)!r}"
    reader = None if teacher is None else _teacher(asked, teacher, header)
    if dataset is None:
        return result
    given = Examples(dataset, "dataset")
    if len(given) != len(cache):
        wrong = f"the dataset has {len(given)} examples and the cache {len(cache)}"
        raise GrowError(asked, wrong, "the dataset that was cached")
    recorder, batches = None, Batches(data_collator, header.batch_size, header.task)
    if reader is not None:
        recorder = Recorder(reader, data_collator, header.batch_size, header.record_format, header.seed)
        batches = recorder.batches
    for chosen in given.batches(batches.size):
        cache.find(batches.batch(chosen).examples)
    if batches.glance(given).hash != header.dataset:
        raise GrowError(asked, "the examples of the dataset are in another order", "the dataset as it was cached")
    if recorder is None:
        return result
    try:
        return replace(result, **_compare(cache, recorder, given.at(spread(len(given), sample))))
    finally:
        recorder.teacher.give_back()


def _teacher(asked: str, teacher: PreTrainedModel | str | os.PathLike[str], header: Header) -> Teacher:
    """The teacher, loaded where it is a path."""
    dtype = None if header.dtype is None else getattr(torch, header.dtype)
    given = model_in(teacher)
    if given is not None and dtype not in (None, given.dtype):
        wrong = f"the teacher is in {given.dtype}, and the cache was written in {dtype}"
        raise GrowError(asked, wrong, f"a teacher in {dtype}, or its folder, which is loaded so")
    for task in (None, header.task):  # as its config names, or as `cache_teacher` may have been told
        model, lent = placed(teacher, task, dtype)
        if weights_hash(model) == header.teacher:
            return Teacher(model, header.vocab, device=PartialState().device, lent=lent)
    raise GrowError(asked, "another teacher wrote it: the hash of the weights differs", "the teacher that wrote it")


def _compare(cache: TeacherCache, recorder: Recorder, sample: Iterable[Any]) -> dict[str, Any]:
    """`CacheVerification`'s comparison with what the teacher says now."""
    same, divergences = [np.empty(0, bool)], [torch.zeros(0)]
    for example in sample:
        batch = recorder.batches.batch([example])
        examples = batch.examples
        stored = cache.records(cache.find(examples))
        same.append((stored == recorder.records(batch, draw_keys(examples))[0]).all(1))
        for part, said, _ in recorder.chunks(batch):
            kept = cache.predictions(stored[part], said.device)
            divergences.append(_kl(said.logits(), kept, cache.header).cpu())
    identical, kl = np.concatenate(same), torch.cat(divergences)
    return {"compared": len(kl), "identical": float(identical.mean()), "kl": float(kl.mean())} if len(kl) else {}


def _kl(logits: torch.Tensor, kept: Targets | Projection, header: Header) -> torch.Tensor:
    """KL(teacher ‖ cache), [N]: of hidden states, or over the listed tokens and the tail as they are stored."""
    if isinstance(kept, Projection):
        log_p = logits.float().log_softmax(-1)
        return product(log_p.exp(), log_p - kept.logits().float().log_softmax(-1)).sum(1)
    top_k = header.top_k
    assert kept.ids is not None
    assert kept.tail is not None
    ids, log_p = kept.ids[:, :top_k], (logits.float() / header.temperature).log_softmax(-1)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    online = torch.cat([log_p.gather(1, ids), tail], 1)
    stored = torch.cat([kept.logprobs[:, :top_k], kept.tail[:, None]], 1)
    return product(online.exp(), online - stored.log_softmax(-1)).sum(1)
