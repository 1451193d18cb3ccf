"""docs/architectures.md: the verdict on every model type of transformers that can be built at tiny size.

    python docs/ext/architectures.py docs/architectures.md

Verdicts are cached: two processes that looked at half of the types each took 14 minutes on 2 cores with other work on
them, and this command then 10, most of them for types without a table, which are looked at again.
"""

import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import transformers
from tqdm import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from growlib.architectures import families
from growlib.architectures.schema import EXACT, Architecture, Growth, Verdict
from growlib.errors import GrowError
from growlib.inference import verified

PATIENCE = 120  # seconds per type
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

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        config = CONFIG_MAPPING[model_type]()
        return verified(config)
    except OutOfTime as error:
        raise GrowError(f"inferring {model_type}", f"it took more than {PATIENCE} s", "a table") from error
    except GrowError:
        raise
    except Exception as error:  # whatever a default config raises
        raise GrowError(
            f"inferring {model_type}", f"its default config cannot be built: {error}", "a config"
        ) from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


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


def lines(types: list[str]) -> Iterator[str]:
    """The document."""
    tables: dict[str, dict[str, Verdict | None]] = {}
    refused: dict[str, str] = {}
    for name in tqdm(types, desc="types"):
        try:
            tables[name] = verdicts(proven(name))
        except GrowError as error:
            refused[name] = error.wrong
    columns = ["depth", *GROWTHS]
    yield from _head(tables, refused, columns)
    yield f"| type | {' | '.join(columns)} |"
    yield "|---" + "|:-:" * len(columns) + "|"
    for name, shown in sorted(tables.items()):
        yield f"| {name} | {' | '.join(mark(shown[column]) for column in columns)} |"
    yield "\n## Why not\n"
    for name, shown in sorted(tables.items()):
        reasons: dict[str, list[str]] = {}
        for column, verdict in shown.items():
            if verdict and not verdict.exact:
                reasons.setdefault(_short(verdict.why), []).append(column)
        if reasons:
            yield f"- **{name}**: " + "; ".join(f"{', '.join(where)}: {why}" for why, where in reasons.items())
    yield "\n## No table\n"
    yield from (f"- **{name}**: {_short(why)}" for name, why in sorted(refused.items()))


def _head(tables: dict[str, dict[str, Verdict | None]], refused: dict[str, str], columns: list[str]) -> Iterator[str]:
    yield "# What is exact for which\n"
    yield (
        f"Written by `python docs/ext/architectures.py docs/architectures.md` with transformers "
        f"{version('transformers')} and torch {version('torch')}. Do not edit it. How it is found: "
        f"[any architecture](inference.md).\n"
    )
    yield (
        f"Of {len(tables) + len(refused)} causal, masked, sequence-to-sequence and image types, {len(tables)} have a "
        f"table: {len(families())} are written by hand, the others inferred from the type's default config. "
        "A tiny model of each, with every parameter random, was grown along each size. Exact were: "
        + ", ".join(f"{column} {sum(shown[column] == EXACT for shown in tables.values())}" for column in columns)
        + ".\n"
    )
    yield "● exact · ◐ inexact · ○ refused · – no such size\n"


def _short(why: str) -> str:
    text = " ".join(why.split()).replace("|", "/")
    return (text if len(text) <= 160 else text[:157] + "...").replace("<", "&lt;")


def main(path: Path, types: list[str]) -> None:
    """Write the document."""
    transformers.logging.set_verbosity_error()
    logging.captureWarnings(True)
    path.write_text("\n".join(lines(types or model_types())) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
