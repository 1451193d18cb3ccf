"""From what the rows of linear maps move to the layout of their dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from growlib.inference.probe import Row


class Unresolved(Exception):
    """The rows follow no pattern that a layout can say."""


@dataclass
class Reading:
    """The input dimension of one linear map, and the output dimensions of those that write it."""

    reader: tuple[str, ...]  # the axes of its input
    sizes: dict[str, int]
    writers: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = field(default_factory=dict)  # parts, by


def read_rows(writers: dict[str, list[Row]], width: int) -> Reading:
    """What the input channels [width] of a linear map are, from the rows that move them."""
    moved = [row for rows in writers.values() for row in rows]
    if max(int(row.channels.sum()) for row in moved) == 1:  # elsewhere too: behind a scan, which takes units one by one
        return _units(writers, width)
    if any(row.elsewhere for row in moved):
        return _attention(writers, width)
    raise Unresolved


def _units(writers: dict[str, list[Row]], width: int) -> Reading:
    reading = Reading(("ffn",), {"ffn": width})
    for name, rows in writers.items():
        times, rest = divmod(len(rows), width)
        patterns = {"": [i % width for i in range(len(rows))], "ffn": [i // max(times, 1) for i in range(len(rows))]}
        by = next((by for by, pattern in patterns.items() if not rest and _all_move(rows, pattern)), None)
        if by is None:
            raise Unresolved
        reading.writers[name] = ((("ffn",),) * times, by)
    return reading


def _all_move(rows: list[Row], pattern: list[int]) -> bool:
    """Row i moves channel pattern[i]. A unit that a ReLU holds at zero moves nothing, which is no objection."""
    return all(bool(row.channels[c]) or not row.channels.any() for row, c in zip(rows, pattern, strict=True))


AXES = {"query": ("heads", "query"), "key": ("kv_heads", "key"), "value": ("kv_heads", "value")}
AXES["gate"] = ("heads", "value")


def _attention(writers: dict[str, list[Row]], width: int) -> Reading:
    """Queries move whole heads here, keys whole heads elsewhere, values one channel of each head elsewhere."""
    queries = [row for rows in writers.values() for row in rows if not row.elsewhere and row.channels.any()]
    head_dim = max((int(row.channels.sum()) for row in queries), default=0)
    if head_dim < 2 or width % head_dim:
        raise Unresolved
    heads = width // head_dim
    kinds = {name: _filled([_kind(row, head_dim) for row in rows]) for name, rows in writers.items()}
    keys = {
        frozenset(_heads_of(row, head_dim))
        for name, rows in writers.items()
        for row, kind in zip(rows, kinds[name], strict=True)
        if kind in ("key", "value") and row.channels.any()
    }
    kv_heads = len(keys)
    if not kv_heads or heads % kv_heads:
        raise Unresolved
    counts = {"query": heads, "gate": heads, "key": kv_heads, "value": kv_heads}
    reading = Reading(("heads", "value"), {"heads": heads, "kv_heads": kv_heads, "value": head_dim})
    for name, rows in writers.items():
        order, by = _order(kinds[name], heads, kv_heads)
        for kind in order:
            own = [row for row, k in zip(rows, kinds[name], strict=True) if k == kind]
            size, rest = divmod(len(own), counts[kind])
            share = heads // counts[kind]
            if rest or any(h // share != i // size for i, row in enumerate(own) for h in _heads_of(row, head_dim)):
                raise Unresolved
            axis = AXES[kind][1]
            if reading.sizes.setdefault(axis, size) != size:
                raise Unresolved
        reading.writers[name] = (tuple(AXES[kind] for kind in order), by)
    return reading


def _heads_of(row: Row, head_dim: int) -> set[int]:
    return {int(c) // head_dim for c in row.channels.nonzero()}


def _kind(row: Row, head_dim: int) -> str | None:
    count = int(row.channels.sum())
    if not count:
        return None
    per_head = count / len(_heads_of(row, head_dim))
    if row.elsewhere:
        return "key" if per_head > 1 else "value"
    return "query" if per_head > 1 else "gate"


def _filled(kinds: list[str | None]) -> list[str]:
    """Rows that move nothing are of the kind of the row before them, or of the first that moves something."""
    last = next((kind for kind in kinds if kind), None)
    if last is None:
        raise Unresolved
    filled = []
    for kind in kinds:
        last = kind or last
        filled.append(last)
    return filled


def _order(kinds: Sequence[str], heads: int, kv_heads: int) -> tuple[tuple[str, ...], str]:
    """The order of the kinds, and the axis by which they are interleaved."""
    for count, by in ((1, ""), (kv_heads, "kv_heads"), (heads, "heads")):
        chunk = len(kinds) // count
        runs = tuple(kind for kind, _ in groupby(kinds[:chunk]))
        if len(set(runs)) == len(runs) and list(kinds) == list(kinds[:chunk]) * count:
            return runs, by
    raise Unresolved
