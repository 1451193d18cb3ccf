"""A mixture of experts from a dense model: each feed-forward layer becomes experts, copies or shards of it.

    mixture   y = sum over the k chosen experts e of w_e FFN_e(x)
    copies    FFN_e = FFN and sum w_e = 1                                               =>  y = FFN(x)
    shards    FFN = sum_g FFN_g, the G shards of a copy have one router row and so are chosen together, each with the
              weight w / G; the down projection times G                                 =>  y = FFN(x)

The router's rows are drawn anew, one for each copy. What else the mixture has (a shared expert) starts with a zero
output. The dense part grows first, by its own architecture and plan.

Source: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055); virtual groups (He et al. 2024, arXiv 2410.07524).
Scaling the down projection only is growlib's choice: the paper's cube root on all three is not exact under SwiGLU.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.architectures.schema import Architecture
from growlib.checkpoint.loading import class_like, empty_model, fill, skeleton, skeleton_of
from growlib.config import OWN_FIELDS
from growlib.errors import GrowError
from growlib.free_values import normal
from growlib.growth_plan import ExpertTensor, GrowthPlan, Mixture, Part, Shape, Skeleton
from growlib.inference import architecture_of
from growlib.inference.tiny import tiny_config, tiny_model
from growlib.layouts import Dim, Layout
from growlib.operators import Method
from growlib.operators.drop_upcycling import resets
from growlib.outputs import TOLERANCE, distance, inputs_of, outputs

NO_GRADIENT = 1e-6  # of the largest gradient: rounding


def decide(
    model_class: type[PreTrainedModel],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
    dense: Architecture,
    method: Method,
    seed: int,
) -> tuple[Mixture, PreTrainedConfig]:
    """What becomes of a dense model's grown tensors, and the config that the dense model grows to before.

    Raises GrowError where the target is no such mixture.
    """
    asked = f"growing {source.model_type} to a {type(target).__name__}"
    if "ffn" not in dense.axes or "experts" in dense.axes:
        wrong = f"{dense.model_type} is no dense model with one feed-forward layer in each block"
        raise GrowError(asked, wrong, f"a dense source, or a {dense.model_type} config")
    mixture_class = class_like(model_class, source.model_type, target)
    table = architecture_of(target, mixture_class)
    made = _mixture(asked, source, dense, table, skeleton_of(mixture_class, target), seed)
    config = dense_config(source, dense, target, made.shards * made.units)
    tiny, grown = _tiny_pair(asked, model_class, source, target, made, dense, table)
    worst = distance(*(outputs(model, inputs_of(tiny)) for model in (tiny, grown))).relative
    reasons = [] if worst <= TOLERANCE else [_why(target, made, worst)]
    if method.reset:
        reasons.append(f"{method.name} starts a share of each expert's units anew")
    routers = {re.sub(r"\.\d+\.", ".*.", tensor.name) for tensor in made.tensors if tensor.part == "router"}
    learning = _learning(tiny_model(mixture_class, grown.config))  # whose experts differ, as in training they will
    silent = routers - {re.sub(r"\.\d+\.", ".*.", name) for name in learning}
    notes = [f"{name} cannot learn: with per_token={made.per_token} it changes no output" for name in silent]
    return replace(made, reset=method.reset, reasons=tuple(reasons), notes=tuple(sorted(notes))), config


def _learning(model: PreTrainedModel) -> list[str]:
    """The parameters that get a gradient beyond rounding, of a loss that reads all outputs."""
    with torch.enable_grad():
        model(**inputs_of(model)).logits.square().mean().backward()
    sizes = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [name for name, size in sizes.items() if size > NO_GRADIENT * max(sizes.values())]


def _tiny_pair(
    asked: str,
    model_class: type[PreTrainedModel],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
    made: Mixture,
    dense: Architecture,
    table: Architecture,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny dense model, and the mixture that is made of it in the same way."""
    mixture_class = class_like(model_class, source.model_type, target)
    small = tiny_config(target, mixture_class)
    units = min(made.shards, table.sizes(small)["per_token"]) * table.sizes(small)["expert_ffn"]
    tiny = tiny_model(model_class, dense_config(source, dense, small, units))
    like = _mixture(asked, tiny.config, dense, table, skeleton_of(mixture_class, small), made.seed)
    tensors = dict(mix(like, dict(tiny.named_parameters())))
    grown = empty_model(tiny, small, torch.float32, mixture_class)
    _check_places(asked, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, skeleton(grown))
    fill(grown, tensors.items())
    return tiny, grown


def _why(target: PreTrainedConfig, made: Mixture, worst: float) -> str:
    if norms := {re.sub(r"\.\d+\.", ".*.", made.name) for made in made.tensors if made.part == "one"}:
        return f"the source does not normalise as {target.model_type} does: it has no {', '.join(sorted(norms))}"
    if getattr(target, "norm_topk_prob", None) is False:
        return "norm_topk_prob=False: the weights of the experts that act do not sum to one"
    return f"a tiny {target.model_type} made so differs by {worst:.1g} of its outputs' spread"


def joined(growth: GrowthPlan, mixture: Mixture, target: Skeleton) -> GrowthPlan:
    """The plan of the dense growth and what becomes of it. Raises GrowError where a tensor has no place."""
    used = {source for made in mixture.tensors for source in made.sources}
    made = {e.name: e.new_shape for e in growth.tensors if e.name not in used} | {
        e.name: e.shape for e in mixture.tensors
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
    asked: str, source: PreTrainedConfig, dense: Architecture, table: Architecture, target: Skeleton, seed: int
) -> Mixture:
    sizes = table.sizes(target.config)
    experts, per_token = (sizes.get(axis) for axis in ("experts", "per_token"))
    if experts is None or per_token is None:
        wrong = f"inference finds no experts in {target.config.model_type}"
        raise GrowError(asked, wrong, "a mixture of stacked experts")
    units, width = dense.sizes(source)["ffn"], sizes["expert_ffn"]
    possible = [g for g in range(1, per_token + 1) if per_token % g == 0 and experts % g == 0]
    shards = next((g for g in possible if g * width >= units), 0)
    if not shards:
        field, most = table.axes["expert_ffn"].size, possible[-1]
        wrong = f"{most} experts of {width} units hold less than the {units} units of the source"
        raise GrowError(asked, wrong, f"{field} at least {-(-units // most)}, which makes {most} shards")
    tensors = tuple(_tensors(asked, dense, table, target))
    return Mixture(experts, per_token, shards, width, tensors, seed, getattr(source, "initializer_range", 0.02))


def dense_config(
    source: PreTrainedConfig, dense: Architecture, target: PreTrainedConfig, units: int
) -> PreTrainedConfig:
    """The config of the dense model at the target's sizes: every field that both have, the target's way."""
    theirs = {key: value for key, value in target.to_dict().items() if key not in OWN_FIELDS}
    fields = {key: theirs.get(key, value) for key, value in source.to_dict().items()}
    return type(source).from_dict({**fields, dense.axes["ffn"].size: units})


def _tensors(asked: str, dense: Architecture, table: Architecture, target: Skeleton) -> Iterator[ExpertTensor]:
    """Where each tensor of the mixture comes from that the dense table does not know."""
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
        row, _, layer = table.template(base)
        if dense.template(base)[0] in dense.tensors:
            continue
        part = _part(asked, name, table.tensors[row])
        rows = {"up": up, "down": down}.get(part, [])
        yield ExpertTensor(name, part, shape, tuple(target.prefix + row.replace("*", str(layer), 1) for row in rows))


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
    used = {source for made in mixture.tensors for source in made.sources}
    yield from ((name, tensor) for name, tensor in tensors.items() if name not in used)
    like = next(iter(tensors.values()))
    yield from ((made.name, mixed(mixture, made, tensors, like)) for made in mixture.tensors)


def mixed(mixture: Mixture, made: ExpertTensor, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """A tensor that the mixture alone has, from those of the grown dense model, in the dtype and place of `like`."""
    match made.part:
        case "up" | "down":
            return _experts(mixture, made, [tensors[source] for source in made.sources])
        case "router":
            copies = mixture.experts // mixture.shards
            rows = mixture.deviation * _drawn(mixture, made.name, (copies, made.shape[1])).to(like)
            return repeat(rows, "copies hidden -> (copies shards) hidden", shards=mixture.shards)
        case "one":
            return like.new_ones(made.shape)
        case "zero":
            return like.new_zeros(made.shape)
        case "free":
            return mixture.deviation * _drawn(mixture, made.name, made.shape).to(like)


def _drawn(mixture: Mixture, name: str, shape: Shape) -> Tensor:
    """Normal values of a shape, the same for a seed and a name."""
    return normal(mixture.seed, name, prod(shape[:-1]), shape[-1]).reshape(shape)


def _experts(mixture: Mixture, made: ExpertTensor, sources: list[Tensor]) -> Tensor:
    """The weights of one layer's experts: [experts, maps * units, hidden]; down: [experts, hidden, units]."""
    sizes = {"copies": mixture.experts // mixture.shards, "shards": mixture.shards, "units": mixture.units}
    if made.part == "down":
        sources = [sources[0].mT * mixture.shards]
    pattern = "(maps shards units) hidden -> (copies shards) maps units hidden"
    grown = torch.cat([repeat(source, pattern, **sizes) for source in sources], dim=1)
    if mixture.reset:
        layer = made.name.rpartition(".")[0]  # of all maps the same units
        chosen = resets(mixture.experts, mixture.units, mixture.seed, layer, mixture.reset)
        grown = _reset(grown, chosen[:, None, :, None].to(grown.device), _drawn(mixture, made.name, grown.shape))
    maps_together = "experts maps units hidden -> experts (maps units) hidden"
    return rearrange(grown, maps_together if made.part == "up" else "experts 1 units hidden -> experts hidden units")


def _reset(weights: Tensor, chosen: Tensor, drawn: Tensor) -> Tensor:
    """The chosen units drawn anew, around the mean and with the deviation that they have in each map."""
    count = chosen.sum(2, keepdim=True) * weights.shape[-1]
    mean = (weights * chosen).sum((2, 3), keepdim=True) / count
    deviation = (((weights - mean) ** 2 * chosen).sum((2, 3), keepdim=True) / count).sqrt()
    return torch.where(chosen, mean + deviation * drawn.to(weights), weights)
