"""A teacher's records of examples.

Shapes: N positions that count, R bytes of a record, V token ids.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.cache.batches import Batch, Batches, Collator
from growlib.ki.cache.data import Examples, batched
from growlib.ki.cache.examples import Example, draw_keys
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.shards import StoredExample
from growlib.ki.cache.states import StateFormat, no_states
from growlib.ki.linear import chunk_size
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits
from growlib.ki.tasks import Positions, outcomes
from growlib.ki.teacher import Teacher

COMPARED = 16  # positions of a packed example


class Recorder:
    """A teacher, and the batches that it reads."""

    def __init__(
        self,
        teacher: Teacher,
        collator: Collator,
        batch_size: int,
        record_format: RecordFormat | StateFormat,
        seed: int,
    ) -> None:
        self.teacher, self.format, self.seed = teacher, record_format, seed
        embedding = None if teacher.task == "image" else teacher.model.get_input_embeddings()
        ids = {"input_ids": getattr(embedding, "num_embeddings", math.inf), "labels": outcomes(teacher.model)}
        self.batches = Batches(collator, batch_size, teacher.task, teacher.names, ids)
        self.packing_is_proven = False

    def chunks(self, batch: Batch) -> Iterator[tuple[slice, Logits | Projection, Tensor]]:
        """(which of the N positions, what the teacher says there, their labels [n]), part by part."""
        predictions = self.teacher.predict(batch.inputs, batch.positions)
        labels = batch.positions.labels.to(predictions.device)
        chunk = chunk_size(self.teacher.common_vocab)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            yield part, predictions.rows(part), labels[part]

    def head(self, batch: Batch) -> Projection | None:
        """The head that goes with hidden states; raises GrowError where there is none, or a batch cannot be read."""
        said = self.teacher.predict(batch.inputs, batch.positions)
        if isinstance(self.format, RecordFormat):
            return None
        if not isinstance(said, Projection):
            raise no_states(self.teacher, self.teacher.no_head)
        return said.rows(slice(0))

    def stored(self, examples: Iterable[dict], first: int) -> list[StoredExample]:
        """What a shard holds of these examples, the first of which has the number `first`."""
        stored = []
        for chosen in batched(examples, self.batches.size):
            batch = self.batches.batch(chosen)
            parts, positions = batch.examples, batch.positions
            self._prove_packing(batch, parts)
            records, ce = self.records(batch, draw_keys(parts))
            if np.isnan(ce).any():
                number = first + int(positions.mask.nonzero()[int(np.isnan(ce).argmax()), 0])
                raise _no_numbers(f"example {number}")
            known = (positions.labels < self.format.vocab).cpu().numpy() & np.isfinite(ce)
            ce = np.where(known, ce, np.float32(0))
            start = 0
            for example in parts:
                part = slice(start, start := start + example.counted)
                of_part = float(ce[part].sum()), int(known[part].sum()), records[part]
                stored.append(StoredExample(example.digest, *of_part))
            first += len(chosen)
        return stored

    @torch.no_grad()
    def records(self, batch: Batch, keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Records [N, R] and the teacher's CE [N] of a batch.

        The CE is NaN where what the teacher says is no numbers, inf where it excludes the label.
        """
        records, ce = [np.empty((0, self.format.bytes_per_position), np.uint8)], [np.empty(0, np.float32)]
        for part, said, labels in self.chunks(batch):
            logits = said.logits().float()
            record, no_numbers = self.format.record(said, logits, keys[part], self.seed)
            records.append(record)
            ce.append(_ce(logits, labels).masked_fill(no_numbers, torch.nan).cpu().numpy())
        return np.concatenate(records), np.concatenate(ce)

    @torch.no_grad()
    def mean_ce(self, dataset: Examples) -> float:
        """The teacher's mean CE over a dataset's labels that count and that it knows, nats."""
        total, known = 0.0, 0
        for chosen in dataset.batches(self.batches.size):
            for _, said, labels in self.chunks(self.batches.batch(chosen)):
                ce = _ce(said.logits().float(), labels)
                excluded = ce == torch.inf
                total += float(ce.masked_fill(excluded, 0.0).sum())
                known += int(((labels < said.vocab) & ~excluded).sum())
        if math.isnan(total):
            raise _no_numbers(f"the {dataset.name} dataset")
        return total / max(known, 1)

    @torch.no_grad()
    def _prove_packing(self, batch: Batch, examples: list[Example]) -> None:
        """Compare, once, the logits of an example that is packed behind another with those that it has alone."""
        behind = [n for n in range(1, len(examples)) if examples[n].row == examples[n - 1].row and examples[n].counted]
        if self.packing_is_proven or not behind:
            return
        example, before = examples[behind[0]], sum(other.counted for other in examples[: behind[0]])
        ids, places = batch.inputs["input_ids"], batch.inputs["position_ids"]
        row, columns = example.row, torch.from_numpy(example.columns)
        of_row = places[min(row, len(places) - 1)]
        alone = {"input_ids": ids[row, columns][None], "position_ids": of_row[columns][None]}
        positions = Positions.at(batch.positions.aligned[row, columns][None])
        count = min(example.counted, COMPARED)
        together = self.teacher.predict(batch.inputs, batch.positions).rows(slice(before, before + count))
        packed = together.logits().float()
        single = self.teacher.predict(alone, positions).rows(slice(count)).logits().float()
        tolerance = 1e-2 if self.teacher.model.dtype in (torch.float32, torch.float64) else 5e-2
        if (packed - single).abs().max() > tolerance * single.abs().max():
            wrong = "a row packs several examples, and for this teacher each depends on those before it"
            valid = "packed rows without attention_mask, of a teacher that keeps examples apart by their position_ids"
            raise GrowError("cache_teacher", wrong, valid + "; or one example per row")
        self.packing_is_proven = True


def _ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The CE at each position, [N]; 0 where the label is not among the teacher's token ids.

    NaN where the logits are no numbers, inf where the label's is -inf.
    """
    known = labels < logits.shape[1]
    ce = F.cross_entropy(logits, torch.where(known, labels, logits.argmax(1)), reduction="none")
    return torch.where(logits.logsumexp(1).isfinite(), torch.where(known, ce, 0.0), torch.nan)


def _no_numbers(where: str) -> GrowError:
    wrong = f"the teacher's logits on {where} are not numbers (NaN or infinite)"
    return GrowError("cache_teacher", wrong, "a teacher whose weights are finite, in a dtype that does not overflow")
