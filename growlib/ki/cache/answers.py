"""What a server says of a prompt's tokens, in the form of vLLM or of SGLang, as targets.

    vLLM      {"prompt_logprobs": [null, {"ID": {"logprob": -0.1, "decoded_token": " a"}, ...}, ...]}, or in "choices"
    SGLang    {"meta_info": {"input_token_logprobs": [[null, ID, TEXT], ...],
                             "input_top_logprobs": [null, [[-0.1, ID, TEXT], ...], ...]}}

Entry p of each is the distribution of token p after the tokens before it. The prompt's own token is in it.

Shapes: N positions, K exact tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.sources import short
from growlib.ki.targets import Targets

ABOVE_1 = 1e-3  # by how much the probabilities of a position may sum to more, in the float of a server
VALID = (
    "the prompt's log-probabilities at temperature 1, as vLLM (prompt_logprobs) or SGLang (return_logprob) return them"
)


class Said(NamedTuple):
    """One token of a distribution."""

    id: int
    logprob: float
    text: str | None


def distributions(asked: str, answer: Any, ids: Sequence[int]) -> list[list[Said]]:
    """The distribution of each token but the first, the most probable token first: [L - 1].

    Raises:
        GrowError: it is no answer of a server, or the answer to another prompt.
    """
    try:
        found = _vllm(answer) if "meta_info" not in answer else _sglang(answer["meta_info"])
        rows = [sorted({one.id: one for one in row}.values(), key=lambda one: -one.logprob) for row in found]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise GrowError(asked, f"it holds no answer ({type(error).__name__}: {short(str(error))})", VALID) from error
    if len(rows) != len(ids) - 1:
        raise GrowError(
            asked, f"there are {len(rows)} distributions for {len(ids)} tokens", "one for each but the first"
        )
    for place, (row, own) in enumerate(zip(rows, ids[1:], strict=True), 1):
        if own not in {one.id for one in row}:
            raise GrowError(asked, f"token {place} of the prompt, {own}, is not in its distribution", VALID)
    return rows


def _vllm(answer: Mapping[str, Any]) -> list[list[Said]]:
    if "choices" in answer:
        (answer,) = answer["choices"]
    return [
        [Said(int(token), float(one["logprob"]), one.get("decoded_token")) for token, one in row.items()]
        for row in answer["prompt_logprobs"][1:]
    ]


def _sglang(answer: Mapping[str, Any]) -> list[list[Said]]:
    own, top = answer["input_token_logprobs"][1:], answer["input_top_logprobs"][1:]
    rows = [[*row, token] for row, token in zip(top, own, strict=True)]
    return [[Said(int(token), float(logprob), text) for logprob, token, text in row] for row in rows]


def targets_of(asked: str, rows: Sequence[Sequence[Said]], vocab: int, top_k: int) -> Targets:
    """The K most probable tokens of N positions, and the probability of the others.

    Raises:
        GrowError: a position has fewer tokens, or what it has is no distribution over so many ids.
    """
    ids = np.zeros((len(rows), top_k), np.int64)
    logprobs, tail = np.zeros((len(rows), top_k), np.float32), np.zeros(len(rows), np.float32)
    for place, row in enumerate(rows):
        if len(row) < top_k:
            raise GrowError(f"{asked}, position {place}", f"{len(row)} tokens are listed", f"top_k={top_k} of them")
        sum_of_all = math.fsum(math.exp(one.logprob) for one in row)
        outside = [one.id for one in row if not 0 <= one.id < vocab]
        if outside or not sum_of_all <= 1 + ABOVE_1:
            wrong = f"id {outside[0]} is not below {vocab}" if outside else f"its probabilities sum to {sum_of_all:.4g}"
            raise GrowError(f"{asked}, position {place}", wrong, VALID)
        kept = row[:top_k]
        ids[place], logprobs[place] = [one.id for one in kept], [min(one.logprob, 0.0) for one in kept]
        rest = 1 - math.fsum(math.exp(one.logprob) for one in kept)
        tail[place] = math.log(rest) if rest > 0 else -math.inf
    return Targets(torch.from_numpy(logprobs), vocab, torch.from_numpy(ids), torch.from_numpy(tail), None, "bucket")


def check_texts(asked: str, rows: Sequence[Sequence[Said]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GrowError where most of the texts that a server gives its ids are not those of a tokenizer."""
    said = {one.id: one.text for row in rows for one in row if one.text and "\N{REPLACEMENT CHARACTER}" not in one.text}
    names = {token: (tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)) for token in said}
    other = [token for token, text in said.items() if text.strip() not in [str(name).strip() for name in names[token]]]
    if len(other) * 2 > len(said):
        wrong = (
            f"{len(other)} of {len(said)} tokens have other texts: id {other[0]} is {said[other[0]]!r} for the server, "
        )
        raise GrowError(asked, wrong + f"{names[other[0]][0]!r} for the tokenizer", "the tokenizer of the served model")
