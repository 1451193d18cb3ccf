"""Examples: of any dataset that the Trainer takes, and from files, for the command line and its cache's training."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.cache.rows import lines
from growlib.ki.sources import first_line
from growlib.ki.tasks import IGNORE_INDEX

PADDING = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}


class Examples:
    """The examples of a dataset by their numbers, also of one that can only be read in order.

    Errors call the dataset `name`. Raises GrowError where there are none, or they can be read only once.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        if isinstance(dataset, Mapping):
            wrong = f"the {name} is a {type(dataset).__name__} of {', '.join(map(repr, dataset))}"
            raise GrowError("cache_teacher", wrong, "the examples, such as one split of it")
        streams = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if not hasattr(dataset, "__iter__" if streams else "__len__") or (streams and iter(dataset) is dataset):
            wrong = f"the {name} is a {type(dataset).__name__}, which cannot be read twice"
            valid = "a dataset with a length and an index, or an iterable one that starts again each time"
            raise GrowError("cache_teacher", wrong, valid)
        self.count = sum(1 for _ in dataset) if streams else len(dataset)
        self.in_order = streams
        if self.count == 0:
            raise GrowError("cache_teacher", f"the {name} has no examples", "one or more examples")

    def __len__(self) -> int:
        return self.count

    def at(self, numbers: Iterable[int]) -> Iterator[Any]:
        """Those of rising numbers; raises GrowError where the dataset ends before the last of them."""
        if not self.in_order:
            yield from (self.dataset[number] for number in numbers)
            return
        stream = enumerate(self.dataset)
        for number in numbers:
            example = next((example for place, example in stream if place == number), None)
            if example is None:
                wrong = f"the {self.name} had {self.count} examples, and no number {number} when it was read again"
                raise GrowError("cache_teacher", wrong, "a dataset that is the same each time")
            yield example

    def batches(self, size: int) -> Iterator[list[Any]]:
        """All of them, `size` at once."""
        return batched(self.at(range(len(self))), size)


def batched(examples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` examples, the last one shorter."""
    rest = iter(examples)
    while batch := list(islice(rest, size)):
        yield batch


def spread(count: int, at_most: int = 256) -> list[int]:
    """Up to `at_most` of `count` numbers from 0, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist() if count else []


class Blocks(Dataset):
    """Blocks of token ids [E, L], which are their own labels."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = torch.from_numpy(np.array(self.ids[number], np.int64))  # a copy: the file is not writable
        return {"input_ids": ids, "labels": ids}


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples of whatever lengths: those of `PADDING` that they have, and `attention_mask`, [B, L]."""
    masked = [{"attention_mask": torch.ones(len(x["input_ids"]), dtype=torch.int64), **x} for x in examples]
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.as_tensor(x[name]) for x in masked], True, padding)
        for name, padding in PADDING.items()
        if name in masked[0]
    }


def read_examples(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None, length: int = 512
) -> Any:
    """A dataset of a file or folder, the same each time; raises GrowError where there is none.

    Args:
        path: a .npy array of token ids [E, L]; a .jsonl file, an example per line; or a file or folder of UTF-8 text,
            whose files are encoded in the order of their names, joined with the end-of-text token and cut into blocks
            of `length`. A line has `input_ids`, and perhaps `labels`, which otherwise are its `input_ids`; or a
            `text`; or `messages`, a conversation for the tokenizer's chat template. Longer ones are cut into parts of
            `length`.
        tokenizer: for text.
    """
    try:
        path = Path(os.path.expanduser(path))
        asked = f"reading examples from {str(path)!r}"
        is_file, is_folder, exists = path.is_file(), path.is_dir(), path.exists()
    except (OSError, ValueError, TypeError) as error:
        raise GrowError("reading examples", f"the path cannot be used ({error})", "a file or folder") from error
    if not (is_file or is_folder):
        wrong = "it is a pipe, a device or a socket" if exists else "there is no such file or folder"
        raise GrowError(asked, wrong, "a .npy or .jsonl file, or text, that can be read again and again")
    if not isinstance(length, int) or length < 2:
        raise GrowError(asked, f"a block of length={length!r} has no token to predict", "2 or more tokens")
    kind = path.suffix if is_file else ""
    try:
        if kind == ".npy":
            return Blocks(_token_ids(asked, path))
        return lines(asked, path, tokenizer, length) if kind == ".jsonl" else _blocks(asked, path, tokenizer, length)
    except UnicodeDecodeError as error:
        raise GrowError(asked, f"it is not UTF-8 text ({error})", "text files only") from error
    except OSError as error:
        raise GrowError(asked, f"it cannot be read ({error})", "files that can be read") from error


def _blocks(asked: str, path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int) -> Blocks:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise GrowError(asked, "text needs a tokenizer with an end-of-text token", "one beside the teacher; or .npy")
    ids_N: list[int] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        ids_N += [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids_N) < length:
        raise GrowError(asked, f"its {len(ids_N)} tokens do not fill a block of {length}", "a longer text")
    return Blocks(np.array(ids_N[: len(ids_N) // length * length], np.int32).reshape(-1, length))


def _token_ids(asked: str, path: Path) -> np.ndarray:
    valid = "a .npy file of integer token ids [examples, length]"
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header of the file
        raise GrowError(asked, f"it is not an array of numbers ({first_line(error)})", valid) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        what = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise GrowError(asked, f"it is {what}", valid)
    return ids
