"""docs/architectures.md: the verdict on every model type of transformers that can be built at tiny size.

    python docs/ext/architectures.py docs/architectures.md [TYPE ...]

With types, only those are looked at, and the rest of the page stays.

Verdicts are cached: two processes that looked at half of the types each took 14 minutes on 2 cores with other work on
them, and this command then 10, most of them for types without a table, which are looked at again.
"""

import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import transformers
from tqdm import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from full_size import not_planned
from growlib.architectures import families
from growlib.architectures.schema import EXACT, Architecture, Growth, Verdict
from growlib.errors import GrowError
from growlib.inference import verified

PATIENCE = 240  # seconds of processor time per type, whatever else the machine does
GROWTHS: dict[str, list[Growth]] = {
    "hidden ×2": [Growth("hidden", "x2")],
    "hidden ×1.5": [Growth("hidden", "x1.5")],
    "heads": [Growth("heads", "x2")],
    "FFN": [Growth("ffn", "x1.5"), Growth("expert_ffn", "x1.5"), Growth("ffn", "x2"), Growth("expert_ffn", "x2")],
    "head_dim": [Growth("query", "x2")],
    "experts": [Growth("experts", "x2")],
    "vocabulary": [Growth("vocab", "x1.5")],
}
MARKS = {"exact": "●", "inexact": "◐", "refused": "○", None: "–"}
HEAD = """# What is exact for which

Written by `python docs/ext/architectures.py docs/architectures.md` with transformers {transformers} and \
torch {torch}. Do not edit it. How it is found: [any architecture](inference.md).

Of {types} causal, masked, sequence-to-sequence and image types, {tables} have a table: {written} are written by hand, \
the others inferred from the type's default config. A tiny model of each, with every parameter random, was grown along \
each size. Exact were: {exact}. Then what was exact was planned for the default config itself: \
[at full size](#at-full-size).

● exact · ◐ inexact · ○ refused · – no such size
"""
FULL_SIZE = """
## At full size

What is exact above (whole multiples and depth) can be planned for each type's default config, without memory for its \
values. Not so for these, most of which leave a size unset, or say sizes that the class does not take together:
"""
MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)


def model_types() -> list[str]:
    """transformers' causal, masked, sequence-to-sequence and image types, each once."""
    return list(dict.fromkeys(name for mapping in MAPPINGS for name in mapping))


class OutOfTime(BaseException):
    """Not an Exception: the probes catch those."""


def proven(model_type: str) -> Architecture:
    """The table of a type at its default config, with verdicts. Raises GrowError where there is none."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        config = CONFIG_MAPPING[model_type]()
        return verified(config)
    except OutOfTime as error:
        raise GrowError(
            f"inferring {model_type}", f"it took more than {PATIENCE} s of processor time", "a table"
        ) from error
    except GrowError:
        raise
    except Exception as error:  # whatever a default config raises
        raise GrowError(
            f"inferring {model_type}", f"its default config cannot be built: {error}", "a config"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def depth(table: Architecture) -> Verdict:
    """The verdict on all stacks: exact, or why one of them is not."""
    tried = _tried(table, [Growth(stack.layers, "deeper") for stack in table.stacks])
    if not tried:
        return Verdict("refused", "layers are shared, or no field says how many")
    return next((verdict for verdict in tried if not verdict.exact), EXACT)


def verdicts(table: Architecture) -> dict[str, Verdict | None]:
    """The verdict in each column; None where the class has no such axis."""
    shown: dict[str, Verdict | None] = {"depth": depth(table)}
    for column, growths in GROWTHS.items():
        tried = _tried(table, growths)
        shown[column] = EXACT if EXACT in tried else tried[0] if tried else None
    return shown


def _tried(table: Architecture, growths: Iterable[Growth]) -> list[Verdict]:
    assert table.proven is not None
    return [table.proven[growth] for growth in growths if growth in table.proven]


def mark(verdict: Verdict | None) -> str:
    """A verdict as one sign."""
    return MARKS[None if verdict is None else verdict.kind]


@dataclass
class Page:
    """The document: for each type its marks, and why not where one is not exact or not planned; or why it has none."""

    marks: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    not_planned: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Page":
        """The page that is there. Raises GrowError where it is none."""
        table, _, rest = path.read_text().partition("\n## Why not\n")
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
        parts = [[line for line in part.splitlines() if line.startswith("- **")] for part in rest.split("\n## ")]
        listed = [dict(line.removeprefix("- **").split("**: ", 1) for line in part) for part in parts]
        return cls({name: marks for name, *marks in rows}, *listed)

    def look_at(self, name: str) -> None:
        """Find the verdicts on a type, in place of what the page said."""
        for part in (self.marks, self.reasons, self.not_planned, self.refused):
            part.pop(name, None)
        try:
            table = proven(name)
        except GrowError as error:
            self.refused[name] = _short(error.wrong)
            return
        shown = verdicts(table)
        self.marks[name] = [mark(verdict) for verdict in shown.values()]
        if reasons := _told({column: v.why for column, v in shown.items() if v and not v.exact}):
            self.reasons[name] = reasons
        whys = not_planned(table, CONFIG_MAPPING[name]())
        columns = {"depth": [Growth(stack.layers, "deeper") for stack in table.stacks], **GROWTHS}
        if reasons := _told(
            {c: whys[growth] for c, growths in columns.items() for growth in growths if growth in whys}
        ):
            self.not_planned[name] = reasons

    def lines(self) -> Iterator[str]:
        columns = ["depth", *GROWTHS]
        counts = [sum(marks[i] == MARKS["exact"] for marks in self.marks.values()) for i in range(len(columns))]
        exact = ", ".join(f"{column} {count}" for column, count in zip(columns, counts, strict=True))
        yield HEAD.format(
            transformers=version("transformers"),
            torch=version("torch"),
            types=len(self.marks) + len(self.refused),
            tables=len(self.marks),
            written=len(families()),
            exact=exact,
        )
        yield f"| type | {' | '.join(columns)} |"
        yield "|---" + "|:-:" * len(columns) + "|"
        yield from (f"| {name} | {' | '.join(marks)} |" for name, marks in sorted(self.marks.items()))
        yield "\n## Why not\n"
        yield from (f"- **{name}**: {why}" for name, why in sorted(self.reasons.items()))
        yield FULL_SIZE
        yield from (f"- **{name}**: {why}" for name, why in sorted(self.not_planned.items()))
        yield "\n## No table\n"
        yield from (f"- **{name}**: {why}" for name, why in sorted(self.refused.items()))


def _told(whys: dict[str, str]) -> str:
    """The reasons, each said once, behind all that it holds for."""
    where: dict[str, list[str]] = {}
    for name, why in whys.items():
        where.setdefault(_short(why), []).append(name)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in where.items())


def _short(why: str) -> str:
    text = " ".join(why.split()).replace("|", "/")
    return (text if len(text) <= 200 else text[:197] + "...").replace("<", "&lt;")


def main(path: Path, types: list[str]) -> None:
    """Write the document; with types, look at those alone and keep the rest of the page that is there."""
    transformers.logging.set_verbosity_error()
    logging.captureWarnings(True)
    page = Page.read(path) if types and path.exists() else Page()
    for name in tqdm(types or model_types(), desc="types"):
        page.look_at(name)
        if types:
            path.write_text("\n".join(page.lines()) + "\n")
    path.write_text("\n".join(page.lines()) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
