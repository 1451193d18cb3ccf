"""Two domains that are on every disk: Python code, and the prose of its docstrings."""

import ast
from pathlib import Path

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
    kept, size = {}, 0
    for number, content in enumerate(read_files(setting.source)):
        parts = split(content)
        if parts is None or not parts[1]:
            continue
        kept[f"{number:05d}"] = parts
        size += len(content)
        if setting.max_bytes and size >= setting.max_bytes:
            break
    place = folder / f"domains-{key_of(kept)}"

    def fill(empty: Path) -> None:
        for part, name in enumerate(("code", "prose")):
            (empty / name).mkdir()
            for number, texts in kept.items():
                (empty / name / f"{number}.txt").write_text(texts[part], encoding="utf-8")

    if not place.exists():
        write_folder(place, fill)
    fields = {name: getattr(setting, name) for name in setting.__dataclass_fields__} | {"max_bytes": 0}

    def prepared(part: str, tokenizer: Path | None) -> Corpus:
        try:
            return prepare(Text(**{**fields, "source": str(place / part)}), tokenizer, folder)
        except GrowError as error:  # it names a folder that only this function knows
            asked = f"the text {setting.source}, its {part or 'code and prose'}"
            raise GrowError(asked, error.wrong, f"more Python with docstrings of {LONG_ENOUGH} characters") from error

    tokenizer = folder / f"text-{prepared('', None).key}"
    return {name: prepared(name, tokenizer) for name in ("code", "prose")}
