"""The lines of a .jsonl file as examples: token ids, a text, or the messages of a conversation."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.sources import first_line, short

LARGEST = 1 << 31  # of a token id or position, exclusive
OF_TOKENS = ("attention_mask", "token_type_ids", "position_ids")  # one for each token, as `labels` often are
EXAMPLE = 'such as {"input_ids": [5, 3, 8]}, {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def lines(asked: str, path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int) -> list[dict[str, Any]]:
    """Every example of a file; raises GrowError where a line is none."""
    examples: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:  # whose lines, unlike splitlines', do not end at U+2028
        for number, line in enumerate(file, 1):
            if line.strip():
                examples += _examples(f"{asked}, line {number}", line, tokenizer, length)
    if not examples:
        raise GrowError(asked, "it is empty", "an example per line")
    return examples


def _examples(
    asked: str, line: str, tokenizer: PreTrainedTokenizerBase | None, length: int
) -> Iterator[dict[str, Any]]:
    """The example of a line, in parts where it is a text of more than `length` tokens."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GrowError(asked, f"it is not an example ({error!r})", EXAMPLE) from error
    if not isinstance(row, dict):
        raise GrowError(asked, f"it is not an example but a {type(row).__name__}", EXAMPLE)
    if "input_ids" in row:
        _check(asked, row)
        yield {"labels": row["input_ids"], **row}
        return
    if "messages" not in row and "text" not in row:
        raise GrowError(asked, f"it has {', '.join(map(short, row)) or 'no columns'}, and no input_ids", EXAMPLE)
    ids = _encoded(asked, row, tokenizer)
    if not ids:
        raise GrowError(asked, "its text has no tokens", "a text of one or more")
    for start in range(0, len(ids), length):
        part = ids[start : start + length]
        yield {"input_ids": part, "labels": part}


def _check(asked: str, row: dict[str, Any]) -> None:
    """Raise GrowError where a column that a model reads holds no whole numbers, or not one for each token."""
    count = len(_numbers(asked, row, "input_ids", 0))
    for name in (*OF_TOKENS, "labels"):
        if name in row and len(_numbers(asked, row, name, -LARGEST if name == "labels" else 0)) != count:
            wrong = f"it has {len(row[name])} {name} for {count} input_ids"
            if name != "labels":  # an encoder-decoder has others
                raise GrowError(asked, wrong, "one for each token")


def _numbers(asked: str, row: dict[str, Any], name: str, least: int) -> np.ndarray:
    try:
        numbers = np.array(row[name])
    except (ValueError, OverflowError) as error:
        raise GrowError(asked, f"its {name} are no row of numbers ({first_line(error)})", EXAMPLE) from error
    whole = numbers.ndim == 1 and numbers.dtype.kind == "i" and numbers.size
    if not whole or numbers.min() < least or numbers.max() >= LARGEST:
        kind = "token ids" if name in ("input_ids", "labels") else "whole numbers"
        raise GrowError(asked, f"its {name} are not {kind}", EXAMPLE)
    return numbers


def _encoded(asked: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The token ids of a line's messages or text; raises GrowError where the tokenizer cannot encode it."""
    name = "messages" if "messages" in row else "text"
    if tokenizer is None:
        raise GrowError(asked, f"its {name} need a tokenizer", "one beside the teacher's weights, or input_ids")
    if name == "text" and not isinstance(row[name], str):
        raise GrowError(asked, f"its text is a {type(row[name]).__name__}", EXAMPLE)
    if name == "messages" and not tokenizer.chat_template:
        raise GrowError(asked, "the teacher's tokenizer has no chat template for its messages", "text, or input_ids")
    if name == "messages" and not _are_messages(row[name]):  # some versions of transformers take them
        raise GrowError(asked, "its messages cannot be encoded: they are no list of messages", EXAMPLE)
    try:
        if name == "text":
            encoded: Any = tokenizer(row[name], verbose=False)
        else:
            encoded = tokenizer.apply_chat_template(row[name], tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    except Exception as error:  # templates raise errors of their own
        raise GrowError(asked, f"its {name} cannot be encoded ({first_line(error)})", EXAMPLE) from error


def _are_messages(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(message, Mapping) for message in found)
