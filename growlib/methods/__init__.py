"""The growth methods: one file each, and one row here.

A width gives the map of one axis, a depth the map of one stack. Where a method has settings they are keyword arguments
of these functions: `Method(width=functools.partial(hypercloning.width, snr_db=20.0), depth=stack.depth)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from growlib.axes import AxisMap, LayerMap
from growlib.errors import GrowError
from growlib.families.schema import Axis, Sizes
from growlib.methods import (
    bert2bert,
    bert2bert_aki,
    bert2bert_fpi,
    composable,
    drop_upcycling,
    gopher,
    gstack,
    hypercloning,
    interleave,
    interpolate,
    lemon,
    ligo,
    llama_pro,
    lossless,
    midas,
    net2net,
    random,
    solar,
    sparkling,
    stack,
    staged,
)

if TYPE_CHECKING:
    from growlib.apply import Draw

Width = Callable[[str, Axis, Sizes, Sizes, int], AxisMap]  # axis name, axis, old sizes, new sizes, seed
Depth = Callable[[int, int], LayerMap]  # old layers, new layers
# (experts, units of each, draw) -> bool [experts, units]: which units of an expert start anew
Resets = Callable[[int, int, "Draw"], Tensor]


@dataclass(frozen=True)
class Method:
    """Where the maps of a growth come from. Any width goes with any depth.

    `exact` begins with "always", "under a condition" or "never". What holds for a growth is in its plan's `.exact`.
    """

    name: str = "custom"
    width: Width | None = None
    depth: Depth | None = None
    exact: str = "under a condition: see the plan"
    source: str = ""
    resets: Resets | None = None  # of a dense model that becomes a mixture of experts
    learned: bool = False  # on text, by `growlib.learn`; width and depth are where its map starts


WHEREVER = "under a condition: wherever the architecture allows it"
WHOLE_HIDDEN = "under a condition: whole multiples of the hidden size"
_ROWS = (
    Method(
        "lossless",
        lossless.width,
        lossless.depth,
        WHEREVER,
        "growlib; LEMON (arXiv 2310.07999); LLaMA-Pro (arXiv 2401.02415)",
    ),
    Method("net2net", net2net.width, net2net.depth, WHEREVER, "Net2Net (arXiv 1511.05641)"),
    Method("bert2bert-fpi", bert2bert_fpi.width, None, WHOLE_HIDDEN, "bert2BERT (arXiv 2110.07143)"),
    Method("bert2bert-aki", bert2bert_aki.width, None, "never", "bert2BERT (arXiv 2110.07143)"),
    Method("bert2bert", bert2bert.width, bert2bert.depth, "never", "bert2BERT (arXiv 2110.07143)"),
    Method("lemon", lemon.width, lemon.depth, WHEREVER, "LEMON (arXiv 2310.07999)"),
    Method(
        "hypercloning",
        hypercloning.width,
        None,
        "always, at whole multiples; others are refused",
        "HyperCloning (arXiv 2409.12903)",
    ),
    Method(
        "composable",
        composable.width,
        composable.depth,
        "under a condition: no LayerNorm after the residual sum",
        "Gesmundo & Maile (arXiv 2308.06103)",
    ),
    Method(
        "staged",
        staged.width,
        staged.depth,
        "always, at whole multiples; others are refused",
        "Staged Training (arXiv 2203.06211)",
    ),
    Method("sparkling", sparkling.width, None, "under a condition: whole multiples", "SPARKLING (arXiv 2602.02472)"),
    Method("random", random.width, None, "never", "the control"),
    Method("stack", None, stack.depth, "never", "StackBERT (ICML 2019)"),
    Method("gstack", None, gstack.depth, "never", "G_stack (arXiv 2405.15319)"),
    Method("interleave", None, interleave.depth, "never", "interposition (arXiv 2510.08008)"),
    Method("llama-pro", None, llama_pro.depth, WHEREVER, "LLaMA-Pro (arXiv 2401.02415)"),
    Method("solar", None, solar.depth, "never", "SOLAR 10.7B (arXiv 2312.15166)"),
    Method("midas", None, midas.depth, "never", "MIDAS (arXiv 2409.19044)"),
    Method("gopher", None, gopher.depth, "never", "Gopher (arXiv 2112.11446)"),
    Method("interpolate", None, interpolate.depth, "never", "LiGO (arXiv 2303.00980)"),
    Method(
        "drop-upcycling",
        lossless.width,
        lossless.depth,
        "never",
        "Drop-Upcycling (arXiv 2502.19261)",
        resets=drop_upcycling.resets,
    ),
    Method("ligo", ligo.width, ligo.depth, "never", "LiGO (arXiv 2303.00980)", learned=True),
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
    return Method(name, first.width, second.depth, exact, f"{first.source}; {second.source}", learned=first.learned)
