"""Domains that are on every disk: Python code, the prose of its docstrings, and the C++ headers of torch."""

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from base.setting import Text
from base.store import key_of, write_folder
from base.text import Corpus, prepare, read_files
from growlib import GrowError

LONG_ENOUGH = 80  # characters of a docstring


def split(source: str) -> tuple[str, str] | None:
    """(code without docstrings, the docstrings) of a Python file; None where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    lines, prose = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        if len(docstring) >= LONG_ENOUGH:
            prose.append(docstring)
        place = node.body[0]
        for line in range(place.lineno - 1, place.end_lineno or place.lineno):
            lines[line] = ""
    return "".join(lines), "\n\n".join(prose)


def code_and_prose(setting: Text, folder: Path) -> dict[str, Corpus]:
    """Both domains as tokens of one tokenizer, which is trained on both.

    Args:
        setting: `source` and `max_bytes` of Python files.
        folder: where texts and tokens are kept.
    """
    return _tokens(_code_and_prose(setting), setting, folder)


def code_prose_and_headers(setting: Text, folder: Path) -> dict[str, Corpus]:
    """The same, and the C++ headers that torch brings along, as many characters as there is code."""
    texts, size = _code_and_prose(setting), 0
    limit = sum(map(len, texts["code"].values()))
    texts["headers"] = {}
    for number, content in enumerate(read_files(str(Path(torch.__file__).parent / "include"))):
        texts["headers"][f"{number:05d}"] = content
        size += len(content)
        if size >= limit:
            break
    return _tokens(texts, setting, folder)


def _code_and_prose(setting: Text) -> dict[str, dict[str, str]]:
    """Domain -> name of a file -> its text."""
    texts: dict[str, dict[str, str]] = {"code": {}, "prose": {}}
    size = 0
    for number, content in enumerate(read_files(setting.source)):
        parts = split(content)
        if parts is None or not parts[1]:
            continue
        for name, part in zip(texts, parts, strict=True):
            texts[name][f"{number:05d}"] = part
        size += len(content)
        if setting.max_bytes and size >= setting.max_bytes:
            break
    return texts


def _tokens(texts: Mapping[str, Mapping[str, str]], setting: Text, folder: Path) -> dict[str, Corpus]:
    """Each domain, under one tokenizer that is trained on all. `texts`: domain -> name of a file -> its text."""
    place = folder / f"domains-{key_of(texts)}"

    def fill(empty: Path) -> None:
        for name, files in texts.items():
            (empty / name).mkdir()
            for file, content in files.items():
                (empty / name / f"{file}.txt").write_text(content, encoding="utf-8")

    if not place.exists():
        write_folder(place, fill)

    def prepared(part: str, tokenizer: Path | None) -> Corpus:
        try:
            return prepare(replace(setting, max_bytes=0, source=str(place / part)), tokenizer, folder)
        except GrowError as error:  # it names a folder that only this function knows
            asked = f"the text {setting.source}, its {part or ' and '.join(texts)}"
            raise GrowError(asked, error.wrong, f"more Python with docstrings of {LONG_ENOUGH} characters") from error

    tokenizer = folder / f"text-{prepared('', None).key}"
    return {name: prepared(name, tokenizer) for name in texts}
