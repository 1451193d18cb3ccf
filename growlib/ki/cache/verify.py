"""Is a cache what it says: every byte, and on a sample the teacher itself."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from growlib.errors import GrowError
from growlib.ki.cache import hashes
from growlib.ki.cache.capture import placed
from growlib.ki.cache.data import Examples
from growlib.ki.cache.examples import draw_keys, examples_of
from growlib.ki.cache.reader import TeacherCache
from growlib.ki.cache.shards import Header
from growlib.ki.cache.source import Batches, Collator, Source
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher
from growlib.ki.treatments import product


@dataclass(frozen=True)
class CacheVerification:
    """What was found.

    Attributes:
        examples, positions: read, their checksums right.
        bytes_per_position: of the records.
        compared: positions of the sample that the teacher was run on again; 0 without a teacher and a dataset.
        identical: the share of them whose record is the same byte for byte (another batch size rounds otherwise).
        kl: mean KL(teacher ‖ cache) there, nats, over the listed tokens and the rest: what rounding cost.
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
        if not self.compared:
            return text
        return (
            f"{text}; {'the teacher' if self.sound else 'NOT the teacher'}: KL {self.kl:.1e} nats and "
            f"{self.identical:.1%} identical records on {self.compared:,} positions"
        )


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

    Of the dataset every example is looked up. With both, the teacher is run again on a sample and compared.

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
    found = CacheVerification(len(cache), cache.positions, header.layout.bytes_per_position)
    cache.check_tokenizer(tokenizer)
    asked = f"verifying the teacher's cache {str(cache.path)!r}"
    model = None if teacher is None else _teacher(asked, teacher, header)
    if dataset is None:
        return found
    given = Examples(dataset, "dataset")
    if len(given) != len(cache):
        raise GrowError(asked, f"the dataset has {len(given)} examples and the cache {len(cache)}", "its dataset")
    if model is None:
        _look_up(asked, cache, Batches(data_collator, header.batch_size, header.head), given)
        return found
    source = Source(Teacher(model, header.vocab), data_collator, header.batch_size)
    _look_up(asked, cache, source, given)
    return _compare(found, cache, source, given.at(hashes.spread(len(given), sample)))


def _teacher(asked: str, teacher: PreTrainedModel | str | os.PathLike[str], header: Header) -> PreTrainedModel:
    """The teacher, loaded where it is not yet."""
    dtype = None if header.dtype is None else getattr(torch, header.dtype)
    if isinstance(teacher, PreTrainedModel):
        if dtype not in (None, teacher.dtype):
            wrong = f"the teacher is in {teacher.dtype}, and wrote it in {dtype}"
            raise GrowError(asked, wrong, f"a teacher in {dtype}, or its folder, which is loaded so")
        dtype = None
    for head in (None, header.head):  # as its config names, or as `cache_teacher` may have been told
        model = placed(teacher, head, dtype)
        if hashes.weights_hash(model) == header.teacher:
            return model
    raise GrowError(asked, "another teacher wrote it: the hash of its weights differs", "the teacher that wrote it")


def _look_up(asked: str, cache: TeacherCache, source: Batches, given: Examples) -> None:
    """Raise GrowError where an example is not in the cache, or at another place."""
    for chosen in given.batches(source.batch_size):
        cache.find(examples_of(source.batch(chosen), source.head))
    if source.dataset_hash(given) != cache.header.dataset:
        raise GrowError(asked, "the dataset has its examples in another order", "the dataset as it was cached")


def _compare(found: CacheVerification, cache: TeacherCache, source: Source, sample: Iterable[Any]) -> CacheVerification:
    """With what the teacher says now."""
    layout, same, divergences = cache.header.layout, [np.empty(0, bool)], [torch.zeros(0)]
    for example in sample:
        batch = source.batch([example])
        examples = examples_of(batch, source.head)
        stored = cache.records(cache.find(examples))
        again = source.records(batch, draw_keys(examples), layout, cache.header.seed)[0]
        same.append((stored == again).all(1))
        for part, logits, _ in source.chunks(batch):
            kept = layout.decode(stored[part])
            divergences.append(_kl(logits.cpu() / layout.temperature, kept, layout.top_k))
    identical, kl = np.concatenate(same), torch.cat(divergences)
    if not len(kl):
        return found
    return replace(found, compared=len(kl), identical=float(identical.mean()), kl=float(kl.mean()))


def _kl(logits: torch.Tensor, kept: Targets, top_k: int) -> torch.Tensor:
    """KL(teacher ‖ cache) over the listed tokens and the rest, [N]; the cache's side is as stored, not renormalised."""
    assert kept.ids is not None
    assert kept.tail is not None
    ids, log_p = kept.ids[:, :top_k], logits.log_softmax(-1)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    online = torch.cat([log_p.gather(1, ids), tail], 1)
    stored = torch.cat([kept.logprobs[:, :top_k], kept.tail[:, None]], 1)
    return product(online.exp(), online - stored.log_softmax(-1)).sum(1)
