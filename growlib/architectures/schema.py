"""What the table of an architecture says, as frozen objects. Unknown keys are errors: a typo is never a default."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple

from growlib.errors import GrowError
from growlib.layouts import Layout, layout_text, parse_layout
from growlib.parts import value_of
from growlib.show import table

Sizes = Mapping[str, int]

# What an axis passes through decides which maps are exact; methods hold one rule for each of these.
ROLES = (
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
RESIDUAL = {"rms_norm", "layer_norm", "unscaled", "post_layer_norm"}  # the axes under a norm of the residual stream


@dataclass(frozen=True)
class Axis:
    """A named axis. `size` is a config field, `a * b`, `a / b`, or alternatives joined by ` or `."""

    size: str
    role: str = ""  # empty: a constant of the layout, which never grows
    groups: str = ""  # query heads: the axis of the KV heads that they share
    shared_by: str = ""  # KV heads: the axis of those query heads; set by Architecture
    scaled_by: str = ""  # query: the config flag that turns the 1/sqrt(head_dim) of the scores on; empty: always;
    # "never" where the scores have a scale of their own
    per_token: str = ""  # experts: the axis of how many of them act on a token
    only_copies: bool = False  # whole copies are exact, new entries beside them are not: a tiny model has shown it


class Growth(NamedTuple):
    """A kind of growth: of an axis, by a whole multiple or another ratio; or of a stack."""

    axis: str
    ratio: Literal["x2", "x1.5", "deeper"]

    def __str__(self) -> str:
        return f"{self.axis} {self.ratio}" if self.ratio in ("x2", "x1.5") else self.axis

    @classmethod
    def of(cls, axis: str, old: int, new: int) -> "Growth":
        """The growth of an axis between two sizes."""
        return cls(axis, "x2" if new % old == 0 else "x1.5")


class Verdict(NamedTuple):
    """Whether a tiny model grew exactly, inexactly, or not at all; and why not."""

    kind: Literal["exact", "inexact", "refused"]
    why: str = ""

    @property
    def exact(self) -> bool:
        return self.kind == "exact"


EXACT = Verdict("exact")


@dataclass(frozen=True)
class Condition:
    """Growth of an axis (or of `layers`) is exact only where a config field has one of these values."""

    grows: str
    field: str
    why: str
    allow: tuple[Any, ...] | None = None
    at_most: float | None = None

    def value(self, config: Any) -> Any:
        return value_of(config, self.field)

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
    inner_norms: tuple[str, ...] = ()  # norms and scales on the way through a block: the identity at (1, 0), or at 1
    last_norm: str = ""  # post-norm blocks only; "." where the block is a norm by itself
    numbered: bool = False  # what a layer does depends on its number: new layers stand behind all old ones
    branch_power: float = 0.0  # the class multiplies what a block adds to the stream by layers ** this

    def row_of(self, name: str, layer: int) -> str:
        """The table row of a tensor in one of the blocks."""
        return self.block + name[len(self.block) - 1 + len(str(layer)) :]

    def layer_of(self, name: str) -> int | None:
        match = re.match(re.escape(self.block).replace(r"\*", r"(\d+)"), name)
        return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture. Tensor names are the base model's; `*` stands for the layer's number."""

    model_type: str
    stacks: tuple[Stack, ...]
    axes: Mapping[str, Axis]
    tensors: Mapping[str, Layout]
    ties: Mapping[str, str]
    head_norm: str
    embedding_power: float = 0.0  # the class multiplies embeddings by hidden ** this
    head_power: float = 0.0  # and what its head reads by hidden ** this
    powers: Mapping[str, float] = field(default_factory=dict)  # {row: what it makes is multiplied by hidden ** this}
    free_fields: frozenset[str] = frozenset()
    proven: Mapping[Growth, Verdict] | None = None  # None: a table that tests hold
    candidates: tuple[tuple[str, Verdict], ...] = ()  # of an inferred table: what was tried
    follows: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    # {row that writes the stream: the row of weights that scale it first (LayerScale)}, for the mean of what is written
    weighed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sharing = {axis.groups: name for name, axis in self.axes.items() if axis.groups}
        shared = {name: replace(axis, shared_by=sharing.get(name, "")) for name, axis in self.axes.items()}
        object.__setattr__(self, "axes", shared)

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

    def __str__(self) -> str:
        tried = [(name, verdict.why or verdict.kind) for name, verdict in self.candidates]
        proven = [(str(growth), verdict.why or verdict.kind) for growth, verdict in (self.proven or {}).items()]
        parts = [
            f"{self.model_type}: {'found on a tiny model' if self.candidates else 'written by hand'}",
            table([("axis", "size", "role"), *((n, a.size, a.role or "never grows") for n, a in self.axes.items())]),
            table([("tensor", "layout"), *((row, layout_text(layout)) for row, layout in self.tensors.items())]),
            *(f"{s.layers} blocks {s.block}: the identity without {', '.join(s.writers)}" for s in self.stacks),
            *([table([("candidate", "verdict"), *tried])] if tried else []),
            *([table([("growth", "verdict"), *proven])] if proven else []),
        ]
        return "\n\n".join(parts)

    def size_fields(self) -> frozenset[str]:
        """The config fields that say a size."""
        named = {name for axis in self.axes.values() for name in fields_in(axis.size)}
        words = {word for name in named for word in (name, *_around(name))}
        return frozenset(words | {stack.layers for stack in self.stacks} | self.follows.keys())

    def layer_counts(self, config: Any) -> dict[str, int]:
        """The number of layers of each stack, by the field that says it."""
        return {stack.layers: value_of(config, stack.layers) for stack in self.stacks}

    def template(self, name: str) -> tuple[str, Stack | None, int]:
        """A base-model tensor name as its table row, its stack and layer: `h.3.ln_1.bias` -> `h.*.ln_1.bias`, .., 3."""
        for stack in self.stacks:
            layer = stack.layer_of(name)
            if layer is not None:
                return self._known(stack.row_of(name, layer)), stack, layer
        return self._known(name), None, 0

    def _known(self, row: str) -> str:
        """A row, or, where there is none of this name, that of another expert or layer.

        Of several it is the one with the most numbers in common: an adapter's `list.9.1.` is as `list.0.1.`.
        """
        if row in self.tensors:
            return row
        words = row.split(".")
        alike = self._alike.get(without_numbers(row), [row])
        return max(alike, key=lambda other: sum(map(eq, words, other.split("."))))

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        """The rows whose names differ in numbers alone: experts, and layers of a part that stays."""
        alike: dict[str, list[str]] = defaultdict(list)
        for row in self.tensors:
            alike[without_numbers(row)].append(row)
        return alike


def without_numbers(name: str) -> str:
    """A tensor's name without the numbers of layers and experts (`expert_2.`); the 1 of `fc1.` belongs to its name."""
    return re.sub(r"(?<=[._])\d+(?=\.)", "#", name)


def fields_in(expression: str) -> list[str]:
    """The config fields that an axis's size is made of."""
    return [name for name in re.findall(r"[a-z_][\w.]*", expression) if name != "or"]


def _around(name: str) -> list[str]:
    """For a field inside another one (`rope_parameters.rotary_dim`), both and what stands between."""
    words = name.split(".")
    return [*(".".join(words[:length]) for length in range(1, len(words))), *words[1:]]


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
    return value_of(config, word)


def read_table(path: Path) -> Architecture:
    """Read one table. The file's name is the model type. Raises GrowError where it is none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GrowError(f"reading the table {path.name}", str(error), "a TOML file") from error
    return from_table(path.stem, table, path.name)


def from_table(model_type: str, table: dict[str, Any], where: str) -> Architecture:
    """A table as plain data, as a Architecture. Raises GrowError for a key or a word that means nothing."""
    rows, proven = table.pop("config", {}), table.pop("proven", None)
    for name, facts in table.get("axes", {}).items():
        if facts.get("shared_by"):
            raise GrowError(f"{where}, axis {name}", "shared_by follows from groups", "groups, of the query heads")
    try:
        made = Architecture(
            model_type=model_type,
            axes={name: Axis(**facts) for name, facts in table.pop("axes").items()},
            tensors={name: parse_layout(text) for name, text in table.pop("tensors").items()},
            ties=table.pop("ties", {}),
            weighed=table.pop("weighed", {}),
            powers=table.pop("powers", {}),
            stacks=tuple(_stack(row) for row in table.pop("stacks")),
            conditions=tuple(_condition(row) for row in table.pop("conditions", [])),
            free_fields=frozenset(rows.pop("free", [])),
            follows=rows.pop("follows", {}),
            proven=proven if proven is None else {Growth(*growth): Verdict(*verdict) for growth, verdict in proven},
            candidates=tuple((name, Verdict(*verdict)) for name, verdict in table.pop("candidates", [])),
            **table,
            **rows,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GrowError(f"reading the table {where}", str(error), "the keys of schema.Architecture") from error
    for name, axis in made.axes.items():
        if axis.role and axis.role not in ROLES:
            raise GrowError(f"reading {where}", f"axis {name} has the role {axis.role!r}", ", ".join(ROLES))
    return made


def to_table(known: Architecture) -> dict[str, Any]:
    """The inverse of `from_table`."""
    return {
        "head_norm": known.head_norm,
        "embedding_power": known.embedding_power,
        "head_power": known.head_power,
        "stacks": [asdict(stack) for stack in known.stacks],
        "axes": {name: asdict(replace(axis, shared_by="")) for name, axis in known.axes.items()},
        "tensors": {row: layout_text(layout) for row, layout in known.tensors.items()},
        "ties": dict(known.ties),
        "weighed": dict(known.weighed),
        "powers": dict(known.powers),
        "config": {"free": sorted(known.free_fields), "follows": dict(known.follows)},
        "conditions": [asdict(condition) for condition in known.conditions],
        "proven": known.proven and [[list(growth), list(verdict)] for growth, verdict in known.proven.items()],
        "candidates": [[name, list(verdict)] for name, verdict in known.candidates],
    }


def _stack(row: dict[str, Any]) -> Stack:
    lists = {key: tuple(value) for key, value in row.items() if isinstance(value, list | tuple)}
    return Stack(**{**row, **lists})


def _condition(row: dict[str, Any]) -> Condition:
    allow = row.pop("allow", None)
    return Condition(allow=None if allow is None else tuple(allow), **row)
