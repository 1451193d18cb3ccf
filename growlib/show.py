"""How plans and architectures are printed: tables, and which share of a tensor comes from where, as a bar."""

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from growlib.layouts import GrownAxes, Layout, own_blocks
from growlib.maps import FILLINGS, AxisMap, LayerMap, Side, copy_numbers

# The signs, each outranked by those before it: a zero row stays zero whatever its columns are.
SHARED, NEXT, COPIED = "▓", "▚", "█"
SIGNS = [FILLINGS["zero"].sign, FILLINGS["free"].sign, FILLINGS["mean"].sign, NEXT, SHARED, COPIED]
WIDTH, NARROW = 100, 16  # columns of a table, and those that each of its columns may keep
LEGEND = "█ copied   ▓ shared among copies   ▚ of the next layer   ▒ mean   ░ new   · zero"


def axis_shares(axis_map: AxisMap, side: Side, following: bool = False, own: bool = False) -> np.ndarray:
    """The share of an axis at each of SIGNS: float [6]. `following`: the tensor has a twin in the next layer;
    `own`: each copy is read by one of its own."""
    several = axis_map.copies()[axis_map.source.clip(0)] > 1
    rank = np.where(several & (side == "read") & (not own), SIGNS.index(SHARED), SIGNS.index(COPIED))
    rank = np.where(axis_map.source < 0, SIGNS.index(FILLINGS[axis_map.fill(side)].sign), rank)
    if side == "write" and axis_map.from_next and following:
        rank = np.where(copy_numbers(axis_map.source) > 0, SIGNS.index(NEXT), rank)
    return np.bincount(rank, minlength=len(SIGNS)) / len(rank)


def shares_of(layout: Layout, growth: GrownAxes, following: bool) -> np.ndarray:
    """The share of a tensor at each of SIGNS: float [6]."""
    shares = np.zeros(len(SIGNS))
    lengths = [[np.prod([growth.new_sizes.get(a, 1) for a in part]) for part in dim.parts] for dim in layout]
    for part in range(max((len(dim.parts) for dim in layout), default=1)):
        # Axes are independent, so the share of entries at least at a rank is a product over the axes.
        at_least, weight = np.ones(len(SIGNS)), 1.0
        axes = [(axis, dim.side) for dim in layout for axis in dim.parts[part if len(dim.parts) > 1 else 0]]
        blocks = [copies for _, _, copies in own_blocks(axes, growth.maps)]
        for dim, length in zip(layout, lengths, strict=True):
            chosen = part if len(dim.parts) > 1 else 0
            weight *= length[chosen] / sum(length)
            for axis in dim.parts[chosen]:
                if axis in growth.maps:
                    at = axis_shares(growth.maps[axis], dim.side, following, bool(blocks))
                    at_least *= np.cumsum(at[::-1])[::-1]
        at_least[1:] /= np.prod(blocks)  # off the diagonal of blocks there is nothing
        shares += weight * (at_least - np.append(at_least[1:], 0.0))
    return shares


def bar(shares: np.ndarray, length: int) -> str:
    """Shares as so many characters, the copied first; a share that is not zero shows."""
    counts = np.where(shares > 0, np.maximum(1, np.floor(shares * length)), 0).astype(int)
    counts[np.argmax(counts)] += length - counts.sum()
    return "".join(sign * count for sign, count in reversed(list(zip(SIGNS, counts, strict=True))))


def layer_names(stack: LayerMap) -> list[str]:
    """The source of each layer, with a star where the new layer starts as the identity."""
    share = stack.share or (0.0,) * len(stack.source)
    return [f"{s + p:.3g}{'*' if i else ''}" for s, p, i in zip(stack.source, share, stack.identity, strict=True)]


def split_layer(name: str) -> tuple[str, str]:
    """A tensor's name with `*` for the layer's number, and that number. `.weight` goes without saying."""
    words = name.removesuffix(".weight").split(".")
    layer = next((word for word in words if word.isdigit()), "")
    return ".".join("*" if layer and word == layer else word for word in words), layer


def layer_ranges(layers: list[str]) -> str:
    """Layer numbers in few words."""
    return ",".join(layers) if len(layers) < 4 else f"{layers[0]}..{layers[-1]} ({len(layers)})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns; what is too long for its column goes on below."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths) > NARROW:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)
