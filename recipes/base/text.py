"""Text -> token blocks: source files, a split by file, a byte-level BPE tokenizer, and an order of training.

Shapes: L sequence length; blocks are int32 arrays [number, L].
"""

import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from base.setting import Text
from base.store import key_of, write_folder
from growlib import GrowError

SEPARATOR, MASK = "<|endoftext|>", "<|mask|>"
HELD_OUT_EVERY = 16  # one file of so many is held out
HELD_OUT_CHARS = 50_000  # of one file, so that no file outweighs the others
PIECE_LINES = 400  # a single file is cut into pieces of so many lines, which then are the files of the split
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}
IGNORED = -100
DOMAIN = "domain"  # the column that names an example's domain


class Masking(NamedTuple):
    """What a masked language model has to find: a share of the tokens, all of which become the mask token."""

    token: int
    share: float


@dataclass(frozen=True)
class Corpus:
    """Tokens of the text, split by file."""

    key: str  # of the text and of the tokenizer
    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray  # [number, L]
    held_out: np.ndarray  # [number, L]
    files: int


def read_files(source: str) -> list[str]:
    """The texts of the source's files, no content twice, in an order that depends on their names alone.

    Args:
        source: "stdlib" (the running Python's standard library), "environment" (every Python file of the
            running environment), or the path of a file or folder of text.

    Raises:
        GrowError: there is nothing to read.
    """
    asked = f"the text {source}"
    if source == "stdlib":
        files = dict(python_files(Path(sysconfig.get_path("stdlib"))))
    elif source == "environment":
        roots = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
        files = {f"{i}/{name}": path for i, root in enumerate(roots) for name, path in python_files(root)}
    else:
        root = Path(source)
        if not root.exists():
            raise GrowError(asked, "there is no such file or folder", "the path of a file or folder of text")
        if root.is_file():
            lines = (read_utf8(root) or "").splitlines(keepends=True)
            return _shuffled((str(i), "".join(lines[i : i + PIECE_LINES])) for i in range(0, len(lines), PIECE_LINES))
        names = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        files = {name: path for name, path in names.items() if not any(p.startswith(".") for p in name.split("/"))}
    texts = _shuffled((name, text) for name, path in files.items() if (text := read_utf8(path)))
    if not texts:
        raise GrowError(asked, "it holds no file of UTF-8 text", "a file or folder of text")
    return texts


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The library's own sources: no packages installed below it, no tests, no data in the form of Python."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS & set(parts):
            yield "/".join(parts), path


def read_utf8(path: Path) -> str | None:
    """A file's text; None where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # an old encoding, a binary file, a broken link
        return None
    return None if "\0" in text else text


def _shuffled(named: Iterable[tuple[str, str]]) -> list[str]:
    in_order = sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return list(dict.fromkeys(text for _, text in in_order))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is encoded, and no text is lost."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        mask_token=MASK,
    )


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token between two documents."""
    ids = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise GrowError("the small model's tokenizer", "it has no token for the end of a text", "one with eos or sep")
    return found


def prepare(setting: Text, small: Path | None, store: Path) -> Corpus:
    """Tokens of the setting's text, from the store where they lie there already.

    Args:
        small: the folder of a checkpoint whose tokenizer is used; None trains a tokenizer.
        store: the folder in which the tokens are kept.

    Raises:
        GrowError: the text is missing or too short.
    """
    texts = list(_first_bytes(read_files(setting.source), setting.max_bytes))
    digest = key_of([hashlib.sha256(text.encode()).hexdigest() for text in texts])
    given = tokenizer_at(f"--small {small}", small) if small else None
    described = _described(small, given) if small and given else None
    key = key_of(digest, setting.vocab_size, setting.tokenizer_bytes, described)
    folder = store / f"text-{key}"
    if not folder.exists():
        write_folder(folder, lambda empty: _encode_all(empty, setting, given, texts))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    blocks = {part: _blocks(np.load(folder / f"{part}.npy"), setting.sequence_length) for part in ("train", "held_out")}
    evaluated = setting.held_out_tokens // setting.sequence_length
    if len(blocks["held_out"]) == 0 or len(blocks["train"]) == 0:
        sizes = ", ".join(f"{part} {len(rows)}" for part, rows in blocks.items())
        raise GrowError(
            f"the text {setting.source}",
            f"too little text for sequences of {setting.sequence_length} tokens ({sizes})",
            "a few hundred kilobytes of text or more, in several files or many lines",
        )
    spread = np.unique(np.linspace(0, len(blocks["held_out"]) - 1, evaluated).astype(int))
    return Corpus(key, tokenizer, blocks["train"], blocks["held_out"][spread], len(texts))


def tokenizer_at(asked: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a checkpoint. Raises GrowError where there is none; no code of it is run."""
    if not any((folder / f"tokenizer{end}").is_file() for end in (".json", "_config.json")):
        raise GrowError(asked, "there is no tokenizer beside it", "a folder with a model and its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises has no class of its own
        wrong = f"its tokenizer cannot be read ({str(error).strip().partition(chr(10))[0]})"
        raise GrowError(asked, wrong, "a tokenizer of transformers") from error


def _described(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What tells a tokenizer from others."""
    whole = folder / "tokenizer.json"
    return whole.read_text(encoding="utf-8") if whole.is_file() else tokenizer.get_vocab()


def _encode_all(folder: Path, setting: Text, given: PreTrainedTokenizerBase | None, texts: list[str]) -> None:
    parts = {
        "train": [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY],
        "held_out": [text[:HELD_OUT_CHARS] for text in texts[::HELD_OUT_EVERY]],
    }
    tokenizer = given or train_tokenizer(_first_bytes(parts["train"], setting.tokenizer_bytes), setting.vocab_size)
    tokenizer.save_pretrained(folder)
    for part, of_part in parts.items():
        np.save(folder / f"{part}.npy", _encode(tokenizer, of_part, f"tokens, {part.replace('_', '-')}"))


def _first_bytes(texts: list[str], limit: int) -> Iterator[str]:
    """Whole texts until there are `limit` bytes; all of them where the limit is 0."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if limit and size >= limit:
            return


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str) -> np.ndarray:
    """All texts as one array of ids, a separator before each."""
    separator, pieces = [separator_of(tokenizer)], [np.empty(0, np.int32)]
    source = iter(tqdm(texts, desc=name, unit="file", mininterval=1.0))
    while batch := list(islice(source, 64)):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False, return_attention_mask=False)
        pieces += [np.array(separator + ids, np.int32) for ids in encoded["input_ids"]]
    return np.concatenate(pieces)


def _blocks(ids_N: np.ndarray, length: int) -> np.ndarray:
    return ids_N[: len(ids_N) // length * length].reshape(-1, length)


def share_text(corpus: Corpus, train_tokens: int, small_text: str) -> tuple[np.ndarray, np.ndarray]:
    """Training blocks of the target and of the small model: `train_tokens` distinct tokens, and which others.

    Raises:
        GrowError: there is not that much text.
    """
    length = corpus.train.shape[1]
    wanted = train_tokens // length if train_tokens else len(corpus.train)
    if small_text not in {"same", "other"}:
        raise GrowError(f"small.text = {small_text!r}", "there is no such choice", "same or other")
    available = len(corpus.train) - (1 if small_text == "other" else 0)
    if not 0 < wanted <= available:
        raise GrowError(
            f"training on {train_tokens or 'all'} distinct tokens, the small model on {small_text} text",
            f"the text has {corpus.train.size} in its training part",
            f"{length} to {available * length} tokens, or more text",
        )
    target = corpus.train[:wanted]
    return target, target if small_text == "same" else corpus.train[wanted:]


class Ordered(Dataset):
    """Blocks in the order in which a training sees them: every block once, reshuffled, and again.

    The order depends on the seed alone, so every arm sees the same tokens at the same step.
    """

    def __init__(self, blocks: np.ndarray, number: int, seed: int, masking: Masking | None) -> None:
        rounds = -(-number // len(blocks))
        shuffled = [np.random.default_rng([seed, i]).permutation(len(blocks)) for i in range(rounds)]
        self.blocks, self.order = blocks, np.concatenate(shuffled)[:number]
        self.seed, self.masking = seed, masking

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[self.order[position]].astype(np.int64))
        if self.masking is None:
            return {"input_ids": ids, "labels": ids}
        chosen = torch.from_numpy(np.random.default_rng([self.seed, position]).random(len(ids)) < self.masking.share)
        chosen[position % len(ids)] = True  # a block without a masked token has no loss
        return {
            "input_ids": ids.masked_fill(chosen, self.masking.token),
            "labels": ids.masked_fill(~chosen, IGNORED),
        }


class OfDomains(Dataset):
    """The blocks of several domains, shuffled together in the order of `Ordered`; `named` ones say their domain."""

    def __init__(
        self, parts: Mapping[str, np.ndarray], number: int, seed: int, masking: Masking | None, named: bool
    ) -> None:
        blocks = np.concatenate(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
        self.ordered, self.named = Ordered(blocks, number, seed, masking), named
        names = [name for name, rows in parts.items() for _ in range(len(rows))]
        self.domains = [names[block] for block in self.ordered.order]  # in the order of training

    def __len__(self) -> int:
        return len(self.ordered)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.ordered[position]
        return {**row, DOMAIN: self.domains[position]} if self.named else row


def masking_of(tokenizer: PreTrainedTokenizerBase, masked: bool, share: float) -> Masking | None:
    """For a masked language model; None for a causal one."""
    if masked and tokenizer.mask_token_id is None:
        raise GrowError("a masked language model", "its tokenizer has no mask token", "a tokenizer with one")
    return Masking(tokenizer.mask_token_id, share) if masked else None
