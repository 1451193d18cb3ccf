"""Grow a tiny model of a class by a table, every parameter random, and compare what it computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.apply import apply
from growlib.architectures.schema import EXACT, RESIDUAL, Architecture, Axis, Growth, Verdict
from growlib.checkpoint.loading import empty_model, fill, skeleton, skeleton_of
from growlib.errors import GrowError
from growlib.inference import why
from growlib.inference.sizes import changed, evenly
from growlib.operators import Method, method
from growlib.outputs import TOLERANCE, distance, every_input, outputs
from growlib.parts import value_of
from growlib.planner import Request, layer_map, make_plan

RATIOS: tuple[tuple[Any, float], ...] = (("x2", 2.0), ("x1.5", 1.5))
SEEDS = (1, 2)  # of the inputs


class Trial(NamedTuple):
    """One growth of the tiny model: what grew, the verdict, and by how much the outputs differ."""

    grew: frozenset[Growth]
    verdict: Verdict
    apart: float = inf


def trial(
    table: Architecture, model: PreTrainedModel, fields: Mapping[str, Any], chosen: str | Method = "copies"
) -> Trial:
    """Grow the model to these config fields, and compare on two inputs. Copies meet whole multiples and a rest."""
    built = False
    try:
        stacks = {stack.layers: stack for stack in table.stacks}

        def sources(counted: str, old: int, new: int) -> Sequence[int]:
            known = counted in stacks
            return layer_map(method(chosen), stacks[counted], old, new).source if known else evenly(counted, old, new)

        target = changed(model.config, fields, stacks, sources)
        wide = skeleton_of(type(model), target)
        built = True
        plan = make_plan(Request(table, method(chosen), 0, skeleton(model), wide))
        grew = frozenset(
            Growth(name, "deeper")
            if name in plan.layers
            else Growth.of(name, plan.old_sizes[name], plan.new_sizes[name])
            for name in plan.grows
        )
        if plan.reasons:
            return Trial(grew, Verdict("inexact", "; ".join(plan.reasons)))
        grown = empty_model(model, target, torch.float32)
        fill(grown, apply(plan, model.state_dict()))
        worst = max(apart(model, grown, seed) for seed in SEEDS)
    except GrowError as refusal:  # by the table or the plan; a class that cannot be built says why in its cause
        told = refusal.wrong if built else why.of_class(refusal.__cause__ or refusal, fields, model.config)
        return Trial(frozenset(), Verdict("refused", told))
    except Exception as failure:  # whatever a class of transformers raises
        told = f"it cannot be grown: {failure}" if built else why.of_class(failure, fields, model.config)
        return Trial(frozenset(), Verdict("refused", told))
    if worst <= TOLERANCE:
        return Trial(grew, EXACT, worst)
    return Trial(grew, Verdict("inexact", why.DIFFERS.format(worst)), worst)


def apart(model: PreTrainedModel, grown: PreTrainedModel, seed: int) -> float:
    """The largest difference of what they compute, in shares of the spread of the first one's output."""
    inputs = every_input(model, seed=seed)
    return max(distance(outputs(model, given), outputs(grown, given)).relative for given in inputs)


def growths(table: Architecture, config: PreTrainedConfig) -> Iterator[tuple[Growth, list[dict[str, Any]]]]:
    """What to try for each axis: (its growth, config fields to try until one can be built)."""
    for layers, count in table.layer_counts(config).items():
        yield Growth(layers, "deeper"), [{layers: count + 2}, {layers: 2 * count}]
    wide = _fields(table, table.axes["hidden"].size)[:1]
    for name, axis in table.axes.items():
        if not axis.role or axis.role == "unscaled":
            continue
        own = _fields(table, axis.size)[:1]
        if axis.groups:
            own += _fields(table, table.axes[axis.groups].size)[:1]
        if name == "kv_heads":
            own += [field for a in table.axes.values() if a.groups == name for field in _fields(table, a.size)[:1]]
        for ratio, number in RATIOS:
            alone, together = (
                {field: int(value_of(config, field) * number) for field in fields} for fields in (own, [*own, *wide])
            )
            yield (
                Growth(name, ratio),
                [
                    alone | followers(table, config, alone),
                    together | followers(table, config, together, heads=False),
                ],
            )


def followers(
    table: Architecture, config: PreTrainedConfig, fields: Mapping[str, int], heads: bool = True
) -> dict[str, int]:
    """The fields that grow with these: the ones that say the same size again, and the heads."""
    following = {}
    for field, width in table.follows.items():
        if width in fields and field not in fields:
            same = value_of(config, field) == value_of(config, width)
            if same:
                following[field] = fields[width]
            elif heads:
                following[field] = value_of(config, field) * fields[width] // value_of(config, width)
    return following


def _fields(table: Architecture, size: str) -> list[str]:
    return [word for word in size.split(" or ")[-1].split() if word in table.size_fields()]


def verdicts(table: Architecture, model: PreTrainedModel) -> dict[Growth, Verdict]:
    """The verdict on each growth that the model can make."""
    exact: set[Growth] = set()
    wrong: dict[Growth, Verdict] = {}
    for growth, options in growths(table, model.config):
        grew, verdict, _ = Trial(frozenset(), EXACT)
        for fields in options:
            grew, verdict, _ = trial(table, model, fields)
            if growth in grew:
                break
        if not verdict.exact:
            verdict = why.told(verdict, growth, fields, table, model)
            wrong[growth] = verdict
            wrong |= dict.fromkeys(grew - wrong.keys(), verdict)
        elif growth in grew:
            exact |= grew
        else:
            wrong[growth] = why.told(
                Verdict("refused", "it could not be grown by itself"), growth, fields, table, model
            )
    return wrong | dict.fromkeys(sorted(exact), EXACT)


def only_copies(table: Architecture, proven: Mapping[Growth, Verdict]) -> dict[str, Axis]:
    """The axes, those marked whose whole copies are exact and whose new entries beside them are not."""
    untried = Verdict("refused")
    marked = {
        name
        for name in table.axes
        if proven.get(Growth(name, "x2"), untried).exact and proven.get(Growth(name, "x1.5"), untried).kind == "inexact"
    }
    sizes = {table.axes[name].size for name in marked if table.axes[name].role in RESIDUAL}
    stream = {name for name, axis in table.axes.items() if axis.role in RESIDUAL and axis.size in sizes}
    return {name: replace(axis, only_copies=name in marked | stream) for name, axis in table.axes.items()}


def unverified(table: Architecture, why: str) -> dict[Growth, Verdict]:
    """The verdicts where no tiny model can be built."""
    refused = Verdict("refused", f"no tiny model can prove it: {why}")
    kinds = [Growth(name, ratio) for name in table.axes for ratio, _ in RATIOS]
    return dict.fromkeys([*kinds, *(Growth(stack.layers, "deeper") for stack in table.stacks)], refused)
