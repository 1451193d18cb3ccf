"""What a family table says, read into frozen objects. Unknown keys are errors: a typo is never a default."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from growlib.errors import GrowError

Side = Literal["read", "write", "scale", "shift"]
Sizes = Mapping[str, int]

# What an axis passes through decides which maps are exact; methods hold one rule for each of these.
MEETS = (
    "lookup",  # indexed by ids or positions
    "linear",  # nothing but linear maps
    "elementwise",  # an elementwise nonlinearity, or a product of two grown together
    "rms_norm",  # the residual stream of a pre-norm model
    "layer_norm",  # the same with LayerNorm
    "post_layer_norm",  # the residual stream of a post-norm model
    "query_heads",
    "key_heads",  # KV heads, each shared by a group of query heads
    "query",  # head_dim of queries and keys: they meet in a dot product
    "key",
    "rotary_query",  # the same under rotary embedding, counted in pairs
    "rotary_key",
)


@dataclass(frozen=True)
class Axis:
    """A named axis. `size` is a config field, `a * b`, `a / b`, or alternatives joined by ` or `."""

    size: str
    meets: str = ""  # empty: a constant of the layout, which never grows
    groups: str = ""  # query heads: the axis of the KV heads that they share
    scaled_by: str = ""  # query: the config flag that turns the 1/sqrt(head_dim) of the scores on; empty: always


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: a concatenation of parts, each a product of axes."""

    parts: tuple[tuple[str, ...], ...]
    side: Side


Layout = tuple[Dim, ...]


@dataclass(frozen=True)
class Condition:
    """Growth of an axis (or of `layers`) is exact only where a config field has one of these values."""

    grows: str
    field: str
    why: str
    allow: tuple[Any, ...] | None = None
    at_most: float | None = None

    def value(self, config: Any) -> Any:
        for part in self.field.split("."):
            config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
        return config

    def holds(self, config: Any) -> bool:
        value = self.value(config)
        if self.at_most is not None:
            return value is not None and value <= self.at_most
        return self.allow is None or value in self.allow


@dataclass(frozen=True)
class Family:
    """The table of one architecture. Tensor names are the base model's; `*` stands for the layer's number."""

    model_type: str
    layers: str
    block: str
    block_writers: tuple[str, ...]  # zeroed, they make a block the identity
    axes: Mapping[str, Axis]
    tensors: Mapping[str, Layout]
    ties: Mapping[str, str]
    head_norm: str
    block_first_norm: str = ""  # post-norm blocks only
    block_last_norm: str = ""
    free_fields: frozenset[str] = frozenset()
    follows: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def sizes(self, config: Any) -> dict[str, int]:
        """The size of each axis under a config. Raises ValueError where it is not a whole number."""
        sizes: dict[str, int] = {}
        for name, axis in self.axes.items():
            value = next(v for v in (_evaluate(e, config) for e in axis.size.split(" or ")) if v is not None)
            if value != int(value) or value < 1:
                raise ValueError(f"the size of axis {name} ({axis.size}) is {value:g}, not a whole number")
            sizes[name] = int(value)
        for name, axis in self.axes.items():
            if axis.groups and sizes[name] % sizes[axis.groups]:
                asked, group = axis.size, self.axes[axis.groups].size
                raise ValueError(f"{asked}={sizes[name]} is not a multiple of {group}={sizes[axis.groups]}")
        return sizes

    def size_fields(self) -> frozenset[str]:
        """The config fields that say a size."""
        words = {word for axis in self.axes.values() for word in re.findall(r"[a-z_]+", axis.size)}
        return frozenset(words - {"or"} | {self.layers})

    def template(self, name: str) -> tuple[str, int | None]:
        """A base-model tensor name as its table row, and its layer: `h.3.ln_1.bias` -> `h.*.ln_1.bias`, 3."""
        match = re.match(re.escape(self.block).replace(r"\*", r"(\d+)"), name)
        if not match:
            return name, None
        return self.block + name[match.end() :], int(match.group(1))


def _evaluate(expression: str, config: Any) -> float | None:
    left, operator, right = ([*expression.split(), "", ""])[:3]
    a = float(left) if left.isdigit() else getattr(config, left)
    if a is None or not operator:
        return a
    b = float(right) if right.isdigit() else getattr(config, right)
    return a * b if operator == "*" else a / b


def parse_layout(text: str) -> Layout:
    """Read a row such as `(heads value) -> hidden`, `vocab <- hidden` or `scale hidden`.

    The arrow runs from the dimensions that the tensor reads to those that it writes; the dimensions stand in
    memory order. Parentheses hold one dimension: a product of axes as in einops, `+` a concatenation.
    """
    if match := re.fullmatch(r"(scale|shift) (\w+)", text):
        return (Dim(((match.group(2),),), "scale" if match.group(1) == "scale" else "shift"),)
    left, arrow, right = re.split(r"(->|<-)", text)
    sides: tuple[Side, Side] = ("read", "write") if arrow == "->" else ("write", "read")
    dims = []
    for words, side in zip((left, right), sides, strict=True):
        for group, single in re.findall(r"\(([^)]*)\)|(\w+)", words):
            parts = tuple(tuple(part.split()) for part in (group or single).split("+"))
            dims.append(Dim(parts, side))
    return tuple(dims)


def read_family(path: Path) -> Family:
    """Read one table. The file's name is the model type."""
    table = tomllib.loads(path.read_text())
    rows = table.pop("config", {})
    try:
        family = Family(
            model_type=path.stem,
            axes={name: Axis(**facts) for name, facts in table.pop("axes").items()},
            tensors={name: parse_layout(text) for name, text in table.pop("tensors").items()},
            ties=table.pop("ties", {}),
            block_writers=tuple(table.pop("block_writers")),
            conditions=tuple(_condition(row) for row in table.pop("conditions", [])),
            free_fields=frozenset(rows.pop("free", [])),
            follows=rows.pop("follows", {}),
            **table,
            **rows,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GrowError(f"reading the family table {path.name}", str(error), "the keys of schema.Family") from error
    for name, axis in family.axes.items():
        if axis.meets and axis.meets not in MEETS:
            raise GrowError(f"reading {path.name}", f"axis {name} meets {axis.meets!r}", ", ".join(MEETS))
    return family


def _condition(row: dict[str, Any]) -> Condition:
    allow = row.pop("allow", None)
    return Condition(allow=None if allow is None else tuple(allow), **row)
