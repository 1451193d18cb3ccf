"""A teacher that somebody serves: its answers, from a file or asked for now, become a cache."""

import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.cache import shards
from growlib.ki.cache.answers import VALID, check_texts, distributions, targets_of
from growlib.ki.cache.batches import Batches
from growlib.ki.cache.capture import write_cache
from growlib.ki.cache.data import Examples, padded
from growlib.ki.cache.parquet import has_pyarrow, parquet_rows
from growlib.ki.cache.reader import TeacherCache
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.shards import StoredExample

ANSWERS = ("prompt_logprobs", "meta_info", "choices")  # what a server calls them
ANSWER = "answer"  # the column of an example that holds what a server said
AT_ONCE, TRIES, PAUSE = 16, 4, 0.5  # requests; of one request; seconds before the second, doubled each time
PATIENCE = 600  # seconds for an answer
BUSY = (429, 502, 503, 504)

Ask = Callable[[list[int]], Any]


class AnswerFile:
    """The examples of a .jsonl or .parquet file with a server's answers, read anew each time.

    A line or row has the token ids, `input_ids` or vLLM's `prompt_token_ids`, perhaps `labels`, and the answer: vLLM's
    `prompt_logprobs` or SGLang's `meta_info`. In Parquet the answer is a JSON text, or nested (lists, maps, structs).

    Raises:
        GrowError: there is no such file; or it is Parquet, and pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._asked = f"reading answers from {str(path)!r}"
        if not self.path.is_file():
            raise GrowError(self._asked, "there is no such file", "a .jsonl or .parquet file")
        self._is_parquet = self.path.suffix == ".parquet"
        if self._is_parquet and not has_pyarrow():
            raise GrowError(self._asked, "Parquet needs pyarrow, which is not installed", "pip install pyarrow; .jsonl")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._is_parquet:
            for number, row in enumerate(parquet_rows(self._asked, self.path), 1):
                yield self._example(f"{self._asked}, row {number}", partial(dict, row))
            return
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._example(f"{self._asked}, line {number}", partial(json.loads, line))

    def _example(self, asked: str, read: Callable[[], Any]) -> dict[str, Any]:
        try:
            row = read()
            row |= {name: json.loads(row[name]) for name in ANSWERS if isinstance(row.get(name), str)}
            ids = row["input_ids"] if "input_ids" in row else row["prompt_token_ids"]
            if not (ids and all(type(token) is int and token >= 0 for token in ids)):
                raise ValueError("its token ids are none")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise GrowError(asked, f"{type(error).__name__}: {error}", f"input_ids, and {VALID}") from error
        return {"input_ids": ids, "labels": row.get("labels", ids), ANSWER: row}

    def hash(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


@dataclass(frozen=True)
class Server:
    """A server of completions: `Server("http://host:8000/v1", "model")(ids)` asks for a prompt's log-probabilities.

    An address that ends with `/generate` is SGLang's own interface; any other is OpenAI's, with vLLM's
    `prompt_logprobs`. The environment's OPENAI_API_KEY goes along.
    """

    url: str
    model: str
    top_k: int = 16

    def __call__(self, ids: list[int]) -> Any:
        """The answer. Raises GrowError where there is none."""
        if self.url.rstrip("/").endswith("/generate"):
            address, sampling = self.url, {"max_new_tokens": 1, "temperature": 1.0}
            body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
            body |= {"top_logprobs_num": self.top_k, "return_text_in_logprobs": True}
        else:
            address = f"{self.url.rstrip('/')}/completions"
            body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
            body |= {"prompt_logprobs": self.top_k}
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        return self._opened(request)

    def _opened(self, request: urllib.request.Request) -> Any:
        valid = "a running server; finished files are kept, and the same call continues"
        for turn in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                    return json.load(response)
            except (OSError, ValueError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code not in BUSY
                if refused or turn + 1 == TRIES:
                    raise GrowError(
                        f"asking the server {self.url}", f"{type(error).__name__}: {error}", valid
                    ) from error
                time.sleep(PAUSE * 2**turn)


class _Recorder:
    """Answers as a shard holds them."""

    def __init__(
        self, ask: Ask, batches: Batches, record_format: RecordFormat, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.ask, self.batches, self.format, self.tokenizer = ask, batches, record_format, tokenizer

    def stored(self, examples: Iterable[Mapping[str, Any]], first: int) -> list[StoredExample]:
        rows = list(examples)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = pool.map(lambda row: row.get(ANSWER) or self.ask(_ids(row)), rows)
            numbered = enumerate(zip(rows, answers, strict=True), first)
            return [self._one(f"example {number}", row, answer) for number, (row, answer) in numbered]

    def _one(self, asked: str, row: Mapping[str, Any], answer: Any) -> StoredExample:
        batch = self.batches.batch([row])
        (example,) = batch.examples
        found = distributions(asked, answer, _ids(row))
        counted = [found[place] for place in batch.positions.mask[0].nonzero()[:, 0].tolist()]
        if self.tokenizer is not None:
            check_texts(asked, counted, self.tokenizer)
        records = self.format.encode(targets_of(asked, counted, self.format.vocab, self.format.top_k))
        labels = batch.positions.labels.tolist()
        said = zip(counted, labels, strict=True)
        ce = [-one.logprob for row, label in said for one in row if one.id == label and one.logprob > -math.inf]
        return StoredExample(example.digest, float(sum(ce)), len(ce), records)


def cache_served(
    answers: AnswerFile | Any,
    path: str | os.PathLike[str],
    *,
    server: Server | None = None,
    top_k: int = 16,
    vocab: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard_examples: int = 1024,
) -> TeacherCache:
    """Write what a served teacher says of every example as a cache, for `KIConfig(teacher=path)`.

    The targets are the K most probable tokens at temperature 1, and the tail as one bucket. Each example is one prompt.
    An interrupted call continues where it stopped.

    Args:
        answers: an `AnswerFile`; or, with a server, the examples, as the Trainer takes them.
        path: a folder, new or of an interrupted call.
        server: what is asked for each example.
        top_k: exact tokens per position; the server has to list as many.
        vocab: how many token ids the teacher has; None: those of the tokenizer.
        tokenizer: of the served model. The texts that the server gives its ids are compared with it.
        shard_examples: examples per file.

    Raises:
        GrowError: an answer is none, or that to another prompt, or no distribution; the server does not answer; the
            tokenizer is another one; or the folder cannot be written to.
    """
    if vocab is None:
        if tokenizer is None:
            raise GrowError("cache_served", "nothing says how many token ids there are", "vocab, or the tokenizer")
        vocab = len(tokenizer)
    if server is not None and server.top_k < top_k:
        raise GrowError(f"cache_served(top_k={top_k})", f"the server is asked for {server.top_k}", "as many, or fewer")
    if server is None and not isinstance(answers, AnswerFile):
        raise GrowError("cache_served", "there are examples and no server", "a server=Server(url, model)")
    folder = Path(os.path.expanduser(path))
    shards.check_place(folder)
    examples, record_format = Examples(answers, "dataset"), RecordFormat(vocab, top_k, 0, 1.0)
    batches = Batches(padded, 1, "causal", ids={"input_ids": vocab, "labels": vocab})
    glance = batches.glance(examples)
    header = shards.Header(
        format=shards.FORMAT,
        dtype=None,
        teacher=f"served {server.model if server else answers.hash()}",
        tokenizer=None if tokenizer is None else shards.tokenizer_hash(tokenizer),
        task="causal",
        vocab=vocab,
        top_k=top_k,
        samples=0,
        temperature=1.0,
        seed=0,
        examples=len(examples),
        dataset=glance.hash,
        shard_examples=shard_examples,
        batch_size=1,
        held_out_ce=None,
    )
    recorder = _Recorder(server or _nobody, batches, record_format, tokenizer)
    write_cache(folder, header, glance.positions, recorder, examples, PartialState())
    return TeacherCache(folder)


def _ids(row: Mapping[str, Any]) -> list[int]:
    return [int(token) for token in row["input_ids"]]


def _nobody(ids: list[int]) -> Any:
    raise GrowError("cache_served", f"a line of the file has no answer for {len(ids)} tokens", VALID)
