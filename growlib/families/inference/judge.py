"""The judge: grow a tiny model of the class by the table, every parameter random, and compare what it computes."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.apply import apply
from growlib.checkpoint import empty_model, skeleton, skeleton_of
from growlib.families.inference.sizes import changed
from growlib.families.inference.tiny import inputs_of, run
from growlib.families.schema import Family
from growlib.methods import method
from growlib.plan import make_plan

TOLERANCE = 1e-5


def error_of(family: Family, model: PreTrainedModel, target: PreTrainedConfig) -> tuple[float, str]:
    """Grow the model; the largest difference of its outputs in shares of their spread, and the plan's own reasons."""
    plan = make_plan(family, method("lossless"), 0, skeleton(model), skeleton_of(type(model), target))
    grown = empty_model(model, target, torch.float32)
    places = dict(grown.named_parameters()) | dict(grown.named_buffers())
    with torch.no_grad():
        for name, tensor in apply(plan, model.state_dict()):
            places[name].data = tensor
    worst = 0.0
    for seed in (1, 2):
        given = inputs_of(model, seed=seed)
        old, new = run(model, given), run(grown, given)
        new = new[tuple(slice(length) for length in old.shape)]
        worst = max(worst, ((new - old).abs().max() / (old.max() - old.min())).nan_to_num(torch.inf).item())
    return worst, "; ".join(plan.reasons)


def growths(family: Family, config: PreTrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to try: (name, config fields). A width is tried at a whole multiple and at another ratio."""
    for layers, count in family.layer_counts(config).items():
        yield layers, {layers: count + 2}
    for name, axis in family.axes.items():
        field = axis.size.split(" ")[0]
        size = getattr(config, field, None)
        if not axis.meets or not isinstance(size, int) or axis.meets == "unscaled":
            continue
        plain = axis.size == field
        for ratio, label in ((2, f"{name} x2"), (1.5, f"{name} x1.5")):
            if plain:
                fields: dict[str, Any] = {field: int(size * ratio)}
                for heads, width in family.follows.items():
                    if width == field:
                        fields[heads] = int(getattr(config, heads) * ratio)
                if axis.groups and family.axes[axis.groups].size in family.size_fields():
                    fields[family.axes[axis.groups].size] = int(getattr(config, family.axes[axis.groups].size) * ratio)
                yield label, fields


def verdicts(family: Family, model: PreTrainedModel) -> dict[str, str]:
    """Each growth that was tried: "" where it is exact, else why not."""
    found = {}
    for name, fields in growths(family, model.config):
        try:
            error, reasons = error_of(family, model, changed(model.config, fields))
        except Exception as failure:  # the class, the table or the plan refuses: not proven
            found[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            continue
        found[name] = "" if error <= TOLERANCE else reasons or f"off by {error:.1e} of the outputs' spread"
    return found
