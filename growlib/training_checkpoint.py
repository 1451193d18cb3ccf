"""A checkpoint of the Hugging Face Trainer, grown with all that it holds, so that the training goes on from it."""

import shutil
from collections.abc import Mapping, Sequence
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
from growlib.growth_plan import GrowthPlan
from growlib.moments import KNOWN, Policy, grown_state
from growlib.operators import Method
from growlib.streaming import LARGEST, write_grown

OPTIMIZER = "optimizer.pt"
BESIDE = ("scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json", "rng_state*.pth")
OTHERS = {"global_step*": "DeepSpeed's", "optimizer_*": "FSDP's", "pytorch_model_fsdp*": "FSDP's",
          ".metadata": "torch.distributed's"}  # fmt: skip


def expand_training_checkpoint(
    src: str | Path,
    dst: str | Path,
    target_config: Target | GrowthPlan,
    method: str | Method = "lossless",
    *,
    moments: Policy = "dual",
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

    Returns:
        The plan that was carried out.

    Raises:
        GrowError: as `expand_checkpoint`; for a folder that the Trainer did not write so; and for an optimizer other
            than Adam, AdamW (also fused), SGD, Muon and Adafactor, or with parameter groups of its own.
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
    grown = _grown(asked, state, growth, small, big, moments)

    def finish(new: Path) -> str:
        torch.save(grown, new / OPTIMIZER)
        for pattern in BESIDE:
            for file in folder.glob(pattern):
                shutil.copyfile(file, new / file.name)
        return ""

    return write_grown(folder, dst, growth, exact=exact or False, max_shard_size=max_shard_size, check=finish)


def _grown(
    asked: str, state: Mapping[str, Any], growth: GrowthPlan, small: nn.Module, big: nn.Module, policy: Policy
) -> dict[str, Any]:
    """The optimizer's state dict for the grown model, whose parameters have other numbers."""
    old, new = _orders(small), _orders(big)
    counts, shapes = [len(group["params"]) for group in state["param_groups"]], dict(small.named_parameters())
    kind = next((k for k, order in enumerate(old) if [len(names) for names in order] == counts), None)
    if kind is None:
        wrong = f"its optimizer has groups of {counts} parameters, which are not the Trainer's"
        raise GrowError(asked, wrong, "the Trainer's own parameter groups, all parameters trained")
    places = chain.from_iterable(group["params"] for group in state["param_groups"])
    names = dict(zip(places, chain.from_iterable(old[kind]), strict=True))
    for number, held in state["state"].items():
        if unknown := sorted(held.keys() - KNOWN):
            wrong = f"its optimizer keeps {', '.join(unknown)}, which no rule is known for"
            raise GrowError(asked, wrong, 'AdamW, SGD, Muon or Adafactor; or moments="reset"')
        moment = next((held[name] for name in ("exp_avg", "momentum_buffer", "exp_avg_sq") if name in held), None)
        if isinstance(moment, torch.Tensor) and moment.shape != shapes[names[number]].shape:
            wrong = f"the moment of {names[number]} is {tuple(moment.shape)}"
            raise GrowError(asked, wrong, "the Trainer's own parameter groups")
    held_by_name = {names[number]: held for number, held in state["state"].items()}
    made = {made.name: made for made in growth.tensors}
    origins = growth.new_parameters() if policy == "keep-old-zero-new" else {}
    numbers = {name: number for number, name in enumerate(chain.from_iterable(new[kind]))}
    grown = {
        number: grown_state(made[name], held_by_name[str(made[name].source)], growth, origins.get(name))
        for name, number in numbers.items()
        if policy != "reset" and made[name].source in held_by_name
    }
    groups = [
        {**group, "params": [numbers[name] for name in order]}
        for group, order in zip(state["param_groups"], new[kind], strict=True)
    ]
    return {"state": grown, "param_groups": groups}


def _orders(model: nn.Module) -> Sequence[list[list[str]]]:
    """The names of the parameters in each group: as the Trainer makes them (decayed, not decayed), or in one group."""
    every = [name for name, _ in model.named_parameters()]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return [[n for n in every if n in decayed], [n for n in every if n not in decayed]], [every]
