"""What cannot be: sizes that are none, and requests that no disk or memory holds. Refused before anything runs."""

import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from growlib.architectures.schema import Architecture
from growlib.errors import GrowError
from growlib.growth_plan import Skeleton
from growlib.parts import flat, known_name

MOST_BYTES = 10**15  # of a plan, in float32
LONGEST = 10**8  # entries of an axis
DEEPEST = 10**5  # layers of a stack
SIZE = re.compile(r"(size|dim|heads|layers?|experts|positions|embeddings|embd|embed|inner|d_model|d_ff)$")


def refuse_impossible(source: Skeleton, table: Architecture, target: PreTrainedConfig | Mapping[str, Any]) -> None:
    """Raise GrowError for sizes below 1, and for sizes that are out of reach with the bytes that they would take."""
    before = flat(source.config)
    after = flat(target) if isinstance(target, PreTrainedConfig) else target
    names = {name: known_name(source.config, name) for name in after}
    for name, known in names.items():
        old, new = before.get(known), after[name]
        if type(old) is not int or type(new) is not int or old < 1 or old == new or not SIZE.search(known):
            continue
        asked = f"growing {source.config.model_type} to {name}={new}"
        if new < 1:
            raise GrowError(asked, "that is no size", f"{name} of at least {old}, the source's")
        most = DEEPEST if known in table.layer_counts(source.config) else LONGEST
        least = 4 * new / old * sum(prod(shape) for shape in _tensors_with(source, table, known))
        if new > most or least > MOST_BYTES:
            wrong = f"in float32 it would take at least {least:.2g} bytes"
            raise GrowError(asked, wrong, f"a model of up to {MOST_BYTES:.0g} bytes, {name} up to {most:,}")


def _tensors_with(source: Skeleton, table: Architecture, field: str) -> list[tuple[int, ...]]:
    """The shapes of the tensors that get longer with a field."""
    axes = {name for name, axis in table.axes.items() if re.search(rf"\b{re.escape(field)}\b", axis.size)}
    found = []
    for name, shape in source.shapes.items():
        row, stack, _ = table.template(source.base(name))
        grown = any(axis in axes for dim in table.tensors.get(row, ()) for part in dim.parts for axis in part)
        if grown or (stack and stack.layers == field):
            found.append(shape)
    return found


def refuse_without_memory(asked: str, needed: int) -> None:
    """Raise GrowError where a model is larger than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        wrong = f"the result takes {needed / 1e9:.3g} GB, and this machine has {memory / 1e9:.3g} GB of memory"
        raise GrowError(asked, wrong, "a smaller target, a smaller dtype, or a machine with more memory")


def fits_into_memory(needed: int) -> bool:
    """Whether the memory that this machine has left holds so many bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return needed < left
