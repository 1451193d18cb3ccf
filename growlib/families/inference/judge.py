"""The judge: grow a tiny model of the class by the table, every parameter random, and compare what it computes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.apply import apply
from growlib.checkpoint import empty_model, fill, skeleton, skeleton_of
from growlib.families.inference.sizes import changed
from growlib.families.inference.tiny import inputs_of, outputs
from growlib.families.schema import Family, growth_name
from growlib.methods import method
from growlib.plan import make_plan

TOLERANCE = 1e-5
NUMBERS = {"x2": 2.0, "x1.5": 1.5}


@dataclass(frozen=True)
class Trial:
    """One growth of the tiny model: which axes grew, at which ratio, and why it is not exact ("" where it is)."""

    grew: frozenset[str]
    wrong: str


def trial(family: Family, model: PreTrainedModel, fields: Mapping[str, Any]) -> Trial:
    """Grow the model to these config fields, and compare on two inputs."""
    try:
        target = changed(model.config, fields)
        plan = make_plan(family, method("lossless"), 0, skeleton(model), skeleton_of(type(model), target))
        grew = frozenset(
            name if name in plan.layers else growth_name(name, plan.old_sizes[name], plan.new_sizes[name])
            for name in plan.grows
        )
        if plan.reasons:
            return Trial(grew, "; ".join(plan.reasons))
        grown = empty_model(model, target, torch.float32)
        fill(grown, apply(plan, model.state_dict()))
        worst = max(distance(model, grown, seed) for seed in (1, 2))
    except Exception as failure:  # the class, the table or the plan refuses
        lines = str(failure.__cause__ or failure).strip().splitlines() or [type(failure).__name__]
        return Trial(frozenset(), lines[-1].strip())
    return Trial(grew, "" if worst <= TOLERANCE else f"a tiny model differs by {worst:.1g} of its outputs' spread")


def distance(model: PreTrainedModel, grown: PreTrainedModel, seed: int) -> float:
    """The largest difference of what they compute, in shares of the spread of the first one's output."""
    given = inputs_of(model, seed=seed)
    old, new = outputs(model, given), outputs(grown, given)
    shares = [_share(old[name].double(), new[name].double()) for name in old]
    return float(torch.tensor(shares).nan_to_num(torch.inf).max())


def _share(old: Tensor, new: Tensor) -> float:
    new = new[tuple(slice(length) for length in old.shape)]
    return ((new - old).abs().max() / (old.max() - old.min())).item()


def growths(family: Family, config: PreTrainedConfig) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What to try for each axis: (its name and ratio, config fields to try until one can be built)."""
    for layers, count in family.layer_counts(config).items():
        yield layers, [{layers: count + 2}, {layers: 2 * count}]
    wide = family.axes["hidden"].size
    for name, axis in family.axes.items():
        if not axis.meets or axis.meets == "unscaled":
            continue
        for label, number in NUMBERS.items():
            own = {field: _times(config, field, number) for field in _fields(family, axis.size)[:1]}
            if axis.groups:
                own |= {
                    field: _times(config, field, number) for field in _fields(family, family.axes[axis.groups].size)[:1]
                }
            if name == "kv_heads":
                heads = [
                    field for a in family.axes.values() if a.groups == name for field in _fields(family, a.size)[:1]
                ]
                own |= {field: _times(config, field, number) for field in heads}
            together = own | {field: _times(config, field, number) for field in _fields(family, wide)[:1]}
            yield (
                f"{name} {label}",
                [own | followers(family, config, own), together | followers(family, config, together, heads=False)],
            )


def followers(
    family: Family, config: PreTrainedConfig, fields: Mapping[str, int], heads: bool = True
) -> dict[str, int]:
    """The fields that grow with these: the ones that say the same size again, and the heads."""
    found = {}
    for field, width in family.follows.items():
        if width in fields and field not in fields:
            same = getattr(config, field) == getattr(config, width)
            if same:
                found[field] = fields[width]
            elif heads:
                found[field] = getattr(config, field) * fields[width] // getattr(config, width)
    return found


def _fields(family: Family, size: str) -> list[str]:
    return [word for word in size.split(" or ")[-1].split() if word in family.size_fields()]


def _times(config: PreTrainedConfig, field: str, number: float) -> int:
    return int(getattr(config, field) * number)


def verdicts(family: Family, model: PreTrainedModel) -> dict[str, str]:
    """For each axis and ratio "" where a growth with it was exact, else why not; and the same for all together."""
    exact: set[str] = set()
    wrong: dict[str, str] = {}
    together: dict[str, int] = {}
    for name, options in growths(family, model.config):
        found = Trial(frozenset(), "")
        for fields in options:
            found = trial(family, model, fields)
            if name in found.grew:
                break
        if found.wrong:
            wrong[name] = found.wrong
            wrong |= dict.fromkeys(found.grew - wrong.keys(), found.wrong)
        elif name in found.grew:
            exact |= found.grew
            together |= {} if name.endswith("x1.5") else {k: max(v, together.get(k, 0)) for k, v in fields.items()}
        else:
            wrong[name] = "it could not be grown by itself"
    return wrong | dict.fromkeys(sorted(exact), "") | {"together": trial(family, model, together).wrong}
