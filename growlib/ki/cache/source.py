"""A dataset's examples through a collator and a teacher: batches, digests, records.

Shapes: N counted positions, R bytes of a record.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from growlib.errors import GrowError
from growlib.ki.cache.data import Examples, batched
from growlib.ki.cache.examples import draw_keys, examples_of
from growlib.ki.cache.records import Layout
from growlib.ki.cache.shards import Entry
from growlib.ki.heads import IGNORE_INDEX, aligned_labels
from growlib.ki.linear import CHUNK_BYTES
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher

LABELS = {"labels", "label", "label_ids", "shift_labels"}
OF_TRL = {"seq_lengths", "completion_mask", "assistant_masks"}  # what its SFTTrainer leaves for its collator
Collator = Callable[[list[Any]], dict[str, Any]]


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

    def rows(self, examples: Iterable[Any], layout: Layout, seed: int) -> list[Entry]:
        """What a shard of these examples holds."""
        rows = []
        for chosen in batched(examples, self.batch_size):
            batch = self.batch(chosen)
            found = examples_of(batch, self.head)
            records, ce = self.records(batch, draw_keys(found), layout, seed)
            labels = aligned_labels(batch, self.head)
            known = (labels[labels != IGNORE_INDEX] < layout.vocab).cpu().numpy()
            ends = np.cumsum([0, *(example.counted for example in found)])
            for example, low, high in zip(found, ends, ends[1:], strict=False):
                part = slice(low, high)
                rows.append(Entry(example.digest, float(ce[part].sum()), int(known[part].sum()), records[part]))
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
