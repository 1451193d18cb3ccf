"""The growth methods: one file each, and one row here.

A width gives the map of one axis, a depth the map of one stack. Where a method has settings they are keyword arguments
of these functions: `Method(width=functools.partial(hypercloning.width, snr_db=20.0), depth=stack.depth)`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from growlib.architectures.schema import Axis, Sizes
from growlib.errors import GrowError
from growlib.maps import AxisMap, LayerMap
from growlib.operators import (
    bert2bert,
    bert2bert_aki,
    bert2bert_fpi,
    composable,
    copies,
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
from growlib.own import imported
from growlib.papers import BERT2BERT, LEMON, LIGO, LLAMA_PRO, Paper

Width = Callable[[str, Axis, Sizes, Sizes, int], AxisMap]  # axis name, axis, old sizes, new sizes, seed
Depth = Callable[[int, int], LayerMap]  # old layers, new layers


@dataclass(frozen=True)
class Method:
    """Where the maps of a growth come from. Any width goes with any depth.

    `exact` begins with "always", "under a condition" or "never". What holds for a growth is in its plan's `.exact`.
    """

    name: str = "custom"
    width: Width | None = None
    depth: Depth | None = None
    exact: str = "under a condition: see the plan"
    source: str = ""  # where it is published, in a few words; empty: its papers
    papers: tuple[Paper, ...] = ()
    reset: float = 0.0  # of a dense model that becomes a mixture: the share of each expert's units that starts anew
    learned: bool = False  # on text, by `growlib.learn`; width and depth are where its map starts

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.source or "; ".join(map(str, self.papers)) or "no paper")


WHEREVER = "under a condition: wherever the architecture allows it"
WHOLE_HIDDEN = "under a condition: whole multiples of the hidden size"
WHOLE = "always, at whole multiples; others are refused"
_BUILT_IN = (
    Method("lossless", lossless.width, lossless.depth, WHEREVER, papers=(composable.PAPER, LLAMA_PRO)),
    Method("copies", copies.width, copies.depth, WHEREVER, papers=(LEMON, LLAMA_PRO)),
    Method("net2net", net2net.width, net2net.depth, WHEREVER, papers=(net2net.PAPER,)),
    Method("bert2bert-fpi", bert2bert_fpi.width, None, WHOLE_HIDDEN, papers=(BERT2BERT,)),
    Method("bert2bert-aki", bert2bert_aki.width, None, "never", papers=(BERT2BERT,)),
    Method("bert2bert", bert2bert.width, bert2bert.depth, "never", papers=(BERT2BERT,)),
    Method("lemon", lemon.width, lemon.depth, WHEREVER, papers=(LEMON,)),
    Method("hypercloning", hypercloning.width, None, WHOLE, papers=(hypercloning.PAPER,)),
    Method(
        "composable",
        composable.width,
        composable.depth,
        "under a condition: no LayerNorm after the residual sum",
        papers=(composable.PAPER,),
    ),
    Method("staged", staged.width, staged.depth, WHOLE, papers=(staged.PAPER,)),
    Method("sparkling", sparkling.width, None, "under a condition: whole multiples", papers=(sparkling.PAPER,)),
    Method("random", random.width, None, "never"),
    Method("stack", None, stack.depth, "never", papers=(stack.PAPER,)),
    Method("gstack", None, gstack.depth, "never", papers=(gstack.PAPER,)),
    Method("interleave", None, interleave.depth, "never", papers=(interleave.PAPER,)),
    Method("llama-pro", None, llama_pro.depth, WHEREVER, papers=(LLAMA_PRO,)),
    Method("solar", None, solar.depth, "never", papers=(solar.PAPER,)),
    Method("midas", None, midas.depth, "never", papers=(midas.PAPER,)),
    Method("gopher", None, gopher.depth, "never", papers=(gopher.PAPER,)),
    Method("interpolate", None, interpolate.depth, "never", papers=(LIGO,)),
    Method(
        "drop-upcycling",
        lossless.width,
        lossless.depth,
        "never",
        papers=(drop_upcycling.PAPER,),
        reset=drop_upcycling.RATIO,
    ),
    Method("ligo", ligo.width, ligo.depth, "never", papers=(LIGO,), learned=True),
)
_table = {row.name: row for row in _BUILT_IN}  # with those that `register` was given


def methods() -> list[Method]:
    """The rows of the method table: name, width, depth, exact, source."""
    return list(_table.values())


def register(method: Method) -> Method:
    """Add a method of your own to the table: its name works in `expand`, `plan`, `WIDTH+DEPTH` and on the command line.

    Returns:
        The method.

    Raises:
        GrowError: the name is taken by another method or is no word, or it has neither width nor depth.
    """
    asked = f"registering the method {getattr(method, 'name', method)!r}"
    if not isinstance(method, Method):
        raise GrowError(asked, f"it is a {type(method).__name__}", "a growlib.Method(name, width=..., depth=...)")
    if not re.fullmatch(r"[\w.-]+", method.name):
        raise GrowError(asked, "the name is no word", "letters, digits, -, _ and . alone")
    if _table.get(method.name, method) != method:
        raise GrowError(asked, "another method has this name", "a name that is not in growlib.methods()")
    if not (callable(method.width) or callable(method.depth)):
        raise GrowError(asked, "it has neither a width nor a depth", "a function for one of them, or for both")
    _table[method.name] = method
    return method


def method(name: str | Method) -> Method:
    """Look a method up: its name, `module:attribute` of a Method of your own, or WIDTH+DEPTH of two of these.

    `WIDTH+DEPTH` takes the width of the one and the depth of the other.
    """
    if isinstance(name, Method):
        return name
    parts = [_one(name, part) for part in name.split("+")]
    if len(parts) > 2:
        raise GrowError(f"method {name!r}", "it has more than two parts", _valid())
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    if first.width is None or second.depth is None:
        lacking = f"{first.name} has no width" if first.width is None else f"{second.name} has no depth"
        raise GrowError(f"method {name!r}", lacking, _valid())
    exact = " and ".join(dict.fromkeys(f"{row.name}: {row.exact}" for row in (first, second)))
    papers = tuple(dict.fromkeys(first.papers + second.papers))
    return Method(name, first.width, second.depth, exact, papers=papers, learned=first.learned)


def _one(asked: str, name: str) -> Method:
    if ":" in name:
        return _of_the_user(asked, name)
    if name not in _table:
        close = difflib.get_close_matches(name, _table, n=1)
        wrong = f"there is no method {name!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
        raise GrowError(f"method {asked!r}", wrong, _valid())
    return _table[name]


def _of_the_user(asked: str, name: str) -> Method:
    """A Method of the user's own, from a module that Python finds, the working directory included."""
    valid = "module:attribute, where `python -c 'import module'` works and attribute is a growlib.Method"
    own = imported(f"method {asked!r}", name, valid)
    if not isinstance(own, Method):
        raise GrowError(f"method {asked!r}", f"{name} is a {type(own).__name__}", "a growlib.Method")
    return own


def _valid() -> str:
    widths = ", ".join(row.name for row in methods() if row.width)
    depths = ", ".join(row.name for row in methods() if row.depth)
    return f"one of {', '.join(_table)}, or WIDTH+DEPTH of {widths} and {depths}"
