"""How many tokens, and which ids, a model can read: found by watching what it looks up, not by the names of fields.

A table of positions is what is asked for one more row for each token more. Shapes: L tokens of a row.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from growlib.errors import GrowError
from growlib.ki.guard import Finding, Guard
from growlib.ki.sources import first_line

logger = logging.getLogger("growlib")
aten = torch.ops.aten
OF_TOKENS = ("input_ids", "decoder_input_ids")
IDS = (*OF_TOKENS, "token_type_ids")
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)
PROBES = {"input_ids": (1, 3), "decoder_input_ids": (1, 2)}  # lengths of the two probes
Limits = dict[str, int]


class Lookup(NamedTuple):
    """Rows of a table that a forward pass asked for."""

    rows: int  # of the table
    asked: int  # how many rows
    least: int
    most: int
    of: str | None  # the input that is itself the index; None: the index was computed


class _Beyond(Exception):
    """A row was asked for that the table does not have."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__(f"row {lookup.most if lookup.least >= 0 else lookup.least} of a table of {lookup.rows}")
        self.lookup = lookup


class _Watch(TorchDispatchMode):
    """Collects the lookups of whatever runs under it, and ends before one that is out of range."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.seen: list[Lookup] = []
        names = [name for name in (*IDS, "position_ids") if isinstance(inputs.get(name), Tensor)]
        self._names = {_place(inputs[name]): name for name in names}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _indices(func, args)
        if found is not None:
            rows, indices = found
            name = self._names.get(_place(indices))
            lookup = Lookup(rows, indices.numel(), int(indices.min()), int(indices.max()), name)
            if lookup.most >= rows or (lookup.least < 0 and func is not aten.index.Tensor):
                raise _Beyond(lookup)
            self.seen.append(lookup)
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> tuple[Any, int]:
    return tensor.device, tensor.data_ptr()


def _indices(func: Any, args: Any) -> tuple[int, Tensor] | None:
    """The number of a table's rows, and the indices, where an operation looks rows up."""
    table: Any = None
    indices: Any = None
    dim = 0
    if func is aten.embedding.default:
        table, indices = args[0], args[1]
    elif func is aten.index_select.default:
        (table, dim, indices) = args
    elif func is aten.gather.default:
        (table, dim, indices) = args[:3]
        indices = indices[..., :1]
    elif func is aten.index.Tensor and len(args[1]) == 1:
        table, indices = args[0], args[1][0]
    if isinstance(indices, DTensor):  # of a teacher that is split over processes: each asks for the same rows
        indices = indices.to_local()
    if indices is None or indices.dtype not in (torch.int64, torch.int32) or not indices.numel() or not table.ndim:
        return None
    return None if indices.device.type == "meta" else (table.shape[dim], indices)


@dataclass
class InputLimits:
    """What a teacher can read.

    Attributes:
        who: the teacher in an error.
        run: its forward pass.
        context: how many positions its config names; None: none. Only a warning comes of it.
        ids: an input -> how many rows the table has that it indexes.
        lengths: an input -> how many tokens there are positions for.
    """

    who: str
    run: Callable[..., Any]
    context: int | None = None
    ids: Limits = field(default_factory=dict)
    lengths: Limits = field(default_factory=dict)
    _longest: int = 0  # of the rows that were compared with the context

    @contextmanager
    def learning(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Learn them from the first forward pass, which runs while this lasts; GrowError where it does not end."""
        watch, failure = _Watch(inputs), None
        with refusing(self.who, inputs):
            try:
                with watch:
                    yield
            except (_Beyond, *FAILURES) as error:
                failure = error
            seen = [*watch.seen, *([failure.lookup] if isinstance(failure, _Beyond) else [])]
            self.ids = {lookup.of: lookup.rows for lookup in seen if lookup.of in IDS}
            if failure is not None or any(lookup.of not in IDS for lookup in seen):
                self.lengths = self._positions(inputs)
            if failure is not None:
                guard = Guard()
                self.check(inputs, guard)
                guard.check()
                raise failure

    def check(self, inputs: Mapping[str, Any], guard: Guard) -> dict[str, Any]:
        """The inputs, where the teacher can read them: raises GrowError for too long rows, guards the ids."""
        checked = dict(inputs)
        for name, most in list(self.lengths.items()):
            length = _length(inputs, name)
            if length <= most:
                continue
            places = inputs.get("position_ids") if name == "input_ids" else None
            if places is not None:
                wrong = f"it has {most} positions, and rows of {length} tokens have position_ids beyond them"
                finding = Finding(self.who, wrong, f"examples of up to {most} tokens, or a teacher with more positions")
                checked["position_ids"] = guard.within(places, most, finding)
            elif self._runs(inputs, {name: most + 1}) is None:
                wrong = f"it has {most} positions, and the rows of this batch have {length} tokens ({name})"
                raise GrowError(self.who, wrong, f"rows of up to {most} tokens, or a teacher with more positions")
            else:  # a table that grows
                del self.lengths[name]
        for name, rows in self.ids.items():
            if isinstance(inputs.get(name), Tensor):
                wrong = f"its table for {name} has {rows} rows, and the batch holds other ids"
                finding = Finding(self.who, wrong, f"ids from 0 to {rows - 1}, or a teacher that has these")
                checked[name] = guard.within(inputs[name], rows, finding)
        self._warn(inputs)
        return checked

    def _warn(self, inputs: Mapping[str, Any]) -> None:
        """Say once where rows are longer than what the teacher was made for."""
        length = _length(inputs, "input_ids")
        if self.context is None or self.lengths or length <= max(self.context, self._longest):
            return
        self._longest = length
        places = inputs.get("position_ids")
        length = length if places is None else int(places.max()) + 1
        if length > self.context:
            text = "%s was made for %d positions, and the rows of this batch have %d: what it says there may be poor."
            logger.warning(text, self.who, self.context, length)
            self.context = None

    def _positions(self, inputs: Mapping[str, Any]) -> Limits:
        """How many tokens there are positions for, from two runs on few tokens; empty where it does not run."""
        names = [name for name in OF_TOKENS if _length(inputs, name)]
        seen = [self._runs(inputs, {name: PROBES[name][number] for name in names}) for number in (0, 1)]
        limits: Limits = {}
        for one, other in zip(*(lookups or () for lookups in seen), strict=False):
            for name in names:
                short, long = PROBES[name]
                grows = other.most - one.most == long - short and (one.asked, other.asked) == (short, long)
                if grows and one.rows == other.rows and one.of is None:
                    most = one.rows - one.most - 1 + short
                    limits[name] = min(most, limits.get(name, most))
        return limits

    @torch.no_grad()
    def _runs(self, inputs: Mapping[str, Any], lengths: Limits) -> list[Lookup] | None:
        """The lookups of a run on one row of the same token, of other lengths; None where it fails."""
        names = [name for name in OF_TOKENS if _length(inputs, name)]
        row = {name: inputs[name][:1, :1].expand(1, lengths.get(name, 1)).contiguous() for name in names}
        row |= {name: x for name, x in inputs.items() if name == "use_cache"}
        watch = _Watch(row)
        try:
            with watch:
                self.run(**row)
        except Exception:  # whatever a class does with such a row
            return None
        return watch.seen


@contextmanager
def refusing(who: str, inputs: Mapping[str, Any]) -> Iterator[None]:
    """While this lasts, what a class of transformers raises on inputs that it does not take is a GrowError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of the machine: Accelerate may look for a smaller batch
    except (_Beyond, *FAILURES) as error:
        if isinstance(error, GrowError):
            raise
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
        wrong = f"it does not run on this batch ({shapes}): {first_line(error)}"
        raise GrowError(who, wrong, "inputs of sizes that it takes") from error


def _length(inputs: Mapping[str, Any], name: str) -> int:
    tensor = inputs.get(name)
    return tensor.shape[-1] if isinstance(tensor, Tensor) and tensor.ndim else 0
