"""A mixture of experts from a dense model: each feed-forward layer becomes experts, copies or shards of it.

    mixture   y = sum over the k chosen experts e of w_e FFN_e(x)
    copies    FFN_e = FFN and sum w_e = 1                                               =>  y = FFN(x)
    shards    FFN = sum_g FFN_g, the G shards of a copy have one router row and so are chosen together, each with the
              weight w / G; the down projection times G                                 =>  y = FFN(x)

The router's rows are drawn anew, one for each copy. What else the mixture has (a shared expert) starts with a zero
output. The dense part grows first, by its own family and plan.

Source: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055); virtual groups (He et al. 2024, arXiv 2410.07524).
Scaling the down projection only is growlib's choice: the paper's cube root on all three is not exact under SwiGLU.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib import checkpoint, families
from growlib.apply import Draw
from growlib.checkpoint import class_like, empty_model, fill, skeleton_of
from growlib.errors import GrowError
from growlib.families.schema import Dim, Family, Layout
from growlib.methods import Method
from growlib.plan import GrowthPlan, Shape, Skeleton
from growlib.target import OWN_FIELDS

Part = Literal["up", "down", "router", "zero", "one", "free"]


@dataclass(frozen=True)
class MixtureEntry:
    """Where a tensor comes from that the dense model does not have."""

    name: str
    part: Part
    shape: Shape
    sources: tuple[str, ...] = ()  # of a dense layer: [units, hidden], the gate first; for `down` [hidden, units]


@dataclass(frozen=True)
class Mixture:
    """What to make of the grown dense model."""

    dense: PreTrainedConfig  # of the dense model, grown to the mixture's sizes
    experts: int
    per_token: int
    shards: int  # in how many experts one feed-forward layer is split
    units: int  # of one expert
    entries: tuple[MixtureEntry, ...]
    method: Method
    seed: int
    deviation: float  # of the router's rows and of other new matrices
    reasons: tuple[str, ...] = ()  # why the mixture is not what the dense model was

    def to_dict(self) -> dict[str, Any]:
        return {"experts": self.experts, "shards": self.shards, "tensors": [asdict(entry) for entry in self.entries]}

    def __str__(self) -> str:
        copies, shards = self.experts // self.shards, self.shards
        split = f"{copies} copies of {shards} shards of it" if shards > 1 else f"{copies} copies of it"
        return f"then each feed-forward layer becomes {self.experts} experts, {split}, of which {self.per_token} act"


def decide(model: PreTrainedModel, target: PreTrainedConfig, dense: Family, method: Method, seed: int) -> Mixture:
    """What becomes of a dense model's grown tensors. Raises GrowError where the target is no such mixture."""
    from growlib.families.inference.judge import TOLERANCE, distance
    from growlib.families.inference.tiny import tiny_config, tiny_model

    asked = f"growing {model.config.model_type} to a {type(target).__name__}"
    if "ffn" not in dense.axes or "experts" in dense.axes:
        wrong = f"{dense.model_type} is no dense model with one feed-forward layer in each block"
        raise GrowError(asked, wrong, f"a dense source, or a {dense.model_type} config")
    model_class = class_like(model, target)
    family = families.family_of(target, model_class)
    made = _mixture(asked, model.config, target, dense, family, skeleton_of(model_class, target), method, seed)
    small = tiny_config(target, model_class)
    units = min(made.shards, family.sizes(small)["per_token"]) * family.sizes(small)["expert_ffn"]
    tiny = tiny_model(type(model), dense_config(model.config, dense, small, units))
    plain = replace(method, resets=None)
    like = _mixture(asked, tiny.config, small, dense, family, skeleton_of(model_class, small), plain, seed)
    tensors = dict(mix(like, dict(tiny.named_parameters())))
    grown = empty_model(tiny, small, torch.float32, model_class)
    _check_places(asked, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, checkpoint.skeleton(grown))
    fill(grown, tensors.items())
    worst = distance(tiny, grown, 1)
    reasons = [] if worst <= TOLERANCE else [_why(target, made, worst)]
    if method.resets:
        reasons.append(f"{method.name} starts a share of each expert's units anew")
    return replace(made, reasons=tuple(reasons))


def _why(target: PreTrainedConfig, made: Mixture, worst: float) -> str:
    if norms := {re.sub(r"\.\d+\.", ".*.", entry.name) for entry in made.entries if entry.part == "one"}:
        return f"the source does not normalise as {target.model_type} does: it has no {', '.join(sorted(norms))}"
    if getattr(target, "norm_topk_prob", None) is False:
        return "norm_topk_prob=False: the weights of the experts that act do not sum to one"
    return f"a tiny {target.model_type} made so differs by {worst:.1g} of its outputs' spread"


def joined(growth: GrowthPlan, mixture: Mixture, target: Skeleton) -> GrowthPlan:
    """The plan of the dense growth and what becomes of it. Raises GrowError where a tensor has no place."""
    used = {source for entry in mixture.entries for source in entry.sources}
    made = {e.name: e.new_shape for e in growth.entries if e.name not in used} | {
        e.name: e.shape for e in mixture.entries
    }
    _check_places(f"growing to a {type(target.config).__name__}", made, target)
    return replace(growth, config=target.config, mixture=mixture, reasons=growth.reasons + mixture.reasons)


def _check_places(asked: str, made: Mapping[str, Shape], target: Skeleton) -> None:
    for name in sorted(made.keys() | target.shapes.keys()):
        if name not in target.shapes:
            raise GrowError(asked, f"the target has no place for the source's {name}", "a mixture with its tensors")
        if made.get(name) != target.shapes[name]:
            wrong = f"{name} is {target.shapes[name]} in the target and {made.get(name)} by the source's sizes"
            raise GrowError(asked, wrong, "a mixture with the source's tensors and sizes")


def _mixture(
    asked: str,
    source: PreTrainedConfig,
    target: PreTrainedConfig,
    dense: Family,
    family: Family,
    skeleton: Skeleton,
    method: Method,
    seed: int,
) -> Mixture:
    sizes = family.sizes(target)
    experts, per_token = (sizes.get(axis) for axis in ("experts", "per_token"))
    if experts is None or per_token is None:
        raise GrowError(asked, f"inference finds no experts in {target.model_type}", "a mixture of stacked experts")
    units, width = dense.sizes(source)["ffn"], sizes["expert_ffn"]
    possible = [g for g in range(1, per_token + 1) if per_token % g == 0 and experts % g == 0]
    shards = next((g for g in possible if g * width >= units), 0)
    if not shards:
        field, most = family.axes["expert_ffn"].size, possible[-1]
        wrong = f"{most} experts of {width} units hold less than the {units} units of the source"
        raise GrowError(asked, wrong, f"{field} at least {-(-units // most)}, which makes {most} shards")
    config = dense_config(source, dense, target, shards * width)
    entries = tuple(_entries(asked, dense, family, skeleton))
    deviation = getattr(source, "initializer_range", 0.02)
    return Mixture(config, experts, per_token, shards, width, entries, method, seed, deviation)


def dense_config(source: PreTrainedConfig, dense: Family, target: PreTrainedConfig, units: int) -> PreTrainedConfig:
    """The config of the dense model at the target's sizes: every field that both have, the target's way."""
    theirs = {key: value for key, value in target.to_dict().items() if key not in OWN_FIELDS}
    fields = {key: theirs.get(key, value) for key, value in source.to_dict().items()}
    return type(source).from_dict({**fields, dense.axes["ffn"].size: units})


def _entries(asked: str, dense: Family, family: Family, target: Skeleton) -> Iterator[MixtureEntry]:
    """An entry for each tensor of the mixture that the dense family does not know."""
    matrices = {row: layout for row, layout in dense.tensors.items() if len(layout) == 2}
    down = [
        row for row, layout in matrices.items() if layout == (Dim((("hidden",),), "write"), Dim((("ffn",),), "read"))
    ]
    up = [row for row, layout in matrices.items() if set(layout[0].parts) == {("ffn",)} and not layout[0].by]
    up.sort(key=lambda row: "gate" not in row)
    if len(down) != 1 or not up:
        valid = "a dense model whose maps are [units, hidden], the gate before the rest"
        raise GrowError(asked, "its feed-forward layer has a layout of its own", valid)
    for name, shape in target.shapes.items():
        base = target.base(name)
        row, _, layer = family.template(base)
        if dense.template(base)[0] in dense.tensors:
            continue
        part = _part(asked, name, family.tensors[row])
        rows = {"up": up, "down": down}.get(part, [])
        yield MixtureEntry(name, part, shape, tuple(target.prefix + row.replace("*", str(layer), 1) for row in rows))


def _part(asked: str, name: str, layout: Layout) -> Part:
    axes = [{axis for part in dim.parts for axis in part} for dim in layout]
    sides = [dim.side for dim in layout]
    if axes == [{"experts"}, {"expert_ffn"}, {"hidden"}] and sides == ["write", "write", "read"]:
        return "up"
    if axes == [{"experts"}, {"hidden"}, {"expert_ffn"}] and sides == ["read", "write", "read"]:
        return "down"
    if axes == [{"experts"}, {"hidden"}]:
        return "router"
    if sides == ["scale"] and not layout[0].offset:
        return "one"
    if {"experts"} in axes[1:] or "expert_ffn" in set().union(*axes) or "scale" in sides:
        raise GrowError(asked, f"the source has nothing like {name}", "a mixture with the source's tensors")
    return "zero" if {"hidden"} in axes[:1] or len(axes) == 1 else "free"


def mix(mixture: Mixture, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of the mixture, from those of the grown dense model."""
    used = {source for entry in mixture.entries for source in entry.sources}
    yield from ((name, tensor) for name, tensor in tensors.items() if name not in used)
    like = next(iter(tensors.values()))
    shards, copies = mixture.shards, mixture.experts // mixture.shards
    for entry in mixture.entries:
        draw = Draw(mixture.seed, entry.name, torch.tensor(mixture.deviation))
        match entry.part:
            case "up" | "down":
                yield entry.name, _experts(mixture, entry, [tensors[source] for source in entry.sources], draw)
            case "router":
                rows = draw.normal(like.new_empty(copies, entry.shape[1]))
                yield entry.name, repeat(rows, "copies hidden -> (copies shards) hidden", shards=shards)
            case "one":
                yield entry.name, like.new_ones(entry.shape)
            case "zero":
                yield entry.name, like.new_zeros(entry.shape)
            case "free":
                yield entry.name, draw.normal(like.new_empty(entry.shape))


def _experts(mixture: Mixture, entry: MixtureEntry, sources: list[Tensor], draw: Draw) -> Tensor:
    """The weights of one layer's experts: [experts, maps * units, hidden]; down: [experts, hidden, units]."""
    sizes = {"copies": mixture.experts // mixture.shards, "shards": mixture.shards, "units": mixture.units}
    if entry.part == "down":
        sources = [sources[0].mT * mixture.shards]
    pattern = "(maps shards units) hidden -> (copies shards) maps units hidden"
    grown = torch.cat([repeat(source, pattern, **sizes) for source in sources], dim=1)
    if mixture.method.resets:
        layer = Draw(mixture.seed, entry.name.rpartition(".")[0], draw.deviation)  # of all maps the same units
        chosen = mixture.method.resets(mixture.experts, mixture.units, layer)
        grown = _reset(grown, chosen[:, None, :, None].to(grown.device), draw)
    maps_together = "experts maps units hidden -> experts (maps units) hidden"
    return rearrange(grown, maps_together if entry.part == "up" else "experts 1 units hidden -> experts hidden units")


def _reset(weights: Tensor, chosen: Tensor, draw: Draw) -> Tensor:
    """The chosen units drawn anew, around the mean and with the deviation that they have in each map."""
    count = chosen.sum(2, keepdim=True) * weights.shape[-1]
    mean = (weights * chosen).sum((2, 3), keepdim=True) / count
    deviation = (((weights - mean) ** 2 * chosen).sum((2, 3), keepdim=True) / count).sqrt()
    return torch.where(chosen, mean + deviation * draw.normal(weights) / draw.deviation.to(weights), weights)
