"""The state dict of an optimizer, grown. Its parameters have numbers, as torch saves it, or names, as FSDP does."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from growlib.errors import GrowError
from growlib.growth_plan import GrowthPlan, Shape
from growlib.moments import KNOWN, POWERS, Policy, grown_state

Groups = Callable[[nn.Module], Sequence[Sequence[str]]]  # the names of the parameters in each of an optimizer's groups
Orders = Sequence[Sequence[Sequence[str]]]
Held = Mapping[str, Mapping[str, Any]]  # the state of each parameter, by its name


def grown_by_number(
    asked: str,
    state: Mapping[str, Any],
    growth: GrowthPlan,
    small: nn.Module,
    big: nn.Module,
    groups: Groups | None,
    policy: Policy,
) -> dict[str, Any]:
    """What `torch.optim.Optimizer.state_dict` says, for the grown model, whose parameters have other numbers."""
    if not {"state", "param_groups"} <= state.keys():
        wrong = f"it holds no state of one optimizer of torch ({', '.join(map(str, state))})"
        raise GrowError(asked, wrong, "a Trainer with one optimizer")
    counts, old = [len(group["params"]) for group in state["param_groups"]], _orders(small, groups)
    kind = next((k for k, order in enumerate(old) if [len(names) for names in order] == counts), None)
    if kind is None:
        wrong = f"its optimizer has groups of {counts} parameters, which are not the Trainer's"
        raise GrowError(asked, wrong, "the Trainer's own parameter groups, all parameters trained; or groups=")
    places = chain.from_iterable(group["params"] for group in state["param_groups"])
    names = dict(zip(places, chain.from_iterable(old[kind]), strict=True))
    order = _orders(big, groups)[kind]
    held = {names[number]: held for number, held in state["state"].items() if policy != "reset"}
    numbers = {name: number for number, name in enumerate(chain.from_iterable(order))}
    grown = _grown_states(asked, held, growth, policy, numbers)
    parameters = [
        {**group, "params": [numbers[name] for name in names]}
        for group, names in zip(state["param_groups"], order, strict=True)
    ]
    return {"state": {numbers[name]: one for name, one in grown.items()}, "param_groups": parameters}


def grown_by_name(
    asked: str,
    state: Mapping[str, Any],
    growth: GrowthPlan,
    small: nn.Module,
    big: nn.Module,
    groups: Groups | None,
    policy: Policy,
) -> dict[str, Any]:
    """What `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` says, for the grown model.

    Each parameter that is trained has a state there: torch refuses to load a part of them. One of which nothing is
    known begins with zeros, as an optimizer itself lets it begin.
    """
    held: Held = state["state"]
    shapes = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    if unknown := sorted({*held, *chain.from_iterable(g["params"] for g in state["param_groups"])} - shapes.keys()):
        wrong = f"its optimizer trains {unknown[0]}, which a {type(small).__name__} has not"
        raise GrowError(asked, wrong, "the config of the model that was trained")
    order = _new_groups(asked, state["param_groups"], growth, small, big, groups)
    every = list(chain.from_iterable(order))
    grown = _grown_states(asked, {} if policy == "reset" else held, growth, policy, every)
    sources = {made.name: made.source for made in growth.tensors}
    for name in every if held else ():
        if name not in grown:
            like = sources.get(name) if sources.get(name) in held else next(iter(held))
            grown[name] = _zeros(asked, name, held[str(like)], shapes[str(like)], big.get_parameter(name).shape)
    parameters = [{**group, "params": list(names)} for group, names in zip(state["param_groups"], order, strict=True)]
    return {"state": grown, "param_groups": parameters}


def _grown_states(
    asked: str, held: Held, growth: GrowthPlan, policy: Policy, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """The state of each of the grown model's parameters whose source has one."""
    _check_moments(asked, held, {str(one.source): one.old_shape for one in growth.tensors})
    made = {made.name: made for made in growth.tensors}
    origins = growth.new_parameters() if policy == "keep-old-zero-new" else {}
    return {
        name: grown_state(made[name], held[str(made[name].source)], growth, origins.get(name))
        for name in names
        if name in made and made[name].source in held
    }


def _zeros(asked: str, name: str, like: Mapping[str, Any], old: Shape, new: Shape) -> dict[str, Any]:
    """The state with which a parameter begins: that of another one, with zeros, in its own shape."""
    fresh: dict[str, Any] = {}
    for key, value in like.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            fresh[key] = value * 0 if isinstance(value, Tensor | int | float) else value
        elif tuple(value.shape) == old:
            fresh[key] = value.new_zeros(new)
        else:
            wrong = f"{name} would begin with a {key} whose shape is not known"
            raise GrowError(asked, wrong, "AdamW, SGD or Muon")
    return fresh


def _new_groups(
    asked: str,
    old: Sequence[Mapping[str, Any]],
    growth: GrowthPlan,
    small: nn.Module,
    big: nn.Module,
    groups: Groups | None,
) -> Sequence[Sequence[str]]:
    """The names in each group of the grown model: as the Trainer forms them, or where those of their sources are."""
    named = [set(group["params"]) for group in old]
    for before, after in zip(_orders(small, groups), _orders(big, groups), strict=True):
        if [set(names) for names in before] == named:
            return after
    if groups:
        raise GrowError(asked, "its optimizer has other groups than groups= says", "the optimizer's own, or none")
    sources = {made.name: made.source for made in growth.tensors}
    if lost := [name for name, _ in big.named_parameters() if sources.get(name) is None]:
        wrong = f"{lost[0]} has no source whose group it could be in"
        raise GrowError(asked, wrong, "groups=, the names in each of the optimizer's groups")
    return [[name for name, _ in big.named_parameters() if sources[name] in names] for names in named]


def _check_moments(asked: str, held: Held, shapes: Mapping[str, Shape]) -> None:
    """Raise GrowError for what no rule is known for, and for a moment that is not of its tensor."""
    for name, one in held.items():
        if unknown := sorted(one.keys() - KNOWN):
            wrong = f"its optimizer keeps {', '.join(unknown)}, which no rule is known for"
            raise GrowError(asked, wrong, 'AdamW, SGD, Muon or Adafactor; or moments="reset"')
        for moment in (one[key] for key in POWERS if isinstance(one.get(key), torch.Tensor)):
            if moment.shape != shapes[name]:
                wrong = f"the moment of {name} is {tuple(moment.shape)}, not {shapes[name]}"
                raise GrowError(asked, wrong, "the optimizer's own parameter groups, see groups=")


def _orders(model: nn.Module, groups: Groups | None) -> Orders:
    """The names of the parameters in each group, as they may be."""
    every = [name for name, _ in model.named_parameters()]
    if groups:
        named = groups(model)
        if unknown := [name for names in named for name in names if name not in every]:
            wrong = f"a {type(model).__name__} has no parameter {unknown[0]}"
            raise GrowError("the parameter groups of an optimizer", wrong, "names of named_parameters()")
        return [named]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]  # all that Muon takes
    return [[n for n in every if n in decayed], [n for n in every if n not in decayed]], [every], [matrices]
