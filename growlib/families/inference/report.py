"""docs/architectures.md: the verdict on every model type of transformers that can be built at tiny size.

    python -m growlib.families.inference.report docs/architectures.md

Verdicts are cached: two processes that looked at half of the types each took 14 minutes on 2 cores with other work on
them, and this command then 10, most of them for types without a table, which are looked at again.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import FrameType

import transformers
from tqdm import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from growlib.errors import GrowError
from growlib.families import families
from growlib.families.inference import heard
from growlib.families.schema import Family

PATIENCE = 120  # seconds per type
GROWTHS = {
    "hidden ×2": ("hidden x2",),
    "hidden ×1.5": ("hidden x1.5",),
    "heads": ("heads x2",),
    "FFN": ("ffn x1.5", "expert_ffn x1.5", "ffn x2", "expert_ffn x2"),
    "head_dim": ("query x2",),
    "experts": ("experts x2",),
    "vocabulary": ("vocab x1.5",),
}
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


def judged(model_type: str) -> Family:
    """The table of a type at its default config, with verdicts. Raises GrowError where there is none."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        config = CONFIG_MAPPING[model_type]()
        return heard(config)
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


def depth(table: Family) -> str:
    """The verdict on all stacks: "", or why one of them is not exact."""
    assert table.proven is not None
    wrong = [table.proven.get(stack.layers, "it was not tried") for stack in table.stacks]
    return next((why for why in wrong if why), "") if wrong else "layers are shared, or no field says how many"


def verdicts(table: Family) -> dict[str, str | None]:
    """Growth -> "" where it is exact, else why not; None where the class has no such axis."""
    assert table.proven is not None
    found: dict[str, str | None] = {"depth": depth(table)}
    for growth, names in GROWTHS.items():
        heard = [table.proven[name] for name in names if name in table.proven]
        found[growth] = None if not heard else "" if "" in heard else heard[0]
    return found


def word(why: str | None) -> str:
    """A verdict in one word."""
    if why is None:
        return "-"
    inexact = "tiny model differs" in why or "preserves only" in why or "changes from" in why or "leave no place" in why
    return "inexact" if inexact else "refused" if why else "exact"


def lines(types: list[str]) -> Iterator[str]:
    """The document."""
    tables: dict[str, dict[str, str | None]] = {}
    refused: dict[str, str] = {}
    seconds = []
    for name in tqdm(types, desc="types"):
        start = perf_counter()
        try:
            tables[name] = verdicts(judged(name))
        except GrowError as error:
            refused[name] = error.wrong
        seconds.append(perf_counter() - start)
    columns = ["depth", *GROWTHS]
    yield from _head(tables, refused, columns)
    yield f"| type | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, found in sorted(tables.items()):
        yield f"| {name} | {' | '.join(word(found[column]) for column in columns)} |"
    yield "\n## Why not\n"
    for name, found in sorted(tables.items()):
        reasons: dict[str, list[str]] = {}
        for column, why in found.items():
            if why:
                reasons.setdefault(_short(why), []).append(column)
        if reasons:
            yield f"- **{name}**: " + "; ".join(f"{', '.join(where)}: {why}" for why, where in reasons.items())
    yield "\n## No table\n"
    yield from (f"- **{name}**: {_short(why)}" for name, why in sorted(refused.items()))


def _head(tables: dict[str, dict[str, str | None]], refused: dict[str, str], columns: list[str]) -> Iterator[str]:
    yield "# Architectures\n"
    yield (
        f"Generated by `python -m growlib.families.inference.report docs/architectures.md` with transformers "
        f"{version('transformers')} and torch {version('torch')}; do not edit. What the words mean: "
        f"[inference](inference.md).\n"
    )
    yield (
        f"Of {len(tables) + len(refused)} causal, masked, sequence-to-sequence and image types, {len(tables)} have a "
        f"table, {len(families())} of them a curated one, the others by inference from their default config. "
        "Exact among these: "
        + ", ".join(f"{column} {sum(found[column] == '' for found in tables.values())}" for column in columns)
        + ". Each was grown at tiny size with every parameter random.\n"
    )


def _short(why: str) -> str:
    text = " ".join(why.split()).replace("|", "/").replace("<", "(").replace(">", ")")
    return text if len(text) <= 160 else text[:157] + "..."


def main(path: Path, types: list[str]) -> None:
    """Write the document."""
    transformers.logging.set_verbosity_error()
    logging.captureWarnings(True)
    path.write_text("\n".join(lines(types or model_types())) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
