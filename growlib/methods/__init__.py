"""The growth methods: one file each, and one row here."""

from collections.abc import Callable
from dataclasses import dataclass

from growlib.axes import AxisMap, LayerMap
from growlib.errors import GrowError
from growlib.families.schema import Axis, Sizes
from growlib.methods import ligo, lossless, stack

Width = Callable[[str, Axis, Sizes, Sizes], AxisMap]
Depth = Callable[[int, int], LayerMap]


@dataclass(frozen=True)
class Method:
    """Where the maps of a growth come from. Any width goes with any depth."""

    name: str
    width: Width | None
    depth: Depth | None
    exact: str
    source: str
    learned: bool = False  # on text, by `growlib.learn`; width and depth are where its map starts


_ROWS = (
    Method(
        "lossless",
        lossless.width,
        lossless.depth,
        "wherever the architecture allows it",
        "growlib; LEMON (arXiv 2310.07999); LLaMA-Pro (arXiv 2401.02415)",
    ),
    Method("ligo", ligo.width, ligo.depth, "never", "LiGO (ICLR 2023, arXiv 2303.00980)", learned=True),
    Method("stack", None, stack.depth, "never", "StackBERT (ICML 2019); G_stack (arXiv 2405.15319)"),
)


def methods() -> list[Method]:
    """The rows of the method table: name, width, depth, exact, source."""
    return list(_ROWS)


def method(name: str | Method) -> Method:
    """Look a method up. `"width+depth"` takes the width of the one and the depth of the other."""
    if isinstance(name, Method):
        return name
    rows = {row.name: row for row in _ROWS}
    names = name.split("+")
    widths = [row.name for row in _ROWS if row.width]
    depths = [row.name for row in _ROWS if row.depth]
    valid = f"one of {', '.join(rows)}, or WIDTH+DEPTH of {', '.join(widths)} and {', '.join(depths)}"
    unknown = [part for part in names if part not in rows]
    if unknown or len(names) > 2:
        raise GrowError(f"method {name!r}", f"there is no method {', '.join(unknown) or name!r}", valid)
    if len(names) == 1:
        return rows[name]
    first, second = rows[names[0]], rows[names[1]]
    if first.width is None or second.depth is None:
        lacking = f"{first.name} has no width" if first.width is None else f"{second.name} has no depth"
        raise GrowError(f"method {name!r}", lacking, valid)
    exact = " and ".join(dict.fromkeys(f"{row.name}: {row.exact}" for row in (first, second)))
    return Method(name, first.width, second.depth, exact, f"{first.source}; {second.source}", first.learned)
