"""A dataset's examples through a collator: batches and digests."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.cache.data import Examples, batched, spread
from growlib.ki.cache.examples import Example, examples_of
from growlib.ki.sources import short
from growlib.ki.tasks import Positions, Task

TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids"}
LABELS = {"labels", "label", "label_ids", "shift_labels"}
OF_TRL = {"seq_lengths", "completion_mask", "assistant_masks"}  # what its SFTTrainer leaves for its collator
Collator = Callable[[list[Any]], dict[str, Any]]


class Batch(NamedTuple):
    """What a collator made of some examples."""

    inputs: dict[str, Any]
    task: Task
    positions: Positions

    @property
    def examples(self) -> list[Example]:
        """Which they are."""
        return examples_of(self.inputs, self.task, self.positions)


class Batches:
    """Makes batches of examples.

    Args:
        names: the columns that are kept, beside labels.
        ids: how many ids the teacher has, for "input_ids" and "labels"; None: they are not checked.
    """

    def __init__(
        self, collator: Collator, size: int, task: Task, names: Iterable[str] = TEXT, ids: Mapping[str, float] = {}
    ) -> None:
        self.collator, self.size, self.task, self.id_counts = collator, size, task, ids
        self.columns = {*names, *LABELS, *OF_TRL}

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Collated, without the columns that the Trainer drops; raises GrowError where the teacher cannot read them."""
        if not isinstance(examples[0], Mapping):
            wrong = f"an example is a {type(examples[0]).__name__}"
            raise GrowError("cache_teacher", wrong, 'a dict, such as {"input_ids": [5, 3, 8], "labels": [5, 3, 8]}')
        kept = [{name: x for name, x in row.items() if name in self.columns} for row in examples]
        if "input_ids" not in kept[0] and any(isinstance(x, str | list) for x in examples[0].values()):
            wrong = f"an example has the columns {', '.join(map(short, examples[0]))}"
            valid = "input_ids and labels: tokenise text first, or growlib.ki.read_examples(file, tokenizer)"
            raise GrowError("cache_teacher", wrong, valid)
        try:
            inputs = dict(self.collator(kept))
        except Exception as error:  # whatever a collator raises on examples that it does not take
            wrong = f"the data_collator cannot make a batch of {len(kept)} examples ({error!r})"
            raise GrowError("cache_teacher", wrong, "a data_collator that pads where lengths differ") from error
        positions = Positions.of(inputs, self.task)
        labels, tokens = positions.aligned, inputs.get("input_ids", positions.aligned)
        if "input_ids" in inputs and not (isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.shape[1]):
            wrong = f"input_ids are of shape {list(getattr(tokens, 'shape', []))}"
            raise GrowError("cache_teacher", wrong, "rows of one or more tokens: a tensor [examples, length]")
        if self.task not in ("seq2seq", "sequence-classification") and labels.shape != tokens.shape:
            wrong = f"labels of shape {tuple(labels.shape)} for input_ids of {tuple(tokens.shape)}"
            raise GrowError("cache_teacher", wrong, "one label for each token, -100 where it does not count")
        for name, count in self.id_counts.items():
            ids = positions.labels if name == "labels" else inputs.get(name)
            if ids is not None and ids.numel() and not (ids.min() >= 0 and ids.max() < count):
                wrong = f"there are {name} from {ids.min()} to {ids.max()}"
                raise GrowError("cache_teacher", wrong, f"0 to {count - 1}, or a label of -100")
        return Batch(inputs, self.task, positions)

    def glance(self, examples: Examples) -> "Glance":
        """At up to 256 examples, evenly spread; raises GrowError where the first of them change when read again."""
        numbers = spread(len(examples))
        digests: list[bytes] = []
        positions, longest = 0, None
        for example in examples.at(numbers):
            batch = self.batch([example])
            digests.append(_digest(batch))
            positions += batch.positions.count
            if longest is None or batch.positions.mask.numel() > longest.positions.mask.numel():
                longest = batch
        assert longest is not None  # there are examples
        again = [_digest(self.batch(chosen)) for chosen in batched(examples.at(numbers[:8]), self.size)]
        if b"".join(again) != b"".join(digests[:8]):
            wrong = f"the {examples.name} has other examples when it is read again, which training would not find"
            valid = "a dataset and data_collator without random changes; for masks growlib.ki.MaskedExamples"
            raise GrowError("cache_teacher", wrong, valid)
        found = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
        return Glance(found, longest, positions / len(numbers))


class Glance(NamedTuple):
    """What some examples of a dataset say of it: their hash, the longest of them, and how many positions count."""

    hash: str
    longest: Batch
    positions: float  # of an example, on average


def _digest(batch: Batch) -> bytes:
    """Of examples, or of all that their rows pack."""
    return b"".join(example.digest for example in batch.examples)
