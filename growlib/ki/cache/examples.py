"""Which examples a batch holds. Each is identified by a digest of its tokens and labels, wherever it is.

Because the key is the content, the order of the data, the batch size, padding, packing with `position_ids`, the number
of processes and the epoch may all change between caching and training; only the examples may not.

Shapes: B batch, L length.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.tasks import IGNORE_INDEX, Positions, Task

DIGEST_BYTES = 16


class Example(NamedTuple):
    """An example of a batch.

    Attributes:
        digest: of its token ids and of the labels that its positions predict.
        counted: number of its positions that count, which are those that have targets.
        row, columns: where its tokens are in the batch.
    """

    digest: bytes
    counted: int
    row: int
    columns: np.ndarray


def examples_of(batch: dict[str, Any], task: Task, positions: Positions) -> list[Example]:
    """The examples of a batch, in the order of their positions that count.

    A row is an example without its padding (`attention_mask` 0), or several that are packed, each of which begins
    where `position_ids` is 0. Raises GrowError where there are no token ids, or labels that count on padding.
    """
    if "input_ids" not in batch:
        raise GrowError("a cache of the teacher", "the batch holds no input_ids", "text as token ids, with labels")
    ids, labels = _array(batch["input_ids"]), _array(positions.aligned)
    given = batch.get("attention_mask")
    mask = np.ones(ids.shape, bool) if given is None or given.ndim != 2 else _array(given).astype(bool)
    if task == "sequence-classification":
        examples = list(_rows(ids, mask, labels))
    elif task == "seq2seq":
        decoder = batch.get("decoder_input_ids")
        examples = list(_pairs(ids, mask, labels, None if decoder is None else _array(decoder)))
    else:
        places = batch.get("position_ids")
        examples = list(_segments(ids, mask, labels, None if places is None else _array(places)))
    if sum(example.counted for example in examples) != positions.count:
        wrong = "a label counts at a padding position (attention_mask is 0)"
        raise GrowError("a cache of the teacher", wrong, "padding on the right, and labels of -100 on padding")
    return examples


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.int64).numpy()


def _segments(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, places: np.ndarray | None) -> Iterator[Example]:
    for row in range(len(ids)):
        real = np.flatnonzero(mask[row])
        tokens, of_row = ids[row][real], labels[row][real]
        starts = [0]
        if places is not None:
            at = places[row if len(places) > 1 else 0][real]
            starts = sorted({0, *np.flatnonzero(at == 0).tolist()})
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield _example(row, real[start:stop], tokens[start:stop], of_row[start:stop])


def _rows(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> Iterator[Example]:
    for row in range(len(ids)):
        real = np.flatnonzero(mask[row])
        yield _example(row, real, ids[row][real], labels[row : row + 1])


def _pairs(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, decoder: np.ndarray | None) -> Iterator[Example]:
    for row in range(len(ids)):
        real, length = np.flatnonzero(mask[row]), int(np.flatnonzero(labels[row] != IGNORE_INDEX).max(initial=-1)) + 1
        own = decoder is not None and not np.array_equal(decoder[row][1:length], labels[row][: max(length - 1, 0)])
        extra = (decoder[row][:length],) if decoder is not None and own else ()  # not only the labels, shifted
        yield _example(row, real, ids[row][real], labels[row][:length], *extra)


def _example(row: int, columns: np.ndarray, tokens: np.ndarray, labels: np.ndarray, *more: np.ndarray) -> Example:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in (tokens, labels, *more):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.astype("<i4").data)
    return Example(digest.digest(), int((labels != IGNORE_INDEX).sum()), row, columns)


def draw_keys(examples: list[Example]) -> Tensor:
    """A number for each position that counts, int64 [N], from its example and its place in it alone."""
    keys = [
        np.frombuffer(example.digest, "<i8", 1)
        + np.arange(example.counted, dtype=np.int64) * np.int64(0x632BE59BD9B4E019)
        for example in examples
    ]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *keys]))
