"""docs/ladders.md: which steps between published sizes (published_sizes.toml) are exact, from configs alone.

python docs/ext/ladders.py docs/ladders.md
"""

import logging
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import growlib
from growlib import GrowError
from growlib.nearest import nearest_exact

DATA = Path(__file__).parent / "published_sizes.toml"
OF_A_LADDER = {"family", "hub", "type", "all", "columns"}
HEAD = """# Ladders of published sizes

Written by `python docs/ext/ladders.py docs/ladders.md` with transformers {transformers} and torch {torch}, from the
configs of the checkpoints (`docs/ext/published_sizes.toml`, with the source of each). Do not edit it.

Each row is a step from a published checkpoint to the next larger one of its family, with the method `lossless`:
{counts} of {steps} steps in {families} families. Weights were not read: the verdict is that of `growlib plan`. Where a
step is not exact, the last column has the changes of the target that make it so; `growlib plan` offers them too.

| family | from | to | verdict | why not | nearest exact target |
|---|---|---|---|---|---|
"""


def configs(ladder: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """The configs of a ladder by the names of its rows."""
    rows = {name: row for name, row in ladder.items() if name not in OF_A_LADDER}
    make, shared = CONFIG_MAPPING[ladder["type"]], ladder.get("all", {})
    return {name: make(**shared, **dict(zip(ladder["columns"], row, strict=True))) for name, row in rows.items()}


def step(source: PreTrainedConfig, target: PreTrainedConfig) -> tuple[str, str, str]:
    """Verdict, why not, and what the nearest exact target changes."""
    try:
        growth = growlib.plan(source, target)
    except GrowError as error:
        verdict, why = "refused", error.wrong
    else:
        if growth.exact:
            return "exact", "", ""
        verdict, why = "not exact", "; ".join(growth.reasons)
    found = nearest_exact(source, target, "lossless") or {}
    return verdict, why, ", ".join(f"`{name}={value}`" for name, value in found.items())


def rows(ladders: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The rows of the table."""
    for ladder in tqdm(ladders):
        found = configs(ladder)
        names = list(found)
        for small, large in pairwise(names):
            hub = [ladder["hub"].replace("*", name) for name in (small, large)]
            yield ladder["family"], *hub, *step(found[small], found[large])


def page(ladders: list[dict[str, Any]]) -> str:
    """The whole page."""
    found = list(rows(ladders))
    counted = Counter(row[3] for row in found)
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=version("torch"),
        counts=", ".join(f"{counted[verdict]} {verdict}" for verdict in ("exact", "not exact", "refused")),
        steps=len(found),
        families=len(ladders),
    )
    return head + "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in found)


def main(path: str) -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    Path(path).write_text(page(tomllib.loads(DATA.read_text(encoding="utf-8"))["ladder"]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
