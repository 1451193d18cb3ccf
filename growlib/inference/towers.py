"""The tables of a model's parts as one: its text's, and those of the towers that grow too."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

from growlib.architectures.schema import Architecture, Axis, Growth, fields_in
from growlib.errors import GrowError
from growlib.inference.draft import FIXED
from growlib.layouts import Dim, Layout


def joined(text: Architecture, tables: Mapping[str, Architecture]) -> Architecture:
    """The text's table with that of each part. A dimension grows with the part whose table knows it.

    Raises GrowError where two tables claim one dimension.
    """
    return reduce(lambda table, part: _joined(table, part, _named(tables[part], part)), tables, text)


def _joined(text: Architecture, part: str, tower: Architecture) -> Architecture:
    rows: dict[str, Layout] = {}
    for row, layout in text.tensors.items():
        name = tower.template(row)[0]
        if "*" in row or name not in tower.tensors:  # of another part's layers
            rows[row] = layout
            continue
        pairs = zip(layout, tower.tensors[name], strict=True)
        made = tuple(known for pair in pairs if (known := _either(*pair)))
        if len(made) < len(layout) or rows.setdefault(name, made) != made:
            wrong = f"{row} may grow with {part} and with another part"
            raise GrowError(f"growing the {part} of {text.model_type}", wrong, "the growth of one part")
    return replace(
        text,
        stacks=(*text.stacks, *tower.stacks),
        axes={**text.axes, **tower.axes},
        tensors=rows,
        weighed={**text.weighed, **tower.weighed},
        powers={**text.powers, **tower.powers},
        follows={**tower.follows, **text.follows},
        proven={**(text.proven or {}), **(tower.proven or {})},
        candidates=(*text.candidates, *tower.candidates),
    )


def _either(mine: Dim, theirs: Dim) -> Dim | None:
    """The dimension of the table that knows what it is; None where both do."""
    if FIXED.parts not in (mine.parts, theirs.parts):
        return None
    return theirs if mine.parts == FIXED.parts else mine


def _named(table: Architecture, part: str) -> Architecture:
    """The table of a part, its axes named after it: `hidden` is `vision_hidden`."""
    names = {name: f"{part.removesuffix('_config').replace('.', '_')}_{name}" for name in table.axes}

    def dim(old: Dim) -> Dim:
        if not any(fields_in(table.axes[axis].size) for axes in old.parts for axis in axes if axis in table.axes):
            return replace(old, parts=FIXED.parts, by="")  # such as what is as wide as the text
        parts = tuple(tuple(names.get(axis, axis) for axis in axes) for axes in old.parts)
        return replace(old, parts=parts, by=names.get(old.by, old.by))

    def axis(old: Axis) -> Axis:
        return replace(old, groups=names.get(old.groups, old.groups), per_token=names.get(old.per_token, old.per_token))

    proven = {Growth(names.get(g.axis, g.axis), g.ratio): verdict for g, verdict in (table.proven or {}).items()}
    return replace(
        table,
        axes={names[name]: axis(old) for name, old in table.axes.items()},
        tensors={row: tuple(dim(old) for old in layout) for row, layout in table.tensors.items()},
        proven=proven,
        candidates=tuple((f"{part}: {told}", verdict) for told, verdict in table.candidates),
    )
