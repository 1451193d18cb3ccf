"""A dataset's examples through a collator and a teacher: batches, digests, records.

Shapes: N counted positions, R bytes of a record, V token ids.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.cache import hashes
from growlib.ki.cache.data import Examples, batched
from growlib.ki.cache.examples import Example, draw_keys, examples_of
from growlib.ki.cache.records import Layout
from growlib.ki.cache.shards import Entry
from growlib.ki.heads import IGNORE_INDEX, Head, aligned_labels, outcomes
from growlib.ki.linear import CHUNK_BYTES
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits, Targets
from growlib.ki.teacher import Teacher

TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids"}
LABELS = {"labels", "label", "label_ids", "shift_labels"}
OF_TRL = {"seq_lengths", "completion_mask", "assistant_masks"}  # what its SFTTrainer leaves for its collator
COMPARED = 16  # positions of a packed example
Collator = Callable[[list[Any]], dict[str, Any]]


class Batches:
    """A dataset's examples through a collator."""

    def __init__(self, collator: Collator, batch_size: int, head: Head, names: Iterable[str] = TEXT) -> None:
        self.collator, self.batch_size, self.head = collator, batch_size, head
        self.columns = {*names, *LABELS, *OF_TRL}

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Collated, without the columns that the Trainer drops."""
        if not isinstance(examples[0], Mapping):
            wrong = f"an example is a {type(examples[0]).__name__}"
            raise GrowError("cache_teacher", wrong, 'a dict, such as {"input_ids": [5, 3, 8], "labels": [5, 3, 8]}')
        kept = [{name: x for name, x in row.items() if name in self.columns} for row in examples]
        try:
            batch = dict(self.collator(kept))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            wrong = f"the data_collator makes no batch of {len(kept)} examples ({error!r})"
            raise GrowError("cache_teacher", wrong, "one that does, and pads where lengths differ") from error
        labels = batch.get("shift_labels", batch.get("labels"))
        if labels is None:
            raise GrowError("cache_teacher", "the batches have no labels", "a dataset or data_collator that gives them")
        if self.head != "seq2seq" and "input_ids" in batch and labels.shape != batch["input_ids"].shape:
            wrong = f"labels of shape {tuple(labels.shape)} for input_ids of {tuple(batch['input_ids'].shape)}"
            raise GrowError("cache_teacher", wrong, "one label for each token, -100 where it does not count")
        return batch

    def digest(self, *examples: Any) -> bytes:
        """Of examples, or of all that their rows pack."""
        return b"".join(found.digest for found in examples_of(self.batch(examples), self.head))

    def dataset_hash(self, examples: Examples) -> str:
        """Of up to 256 examples, evenly spread.

        Raises:
            GrowError: the first of them are others when they are read again.
        """
        numbers = hashes.spread(len(examples))
        digests = [self.digest(example) for example in examples.at(numbers)]
        again = [self.digest(*chosen) for chosen in batched(examples.at(numbers[:8]), self.batch_size)]
        if b"".join(again) != b"".join(digests[:8]):
            raise GrowError(
                "cache_teacher",
                f"the {examples.name}'s examples are others each time, so that training would not find them",
                "one without random changes in dataset and data_collator; for masks growlib.ki.MaskedExamples",
            )
        return hashes.digests_hash(digests)


class Source(Batches):
    """A teacher, and the examples that it reads."""

    def __init__(self, teacher: Teacher, collator: Collator, batch_size: int) -> None:
        super().__init__(collator, batch_size, teacher.head, teacher.names)
        self.teacher = teacher
        embedding = None if teacher.head == "image" else teacher.model.get_input_embeddings()
        self.sizes = {"input_ids": getattr(embedding, "num_embeddings", math.inf), "labels": outcomes(teacher.model)}
        self.packing_is_proven = False

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The same, all its ids among the teacher's."""
        batch = super().batch(examples)
        labels = aligned_labels(batch, self.head)
        for name, ids in (("input_ids", batch.get("input_ids")), ("labels", labels[labels != IGNORE_INDEX])):
            if ids is not None and ids.numel() and not (ids.min() >= 0 and ids.max() < self.sizes[name]):
                wrong = f"there are {name} from {ids.min()} to {ids.max()}"
                raise GrowError("cache_teacher", wrong, f"0 to {self.sizes[name] - 1}, or a label of -100")
        return batch

    def chunks(self, batch: dict[str, Any]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which of the N positions, their logits [n, V] in float32, their labels [n]), part by part."""
        found, labels = self.teacher.at_labels(batch)
        labels = labels.to(found.device)
        chunk = max(CHUNK_BYTES // (4 * self.teacher.common_vocab), 16)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            yield part, _logits(found, part), labels[part]

    def rows(self, examples: Iterable[Any], layout: Layout, seed: int, first: int) -> list[Entry]:
        """What a shard of these examples holds, the first of which has the number `first`."""
        rows = []
        for chosen in batched(examples, self.batch_size):
            batch = self.batch(chosen)
            found = examples_of(batch, self.head)
            self._prove_packing(batch, found)
            records, ce = self.records(batch, draw_keys(found), layout, seed)
            labels = aligned_labels(batch, self.head)
            counted = labels != IGNORE_INDEX
            if np.isnan(ce).any():
                number = first + int(counted.nonzero()[int(np.isnan(ce).argmax()), 0])
                raise _no_numbers(f"example {number}")
            known = (labels[counted] < layout.vocab).cpu().numpy()
            ends = np.cumsum([0, *(example.counted for example in found)])
            for example, low, high in zip(found, ends, ends[1:], strict=False):
                part = slice(low, high)
                rows.append(Entry(example.digest, float(ce[part].sum()), int(known[part].sum()), records[part]))
            first += len(chosen)
        return rows

    @torch.no_grad()
    def records(self, batch: dict[str, Any], keys: Tensor, layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Records [N, R] and the teacher's CE [N] of a batch, NaN where the teacher's logits are no numbers."""
        records, ce = [np.empty((0, layout.bytes_per_position), np.uint8)], [np.empty(0, np.float32)]
        tau = layout.temperature
        for part, logits, labels in self.chunks(batch):
            if layout.samples:
                of_part = keys[part].to(logits.device)
                targets = Targets.sample(logits, layout.top_k, layout.samples, seed=seed, keys=of_part, temperature=tau)
            else:
                targets = Targets.top_k(logits, layout.top_k, temperature=tau)
            with np.errstate(invalid="ignore"):  # of NaN, which `rows` refuses
                records.append(layout.encode(targets))
            ce.append(_ce(logits, labels).cpu().numpy())
        return np.concatenate(records), np.concatenate(ce)

    @torch.no_grad()
    def mean_ce(self, dataset: Examples) -> float:
        """The teacher's CE over a dataset's counted positions whose label it knows, nats."""
        total, positions = 0.0, 0
        for chosen in dataset.batches(self.batch_size):
            for _, logits, labels in self.chunks(self.batch(chosen)):
                total += float(_ce(logits, labels).sum())
                positions += int((labels < logits.shape[1]).sum())
        if math.isnan(total):
            raise _no_numbers(f"the {dataset.name} dataset")
        return total / max(positions, 1)

    @torch.no_grad()
    def _prove_packing(self, batch: dict[str, Any], found: list[Example]) -> None:
        """Compare, once, the logits of an example that is packed behind another with those that it has alone."""
        behind = [n for n in range(1, len(found)) if found[n].row == found[n - 1].row and found[n].counted]
        if self.packing_is_proven or not behind:
            return
        example, before = found[behind[0]], sum(other.counted for other in found[: behind[0]])
        positions, row, columns = batch["position_ids"], example.row, torch.from_numpy(example.columns)
        alone = {
            "input_ids": batch["input_ids"][row, columns][None],
            "position_ids": positions[min(row, len(positions) - 1), columns][None],
            "shift_labels": aligned_labels(batch, self.head)[row, columns][None],
        }
        count = min(example.counted, COMPARED)
        packed = _logits(self.teacher.at_labels(batch)[0], slice(before, before + count))
        single = _logits(self.teacher.at_labels(alone)[0], slice(count))
        tolerance = 1e-2 if self.teacher.model.dtype in (torch.float32, torch.float64) else 5e-2
        if (packed - single).abs().max() > tolerance * single.abs().max():
            raise GrowError(
                "cache_teacher",
                "a row packs several examples, and this teacher reads each with those before it in view",
                "packed rows without attention_mask (DataCollatorWithFlattening's), where the teacher takes their "
                "position_ids apart; or one example per row",
            )
        self.packing_is_proven = True


def _logits(found: Logits | Projection, part: slice) -> Tensor:
    return found.rows(part).logits().float()


def _ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The CE at each position, [N]; 0 where the label is not among the teacher's token ids; NaN where a logit is."""
    known = labels < logits.shape[1]
    return F.cross_entropy(logits, torch.where(known, labels, logits.argmax(1)), reduction="none") * known


def _no_numbers(where: str) -> GrowError:
    wrong = f"the teacher's logits on {where} are no numbers (NaN)"
    return GrowError("cache_teacher", wrong, "a teacher that is whole, in a dtype that does not overflow")
