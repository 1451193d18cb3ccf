"""What a family table says, read into frozen objects. Unknown keys are errors: a typo is never a default."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
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
    "unscaled",  # the same stream where no norm weight stands between: raw, or after a norm without one
    "post_layer_norm",  # the residual stream of a post-norm model
    "query_heads",
    "key_heads",  # KV heads, each shared by a group of query heads
    "normed_query_heads",  # the same with one RMSNorm over all heads
    "normed_key_heads",
    "query",  # head_dim of queries and keys: they meet in a dot product
    "key",
    "rotary_query",  # the same under rotary embedding, counted in pairs
    "rotary_key",
    "normed_rotary_query",  # the same with an RMSNorm before the rotation
    "normed_rotary_key",
    "layers",  # something of each layer, side by side
    "experts",  # weighted by a router whose weights are shares of a whole
    "gated_experts",  # the same with weights that do not depend on one another, such as a sigmoid's
)


@dataclass(frozen=True)
class Axis:
    """A named axis. `size` is a config field, `a * b`, `a / b`, or alternatives joined by ` or `."""

    size: str
    meets: str = ""  # empty: a constant of the layout, which never grows
    groups: str = ""  # query heads: the axis of the KV heads that they share
    scaled_by: str = ""  # query: the config flag that turns the 1/sqrt(head_dim) of the scores on; empty: always;
    # "never" where the scores have a scale of their own
    per_token: str = ""  # experts: the axis of how many of them act on a token


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: a concatenation of parts, each a product of axes."""

    parts: tuple[tuple[str, ...], ...]
    side: Side
    by: str = ""  # the parts lie interleaved: first the share of this axis's first entry in each part, and so on
    offset: float = 0.0  # scale: the weight w acts as offset + w


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
class Stack:
    """Equal blocks, one after the other."""

    layers: str  # the config field that says how many
    block: str  # `*` stands for the layer's number
    writers: tuple[str, ...]  # modules or parameters that, zeroed, make a block the identity
    inner_norms: tuple[str, ...] = ()  # post-norm blocks only: the norms before the last one
    last_norm: str = ""

    def row_of(self, name: str, layer: int) -> str:
        """The table row of a tensor in one of the blocks."""
        return self.block + name[len(self.block) - 1 + len(str(layer)) :]

    def layer_of(self, name: str) -> int | None:
        match = re.match(re.escape(self.block).replace(r"\*", r"(\d+)"), name)
        return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Family:
    """The table of one architecture. Tensor names are the base model's; `*` stands for the layer's number."""

    model_type: str
    stacks: tuple[Stack, ...]
    axes: Mapping[str, Axis]
    tensors: Mapping[str, Layout]
    ties: Mapping[str, str]
    head_norm: str
    embedding_power: float = 0.0  # the class multiplies embeddings by hidden ** this
    head_power: float = 0.0  # and what its head reads by hidden ** this
    free_fields: frozenset[str] = frozenset()
    proven: Mapping[str, str] | None = None  # growth -> "" or why it is not exact; None: a table that tests hold
    candidates: Sequence[Sequence[str]] = ()  # of an inferred table: what was tried, and "" or why it was dropped
    follows: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def sizes(self, config: Any) -> dict[str, int]:
        """The size of each axis under a config. Raises ValueError where it is not a whole number."""
        sizes: dict[str, int] = {}
        for name, axis in self.axes.items():
            value = size_of(axis.size, config)
            if value is None or value != int(value) or value < 1:
                raise ValueError(f"the size of axis {name} ({axis.size}) is {value}, not a whole number")
            sizes[name] = int(value)
        for name, axis in self.axes.items():
            if axis.groups and sizes[name] % sizes[axis.groups]:
                asked, group = axis.size, self.axes[axis.groups].size
                raise ValueError(f"{asked}={sizes[name]} is not a multiple of {group}={sizes[axis.groups]}")
        return sizes

    def size_fields(self) -> frozenset[str]:
        """The config fields that say a size."""
        words = {word for axis in self.axes.values() for word in re.findall(r"[a-z_]\w*", axis.size)}
        return frozenset(words - {"or"} | {stack.layers for stack in self.stacks} | self.follows.keys())

    def layer_counts(self, config: Any) -> dict[str, int]:
        """The number of layers of each stack, by the field that says it."""
        return {stack.layers: getattr(config, stack.layers) for stack in self.stacks}

    def template(self, name: str) -> tuple[str, Stack | None, int]:
        """A base-model tensor name as its table row, its stack and layer: `h.3.ln_1.bias` -> `h.*.ln_1.bias`, .., 3."""
        for stack in self.stacks:
            layer = stack.layer_of(name)
            if layer is not None:
                return stack.row_of(name, layer), stack, layer
        return name, None, 0


def growth_name(axis: str, old: int, new: int) -> str:
    """The name of an axis's growth in `Family.proven`: by a whole multiple, or at another ratio."""
    return f"{axis} x2" if new % old == 0 else f"{axis} x1.5"


def size_of(expression: str, config: Any) -> float | None:
    """The value of an axis's size under a config; None where a field that it needs is not set."""
    return next((v for v in (_evaluate(e, config) for e in expression.split(" or ")) if v is not None), None)


def _evaluate(expression: str, config: Any) -> float | None:
    """`field`, or a chain such as `head_dim * rotary_pct / 2`, from left to right."""
    if " - " in expression:  # the one sum of products that tables need: what is left of a head
        whole, part = (_evaluate(side, config) for side in expression.split(" - "))
        return None if whole is None or part is None else whole - part
    first, *rest = expression.split()
    value = _operand(first, config)
    for operator, word in zip(rest[::2], rest[1::2], strict=True):
        other = _operand(word, config)
        if value is None or other is None:
            return None
        value = {"*": value * other, "/": value / other if other else None, "+": value + other}[operator]
    return value


def _operand(word: str, config: Any) -> float | None:
    if word.isdigit():
        return float(word)
    for part in word.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def parse_layout(text: str) -> Layout:
    """Read a row such as `(heads value) -> hidden`, `vocab <- hidden` or `scale hidden`.

    Arrows run from the dimensions that the tensor reads to those that it writes (`experts -> hidden <- ffn`); the
    dimensions stand in memory order. Parentheses hold one dimension: a product of axes as in einops, `+` a
    concatenation, `by` an interleaved one. `1 + scale` is a norm's weight w that acts as 1 + w.
    """
    if match := re.fullmatch(r"(1 \+ )?(scale|shift) ([\w ]+)", text):
        kind: Side = "scale" if match.group(2) == "scale" else "shift"
        return (Dim((tuple(match.group(3).split()),), kind, offset=1.0 if match.group(1) else 0.0),)
    *words_and_arrows, last = re.split(r"(->|<-)", text)
    if not words_and_arrows:
        raise ValueError(f"there is no arrow in {text!r}")
    dims, before = [], ""
    for words, after in zip([*words_and_arrows[::2], last], [*words_and_arrows[1::2], ""], strict=True):
        side: Side = "write" if before == "->" or after == "<-" else "read"
        before = after
        for group, single in re.findall(r"\(([^)]*)\)|(\w+)", words):
            product, _, by = (group or single).partition(" by ")
            parts = tuple(tuple(part.split()) for part in product.split("+"))
            dims.append(Dim(parts, side, by))
    return tuple(dims)


def layout_text(layout: Layout) -> str:
    """The inverse of `parse_layout`; a single number has the layout `->`."""
    if layout and layout[0].side in ("scale", "shift"):
        return ("1 + " if layout[0].offset else "") + f"{layout[0].side} {' '.join(layout[0].parts[0])}"
    if not layout:
        return "->"
    groups = []
    for side, dims in groupby(layout, lambda dim: dim.side):
        texts = [" + ".join(" ".join(part) for part in d.parts) + (f" by {d.by}" if d.by else "") for d in dims]
        groups.append((side, " ".join(f"({text})" if " " in text else text for text in texts)))
    if len(groups) < 2:
        groups.append(("write", ""))
    arrows = ["->" if side == "read" else "<-" for side, _ in groups[:-1]]
    return " ".join(
        word for pair in zip((text for _, text in groups), [*arrows, ""], strict=True) for word in pair if word
    )


def read_family(path: Path) -> Family:
    """Read one table. The file's name is the model type."""
    return from_table(path.stem, tomllib.loads(path.read_text()), path.name)


def from_table(model_type: str, table: dict[str, Any], where: str) -> Family:
    """A table as plain data, as a Family. Raises GrowError for a key or a word that means nothing."""
    rows = table.pop("config", {})
    try:
        family = Family(
            model_type=model_type,
            axes={name: Axis(**facts) for name, facts in table.pop("axes").items()},
            tensors={name: parse_layout(text) for name, text in table.pop("tensors").items()},
            ties=table.pop("ties", {}),
            stacks=tuple(_stack(**row) for row in table.pop("stacks")),
            conditions=tuple(_condition(row) for row in table.pop("conditions", [])),
            free_fields=frozenset(rows.pop("free", [])),
            follows=rows.pop("follows", {}),
            candidates=tuple(tuple(pair) for pair in table.pop("candidates", [])),
            **table,
            **rows,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GrowError(f"reading the family table {where}", str(error), "the keys of schema.Family") from error
    for name, axis in family.axes.items():
        if axis.meets and axis.meets not in MEETS:
            raise GrowError(f"reading {where}", f"axis {name} meets {axis.meets!r}", ", ".join(MEETS))
    return family


def to_table(family: Family) -> dict[str, Any]:
    """The inverse of `from_table`."""
    return {
        "head_norm": family.head_norm,
        "embedding_power": family.embedding_power,
        "head_power": family.head_power,
        "stacks": [asdict(stack) for stack in family.stacks],
        "axes": {name: asdict(axis) for name, axis in family.axes.items()},
        "tensors": {row: layout_text(layout) for row, layout in family.tensors.items()},
        "ties": dict(family.ties),
        "config": {"free": sorted(family.free_fields), "follows": dict(family.follows)},
        "conditions": [asdict(condition) for condition in family.conditions],
        "proven": family.proven and dict(family.proven),
        "candidates": [list(candidate) for candidate in family.candidates],
    }


def _stack(
    layers: str, block: str, writers: Sequence[str], inner_norms: Sequence[str] = (), last_norm: str = ""
) -> Stack:
    return Stack(layers, block, tuple(writers), tuple(inner_norms), last_norm)


def _condition(row: dict[str, Any]) -> Condition:
    allow = row.pop("allow", None)
    return Condition(allow=None if allow is None else tuple(allow), **row)
