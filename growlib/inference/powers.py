"""Where a class multiplies by a power of the width: numbers that its modules hold and that change with it say so."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf, log2
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.architectures.schema import Architecture, Verdict
from growlib.checkpoint.loading import skeleton
from growlib.inference import variants
from growlib.inference.sizes import changed
from growlib.inference.tiny import tiny_model
from growlib.inference.verifier import Trial, followers, trial
from growlib.parts import value_of

MOST = 3  # maps of one class whose product is multiplied so
FINEST = 0.5  # a power is a whole multiple of this


def scaled_by_width(table: Architecture, model: PreTrainedModel, small: PreTrainedConfig) -> Architecture:
    """The table with the maps whose product the class multiplies by a power of the width, where it doubles exactly so.

    Args:
        table: of which no candidate doubles the width exactly, or one does.
        model: a tiny model of the class, that is grown.
        small: its config.
    """
    field = table.axes["hidden"].size.split()[0]
    width = value_of(small, field)
    if not isinstance(width, int):
        return table  # one of several widths

    def doubled(candidate: Architecture) -> Trial:
        fields = {field: 2 * width}
        return trial(candidate, model, fields | followers(candidate, model.config, fields))

    if doubled(table).verdict.exact or not (powers := _powers(model, {field: 2 * width})):
        return table
    starts = [candidate for _, candidate in variants.of_hidden(table, small)]
    tried: list[tuple[str, Verdict]] = []
    least = inf
    for _ in range(MOST):
        found = [(told, c, doubled(c)) for start in starts for told, c in _one_more(start, powers)]
        if not found:
            break
        told, near, (_, verdict, apart) = min(found, key=lambda each: each[2].apart)
        if apart >= least:
            break
        tried.append((f"hidden x2: {told}", verdict))
        if verdict.exact:
            return replace(near, candidates=(*table.candidates, *tried))
        starts, least = [near], apart
    return replace(table, candidates=(*table.candidates, *tried))


def _one_more(table: Architecture, powers: dict[str, set[float]]) -> Iterator[tuple[str, Architecture]]:
    """Tables with one more map that is multiplied: of a module that holds such a number, or of the module itself."""
    for row, layout in table.tensors.items():
        module = row.removesuffix(".weight")
        if len(layout) != 2 or module == row or row in table.powers or row in {*table.ties, *table.ties.values()}:
            continue
        for power in sorted(powers.get(module, set()) | powers.get(module.rpartition(".")[0], set())):
            beside = {name: power for name in (row, f"{module}.bias") if name in table.tensors}
            yield f"{row} times hidden ** {power}", replace(table, powers={**table.powers, **beside})


def _powers(model: PreTrainedModel, fields: dict[str, Any]) -> dict[str, set[float]]:
    """For each module, with `*` for numbers, the powers of the width that are in the numbers it holds."""
    try:
        other = dict(tiny_model(type(model), changed(model.config, fields)).named_modules())
    except Exception:  # whatever a class of transformers raises: it cannot be built so
        return {}
    prefix = skeleton(model).prefix
    found: dict[str, set[float]] = {}
    for name, module in model.named_modules():
        if name not in other:
            continue
        after = _numbers(other[name])
        ratios = [after[key] / value for key, value in _numbers(module).items() if value and after.get(key)]
        told = {log2(ratio) for ratio in ratios if ratio > 0} - {0.0}
        of_it = {round(power / FINEST) * FINEST for power in told if abs(power / FINEST - round(power / FINEST)) < 1e-3}
        if of_it:
            words = f"{name}.".removeprefix(prefix).rstrip(".").split(".")
            found.setdefault(".".join("*" if word.isdigit() else word for word in words), set()).update(of_it)
    return found


def _numbers(module: nn.Module) -> dict[str, float]:
    """The numbers that a module holds: as an attribute, or as a buffer of one value."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    return own | {name: float(b) for name, b in module.named_buffers(recurse=False) if b.numel() == 1}
