"""Tasks that are made of the standard library: of which package a snippet is, and whether it is prose or code.

Shapes: N snippets, L tokens of each.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from base.domains import split
from base.setting import Downstream
from base.store import key_of, write_folder
from base.text import python_files, read_utf8
from growlib import GrowError

PARTS = ("train", "test", "train", "choice")  # of a class's files, in turn
Labelled = tuple[np.ndarray, np.ndarray]  # ids [N, L], classes [N]
Files = Mapping[str, Mapping[str, str]]  # package -> name of a file -> its text


@dataclass(frozen=True)
class Task:
    """Snippets with their classes: those to train on, those that choose a rate, and those of the accuracy.

    No file gives snippets to two parts, and all classes have as many snippets.
    """

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, Labelled]


def packages(number: int) -> tuple[Files, dict[str, str]]:
    """The standard library's packages with the most files, and all other files. No text is there twice.

    Raises:
        GrowError: there are not so many with a file for each part.
    """
    root = Path(sysconfig.get_path("stdlib"))
    read = {name: text for name, path in sorted(python_files(root)) if (text := read_utf8(path))}
    once = {name: text for text, name in {text: name for name, text in read.items()}.items()}
    found: dict[str, dict[str, str]] = {}
    for name, text in once.items():
        if "/" in name:
            found.setdefault(name.partition("/")[0], {})[name] = text
    largest = sorted(found, key=lambda package: (-len(found[package]), package))[:number]
    if len(largest) < max(number, 2) or len(found[largest[-1]]) < len(PARTS):
        several = sum(len(files) >= len(PARTS) for files in found.values())
        raise GrowError(f"{number} packages", f"{several} have {len(PARTS)} files or more", f"2 to {several}")
    chosen = {package: found[package] for package in sorted(largest)}
    named = {name for files in chosen.values() for name in files}
    return chosen, {name: text for name, text in once.items() if name not in named}


def write_files(files: Mapping[str, str], folder: Path) -> Path:
    """A folder in `folder` that holds these files."""
    place = folder / f"files-{key_of(dict(files))}"

    def fill(empty: Path) -> None:
        for name, text in files.items():
            (empty / name.replace("/", "+")).write_text(text, encoding="utf-8")

    if not place.exists():
        write_folder(place, fill)
    return place


def tasks(files: Files, setting: Downstream, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """Which package; docstring or code. Both are of the same files, each of which is in the same part in both."""
    parts = {package: _parts(of_package) for package, of_package in files.items()}
    package = {
        part: {name: [files[name][file] for file in chosen[part]] for name, chosen in parts.items()}
        for part in sorted(set(PARTS))
    }
    kinds = {
        part: dict(zip(("code", "docstring"), zip(*_split(texts), strict=True), strict=True))
        for part, texts in package.items()
    }
    return [_task("package", package, setting, tokenizer), _task("docstring or code", kinds, setting, tokenizer)]


def _parts(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Part -> names of its files."""
    parts: dict[str, list[str]] = {}
    for number, name in enumerate(sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())):
        parts.setdefault(PARTS[number % len(PARTS)], []).append(name)
    return parts


def _split(texts: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(code, docstrings) of each file that has both."""
    found = [split(text) for of_class in texts.values() for text in of_class]
    return (one for one in found if one and all(one))


def _task(
    name: str,
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    setting: Downstream,
    tokenizer: PreTrainedTokenizerBase,
) -> Task:
    """Args: texts: part -> class -> texts of its files."""
    classes = tuple(texts["train"])
    parts = {}
    for part, of_part in texts.items():
        wanted = (setting.train if part == "train" else setting.judged) // len(classes)
        rows = [_snippets(of_part[one], setting.length, tokenizer) for one in classes]
        number = min(wanted, *map(len, rows))
        if number == 0:
            asked = f"the task {name}, snippets of {setting.length} tokens"
            raise GrowError(
                asked, f"its part {part} lacks one for each class", "shorter or more snippets, fewer packages"
            )
        ids = np.concatenate([of_class[:number] for of_class in rows])
        labels = np.repeat(np.arange(len(classes)), number)
        order = np.random.default_rng(0).permutation(len(labels))
        parts[part] = (ids[order], labels[order])
    return Task(name, classes, parts)


def _snippets(texts: Sequence[str], length: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token blocks of some files, shuffled, [N, L]; the end of a file that fills none is left out."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    rows = [ids[at : at + length] for ids in encoded for at in range(0, len(ids) - length + 1, length)]
    blocks = np.array(rows, np.int64).reshape(-1, length)
    return np.random.default_rng(0).permutation(blocks)
