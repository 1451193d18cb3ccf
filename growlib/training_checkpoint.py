"""A checkpoint of the Hugging Face Trainer, grown with all that it holds, so that the training goes on from it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import Trainer

from growlib.checkpoint import loading as checkpoint
from growlib.config import Target
from growlib.errors import GrowError
from growlib.folders import folder_of
from growlib.growth import settled
from growlib.growth_plan import GrowthPlan, Shape
from growlib.moments import KNOWN, POWERS, Policy, grown_state
from growlib.operators import Method
from growlib.streaming import LARGEST, write_grown

OPTIMIZER = "optimizer.pt"
BESIDE = ("scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json", "rng_state*.pth")
Groups = Callable[[nn.Module], Sequence[Sequence[str]]]  # the names of the parameters in each of an optimizer's groups
Orders = Sequence[Sequence[Sequence[str]]]
OTHERS = {"global_step*": "DeepSpeed's", "optimizer_*": "FSDP's", "pytorch_model_fsdp*": "FSDP's",
          ".metadata": "torch.distributed's"}  # fmt: skip


def expand_training_checkpoint(
    src: str | Path,
    dst: str | Path,
    target_config: Target | GrowthPlan,
    method: str | Method = "lossless",
    *,
    moments: Policy = "dual",
    groups: Groups | None = None,
    seed: int = 0,
    exact: bool | None = None,
    max_shard_size: int | str = LARGEST,
) -> GrowthPlan:
    """Grow a `checkpoint-N` folder of the Trainer: `trainer.train(resume_from_checkpoint=dst)` goes on at step N.

    The weights grow as in `expand_checkpoint`, the optimizer's moments with them. Schedule, random numbers and the
    Trainer's state stay as they are, so the data come in the same order and the learning rate goes on. The optimizer's
    state is in memory as a whole, of source and result; the weights are not.

    Args:
        src: a folder that the Trainer wrote, in one process or under DDP.
        dst: a folder that does not exist, such as `out/checkpoint-500`.
        target_config, method, seed, exact, max_shard_size: as for `expand_checkpoint`.
        moments: what becomes of the optimizer's moments. "dual": they grow as gradients do, and what is free in the
            plan starts at zero. "keep-old-zero-new": old values as they are, zero on all others (SPARKLING, arXiv
            2602.02472, with `EntryRates(plan, new=Rewarm(start=N))`). "reset": none.
        groups: for an optimizer with parameter groups of its own: the names of the parameters in each of them, of a
            model. By default they are the Trainer's (with and without weight decay), all in one, or all matrices.

    Returns:
        The plan that was carried out.

    Raises:
        GrowError: as `expand_checkpoint`; for a folder that the Trainer did not write so; for an optimizer other than
            Adam, AdamW (also fused), SGD, Muon and Adafactor; and where `groups` are not the optimizer's.
    """
    asked, folder = f"growing the training checkpoint {str(src)!r}", folder_of(src)
    if moments not in get_args(Policy):
        raise GrowError(f"moments={moments!r}", "there is no such policy", ", ".join(get_args(Policy)))
    if not (folder / OPTIMIZER).is_file() or not (folder / "trainer_state.json").is_file():
        whose = next((name for pattern, name in OTHERS.items() if any(folder.glob(pattern))), "")
        wrong = f"its optimizer is in {whose} format" if whose else f"it has no {OPTIMIZER} or no trainer_state.json"
        raise GrowError(asked, wrong, "a checkpoint-N folder of the Trainer, from one process or DDP")
    model_class, source = checkpoint.describe(folder)
    growth = settled(model_class, source, target_config, method, seed, exact)
    if growth.mixture and moments != "reset":
        raise GrowError(asked, "no moments of experts are known", 'moments="reset"')
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    with torch.device("meta"):
        small, big = (
            model_class(growth.source),
            checkpoint.class_like(model_class, growth.source.model_type, growth.config)(growth.config),
        )
    grown = _grown(asked, state, growth, _orders(small, groups), _orders(big, groups), moments)

    def finish(new: Path) -> str:
        torch.save(grown, new / OPTIMIZER)
        for pattern in BESIDE:
            for file in folder.glob(pattern):
                shutil.copyfile(file, new / file.name)
        return ""

    return write_grown(folder, dst, growth, exact=exact or False, max_shard_size=max_shard_size, check=finish)


def _grown(
    asked: str, state: Mapping[str, Any], growth: GrowthPlan, old: Orders, new: Orders, policy: Policy
) -> dict[str, Any]:
    """The optimizer's state dict for the grown model, whose parameters have other numbers."""
    if not {"state", "param_groups"} <= state.keys():
        wrong = f"its {OPTIMIZER} is no state of one optimizer of torch ({', '.join(map(str, state))})"
        raise GrowError(asked, wrong, "a Trainer with one optimizer")
    counts = [len(group["params"]) for group in state["param_groups"]]
    kind = next((k for k, order in enumerate(old) if [len(names) for names in order] == counts), None)
    if kind is None:
        wrong = f"its optimizer has groups of {counts} parameters, which are not the Trainer's"
        raise GrowError(asked, wrong, "the Trainer's own parameter groups, all parameters trained; or groups=")
    places = chain.from_iterable(group["params"] for group in state["param_groups"])
    names = dict(zip(places, chain.from_iterable(old[kind]), strict=True))
    made = {made.name: made for made in growth.tensors}
    held_by_name = {names[number]: held for number, held in state["state"].items() if policy != "reset"}
    _check_moments(asked, held_by_name, {str(one.source): one.old_shape for one in growth.tensors})
    origins = growth.new_parameters() if policy == "keep-old-zero-new" else {}
    numbers = {name: number for number, name in enumerate(chain.from_iterable(new[kind]))}
    grown = {
        number: grown_state(made[name], held_by_name[str(made[name].source)], growth, origins.get(name))
        for name, number in numbers.items()
        if made[name].source in held_by_name
    }
    parameters = [
        {**group, "params": [numbers[name] for name in order]}
        for group, order in zip(state["param_groups"], new[kind], strict=True)
    ]
    return {"state": grown, "param_groups": parameters}


def _check_moments(asked: str, held_by_name: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Shape]) -> None:
    """Raise GrowError for what no rule is known for, and for a moment that is not of its tensor."""
    for name, held in held_by_name.items():
        if unknown := sorted(held.keys() - KNOWN):
            wrong = f"its optimizer keeps {', '.join(unknown)}, which no rule is known for"
            raise GrowError(asked, wrong, 'AdamW, SGD, Muon or Adafactor; or moments="reset"')
        for moment in (held[key] for key in POWERS if isinstance(held.get(key), torch.Tensor)):
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
