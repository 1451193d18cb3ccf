"""The training after a growth: new entries, old entries and whole tensors, each at its own rate.

A plan says which entries are new (`GrowthPlan.new_parameters`). Three uses of it:

    freeze_old(model, plan)              only what is new trains; for growths in depth (LLaMA-Pro)
    EntryRates(plan, new=.., old=..)     a Trainer callback: rates inside tensors that are partly old (SPARKLING)
    mup_groups(model, plan, rate)        rates of whole tensors by how much wider their inputs got (muP)
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback

from growlib.errors import GrowError
from growlib.growth_plan import GrowthPlan
from growlib.origin import Origin

STATE = "trainer_state.json"  # of the Hugging Face Trainer, beside a checkpoint
Plan = GrowthPlan | str | Path  # a plan; the file that it was saved in, or the folder of the grown model beside it


def starting_rate(source: str | Path) -> str:
    """Advice, in words, on the learning rate of a model that was grown from a checkpoint (see docs/after.md)."""
    try:
        log = json.loads((Path(source) / STATE).read_text())["log_history"]
        highest = f", {max(entry['learning_rate'] for entry in log if 'learning_rate' in entry):g} by its {STATE}"
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or not one of the Trainer's
        highest = ""
    return f"begin with the learning rate at which the source was trained best{highest}"


def freeze_old(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Switch `requires_grad` off for what is old, so that only the new blocks train (LLaMA-Pro, arXiv 2401.02415).

    Returns:
        The names of the frozen parameters.

    Raises:
        GrowError: a tensor is partly old, as in every growth in width; or the model is not of the plan.
    """
    new = _new_entries(model, _read(plan))
    mixed = [name for name, is_new in new.items() if is_new.any() and not is_new.all()]
    if mixed:
        wrong = f"{len(mixed)} tensors are partly old, {mixed[0]} among them"
        raise GrowError("freezing what is old", wrong, "a growth in depth, or the callback EntryRates(plan, old=0.0)")
    frozen = [name for name, is_new in new.items() if not is_new.any()]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def mup_groups(
    model: PreTrainedModel, plan: Plan, learning_rate: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for Adam(W) in which a rate found on the small model holds for the grown one.

    muP (Yang et al. 2022, arXiv 2203.03466, Table 3, Adam): a matrix whose inputs grew from n to N has the rate
    `learning_rate * n / N`; embeddings, biases and norms keep `learning_rate`. A head that is tied to its embedding
    has the embedding's rate. Matrices have the weight decay, vectors have none.

    Pass them on with `Trainer(optimizers=(torch.optim.AdamW(groups), None), ...)`; the schedule scales all of them.
    """
    plan = _read(plan)
    _new_entries(model, plan)
    rates = {}
    for made in plan.tensors:
        read = [axis for dim in made.layout if dim.side == "read" for part in dim.parts for axis in part]
        read = [axis for axis in read if plan.roles.get(axis, "lookup") != "lookup"]
        rates[made.name] = prod(plan.old_sizes[axis] for axis in read) / prod(plan.new_sizes[axis] for axis in read)
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups[rates[name] * learning_rate, decay].append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


@dataclass(frozen=True)
class Rewarm:
    """A second warm-up, of the new entries alone (SPARKLING, arXiv 2602.02472).

    With η the schedule's rate, t₀ = `start` and τ = `steps`, the new entries go from η(t₀) linearly to ρ η̂ in τ
    steps, and from there by a cosine to the schedule's last rate. η̂ is η's highest value in those steps, which is
    η(t₀) in the middle of a training, as in the paper, and the peak where the schedule has a warm-up of its own.

    Args:
        rho: the paper's ρ; its flat optimum is 1.25 to 1.3.
        steps: the paper's τ_w, in optimizer steps.
        start: the step at which the model was grown: 0, or the step of the checkpoint that it was grown from.
    """

    rho: float = 1.3
    steps: int = 250
    start: int = 0

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.steps < 0 or self.start < 0:
            wrong = "rho must be positive, steps and start not negative"
            raise GrowError(str(self), wrong, "such as Rewarm(rho=1.3, steps=250)")

    def rate(self, step: int, last: int, schedule: Callable[[int], float]) -> float:
        """The rate of new entries at a step; `schedule` is η, and `last` the number of all steps."""
        warm = self.start + self.steps
        if step < self.start:
            return schedule(step)
        top = self.rho * max(schedule(t) for t in range(self.start, min(warm, last) + 1))
        if step < warm:
            return schedule(self.start) + (top - schedule(self.start)) * (step - self.start) / self.steps
        end, progress = schedule(last), min((step - warm) / max(last - warm, 1), 1.0)
        return end + (top - end) * (1 + cos(pi * progress)) / 2


class EntryRates(TrainerCallback):
    """A Trainer callback with which new and old entries learn at different rates, also inside one tensor.

    After each optimizer step it multiplies the step that an entry made, weight decay included, by its rate. That is
    what another learning rate does to SGD, Adam and AdamW; scaling gradients would do nothing to Adam.
    The rates depend on the step alone, so that a resumed training goes on as it was.

    While rates differ from 1, a step holds one more copy of the parameters that they concern.

    Args:
        plan: of the growth that made the model, or where it was saved.
        new: the rate of entries that are not old, as a share of the schedule's: a number, or a `Rewarm`.
        old: that of the old ones; 0.0 freezes them.

    Raises:
        GrowError: when training starts, where the model is not of the plan, its parameters are flattened (FSDP1),
            DeepSpeed runs the step, or the schedule of a `Rewarm` is no function of the step.
    """

    def __init__(self, plan: Plan, *, new: float | Rewarm = 1.0, old: float = 1.0) -> None:
        if old < 0 or (not isinstance(new, Rewarm) and new < 0):
            raise GrowError(f"EntryRates(new={new}, old={old})", "a rate is negative", "0.0 (frozen) or more")
        self.plan, self.new, self.old = _read(plan), new, old
        self._is_new: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._rate = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if args.deepspeed:
            raise GrowError(
                "EntryRates under DeepSpeed",
                "DeepSpeed runs the optimizer step itself, so the callback cannot scale it",
                "another Trainer setup",
            )
        model = of_trainer["model"]
        new = {name: is_new for name, is_new in _new_entries(model, self.plan).items() if is_new.any() or self.old != 1}
        self._is_new = {name: _part_here(is_new, model.get_parameter(name)) for name, is_new in new.items()}
        if isinstance(self.new, Rewarm):
            _schedule(of_trainer["lr_scheduler"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self._rate = self._new_rate(state, of_trainer["lr_scheduler"])
        if (self._rate, self.old) == (1.0, 1.0):
            return
        parameters = of_trainer["model"].named_parameters()
        self._before = {n: _here(p).clone() for n, p in parameters if n in self._is_new and p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        for name, before in self._before.items():
            parameter = _here(of_trainer["model"].get_parameter(name))
            is_new, after = self._is_new[name].to(parameter.device), parameter.clone()
            new, old = (_share_of(rate, before, after) for rate in (self._rate, self.old))
            parameter.copy_(torch.where(is_new, new, old))
        self._before = {}

    def _new_rate(self, state: Any, scheduler: Any) -> float:
        """The new entries' rate in this step, as a share of the schedule's."""
        if not isinstance(self.new, Rewarm):
            return self.new
        schedule = _schedule(scheduler)
        now = schedule(state.global_step)
        return self.new.rate(state.global_step, state.max_steps, schedule) / now if now else 1.0


def _here(parameter: Tensor) -> Tensor:
    """The values of a parameter that this process holds, without a gradient: all of them, or a part under FSDP2."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _part_here(entries: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor, which every process has as a whole, that stands beside `_here(parameter)`."""
    if not isinstance(parameter, DTensor):
        return entries
    mesh = parameter.device_mesh
    return distribute_tensor(entries.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()


def _share_of(rate: float, before: Tensor, after: Tensor) -> Tensor:
    """`before` plus a share of the step; bit for bit `after` and `before` at 1 and 0."""
    return after if rate == 1.0 else before if rate == 0.0 else before + rate * (after - before)


def _schedule(scheduler: Any) -> Callable[[int], float]:
    """A scheduler's rate at a step, as a share of the highest."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not isinstance(scheduler, LambdaLR):
        wrong = f"{type(scheduler).__name__} is no function of the step"
        raise GrowError("a Rewarm of new entries", wrong, "lr_scheduler_type linear, cosine, ..., or a number for new=")
    return scheduler.lr_lambdas[0]


def _read(plan: Plan) -> GrowthPlan:
    return plan if isinstance(plan, GrowthPlan) else GrowthPlan.load(plan)


def _new_entries(model: PreTrainedModel, plan: GrowthPlan) -> dict[str, Tensor]:
    """For each parameter, which entries are not old: bool of its whole shape."""
    origins, new = plan.new_parameters(), {}
    for name, parameter in model.named_parameters():
        if name not in origins or origins[name].shape != parameter.shape:
            wrong = f"{name} of shape {tuple(parameter.shape)} is not in the plan, or flattened (FSDP1, ZeRO-3)"
            raise GrowError(f"training after {plan.method}", wrong, "the whole model that the plan's growth made")
        origin = origins[name]
        uniform = not any(origin.stride())  # one byte, and stays it
        new[name] = (origin.flatten()[0] > Origin.OLD).expand(origin.shape) if uniform else origin > Origin.OLD
    return new
