"""Targets from a cache: the teacher itself is never loaded."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.cache.examples import DIGEST_BYTES, Example, examples_of
from growlib.ki.cache.heads import HEAD, on_device, read_head
from growlib.ki.cache.remote import fetched, files_at, is_remote
from growlib.ki.cache.shards import HEADER, Shard, read_header, shard_path, tokenizer_hash
from growlib.ki.projection import Projection
from growlib.ki.targets import Targets
from growlib.ki.tasks import Positions


def is_cache(path: Any) -> bool:
    """Whether a folder holds a cache, finished or not. GrowError where a place elsewhere is out of reach."""
    if is_remote(path):
        return HEADER in files_at(path)
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(os.path.expanduser(path), HEADER))


class TeacherCache:
    """A finished cache, its records memory-mapped. Its `header` describes it.

    A cache elsewhere (`s3://...`, any protocol of fsspec) is fetched once, into the Hugging Face home of this machine.

    Raises:
        GrowError: it is unfinished, damaged, out of reach or no cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = fetched(str(path)) if is_remote(path) else Path(os.path.expanduser(path))
        self._asked = f"reading the teacher's cache {str(path)!r}"
        self.header = read_header(self.path)
        self.shards = [Shard(shard_path(self.path, n), self.header) for n in range(self.header.shards)]
        self._head = None if self.header.head is None else read_head(self.path, self.header)
        self._placed: Projection | None = None  # the head where it was asked for
        digests = np.concatenate([shard.digests for shard in self.shards])
        self._order = np.lexsort(np.ascontiguousarray(digests).view("<u8").T)
        self._digests = np.ascontiguousarray(digests[self._order]).view("<u8")
        self._first = np.cumsum([0, *(len(shard.digests) for shard in self.shards)])
        if self._first[-1] < len(self):  # a packed row is several
            wrong = f"its shards hold {self._first[-1]} examples, and its header names {len(self)}"
            raise GrowError(self._asked, wrong, "a folder as growlib.cache_teacher wrote it")

    def __len__(self) -> int:
        """The number of examples."""
        return self.header.examples

    @property
    def positions(self) -> int:
        """How many positions have targets."""
        return sum(len(shard.records) for shard in self.shards)

    @property
    def bytes_on_disk(self) -> int:
        head = [] if self._head is None else [self.path / HEAD]
        return sum(path.stat().st_size for path in [*head, *(shard.path for shard in self.shards)])

    @property
    def teacher_ce(self) -> float:
        """The teacher's mean CE at τ = 1 over all cached positions whose label is among its token ids, nats."""
        known = sum(int(shard.known.sum()) for shard in self.shards)
        return float(sum(shard.teacher_ce.sum(dtype=np.float64) for shard in self.shards)) / max(known, 1)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raise GrowError where a tokenizer is not the one that the cache was written with."""
        if tokenizer is None or self.header.tokenizer is None:
            return
        if tokenizer_hash(tokenizer) != self.header.tokenizer:
            wrong = "the cache was written with another tokenizer"
            raise GrowError(self._asked, wrong, "the same tokenizer, or a cache written with this one")

    def read(
        self, batch: dict[str, Any], positions: Positions | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Targets | Projection, Tensor]:
        """What the teacher says at the positions of a batch that count, and its CE there.

        A cache of hidden states gives a `Projection`, any other `Targets`. The CE is [2]: its sum, and over how many
        labels, which are those among the teacher's token ids.

        Args:
            positions: of the batch; None: as the cache's task aligns them.
            device: where both go. The head goes there once.

        Raises:
            GrowError: an example is not in the cache, or its bytes are damaged.
        """
        positions = positions or Positions.of(batch, self.header.task)
        places = self.find(examples_of(batch, self.header.task, positions))
        ce = [(self.shards[shard].teacher_ce[number], self.shards[shard].known[number]) for shard, number in places]
        ce_2 = torch.tensor(ce, dtype=torch.float32).view(-1, 2).sum(0)
        device = torch.device(device)
        return self.predictions(self.records(places), device), ce_2.to(device)

    def predictions(self, records: np.ndarray, device: torch.device) -> Targets | Projection:
        """What records, uint8 [N, R], say, on a device; GrowError where no finite teacher says it."""
        said = self.header.record_format.decode(records, self._asked)
        if isinstance(said, Targets):
            return said.to(device)
        assert self._head is not None
        if self._placed is None or self._placed.device != device:
            self._placed = on_device(self._head, device)
        return replace(self._placed, hidden=said.to(device, non_blocking=True))

    def records(self, places: list[tuple[int, int]]) -> np.ndarray:
        """The records of the examples at these places, [N, R]."""
        empty = np.empty((0, self.header.record_format.bytes_per_position), np.uint8)
        return np.concatenate([empty, *(self.shards[shard].example(number) for shard, number in places)])

    def find(self, examples: list[Example]) -> list[tuple[int, int]]:
        """(shard, number in it) of each example with a position that counts; raises GrowError where one is missing."""
        wanted = [example for example in examples if example.counted]
        digests = np.frombuffer(b"".join(e.digest for e in wanted), "<u8").reshape(-1, DIGEST_BYTES // 8)
        # lexsort's last key is the first to sort by
        low, high = (np.searchsorted(self._digests[:, 1], digests[:, 1], side) for side in ("left", "right"))
        places = []
        for start, stop, digest in zip(low, high, digests, strict=True):
            matches = start + np.flatnonzero(self._digests[start:stop, 0] == digest[0])
            if not len(matches):
                wrong = f"an example of this batch is not among its {len(self)}: it has other tokens or labels (a "
                wrong += "longer or changed dataset, another block length, a part of an example, other masks or "
                wrong += "another tokenizer)"
                raise GrowError(self._asked, wrong, "the examples that were cached, in any order; or a cache of these")
            place = self._order[matches[0]]
            shard = int(np.searchsorted(self._first, place, "right")) - 1
            places.append((shard, int(place - self._first[shard])))
        return places
