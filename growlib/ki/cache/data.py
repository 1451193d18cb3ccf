"""Examples: of any dataset that the Trainer takes, and from files, for the command line and its cache's training."""

import json
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
        path: a .npy array of token ids [E, L]; a .jsonl file, an example per line, whose `labels` are its `input_ids`
            where it has none; a file or folder of UTF-8 text, whose files are encoded in the order of their names,
            joined with the end-of-text token and cut into blocks of `length`.
        tokenizer: for text.
    """
    path = Path(path)
    asked = f"reading examples from {str(path)!r}"
    if not path.exists():
        raise GrowError(asked, "there is no such file or folder", "a .npy or .jsonl file, or text")
    kind = path.suffix if path.is_file() else ""
    if kind == ".npy":
        return Blocks(_token_ids(asked, path))
    if kind == ".jsonl":
        return _lines(asked, path)
    if length < 2:
        raise GrowError(asked, f"a block of length={length} has no token to predict", "2 or more tokens")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise GrowError(asked, "text needs a tokenizer with an end-of-text token", "one beside the teacher; or .npy")
    ids_N: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise GrowError(asked, f"{file} is not UTF-8 text", "text files only") from error
        ids_N += [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids_N) < length:
        raise GrowError(asked, f"its {len(ids_N)} tokens do not fill a block of {length}", "a longer text")
    return Blocks(np.array(ids_N[: len(ids_N) // length * length], np.int32).reshape(-1, length))


def _token_ids(asked: str, path: Path) -> np.ndarray:
    valid = "a .npy file of integer token ids [examples, length]"
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GrowError(asked, f"it is not an array of numbers ({error})", valid) from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise GrowError(asked, f"it is {ids.dtype} of shape {ids.shape}", valid)
    return ids


def _lines(asked: str, path: Path) -> list[dict[str, Any]]:
    examples = []
    try:
        with path.open(encoding="utf-8") as file:  # whose lines, unlike splitlines', do not end at U+2028
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_line(f"{asked}, line {number}", line))
    except UnicodeDecodeError as error:
        raise GrowError(asked, f"it is not UTF-8 text ({error})", "an example per line") from error
    if not examples:
        raise GrowError(asked, "it is empty", "an example per line")
    return examples


def _line(asked: str, line: str) -> dict[str, Any]:
    try:
        example = json.loads(line)
        ids = np.array(example["input_ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise GrowError(asked, f"it is not an example ({error!r})", 'such as {"input_ids": [5, 3, 8]}') from error
    if ids.ndim != 1 or ids.dtype.kind != "i" or not (ids.min() >= 0 and ids.max() < 1 << 31):
        raise GrowError(asked, "its input_ids are not token ids", 'such as {"input_ids": [5, 3, 8]}')
    return {"labels": example["input_ids"], **example}
