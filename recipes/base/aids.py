"""How the entries of a grown model train: new ones and old ones alike, or each in its own way."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

import growlib
from base.setting import Training
from growlib import GrowthPlan, Origin, Rewarm


@dataclass(frozen=True)
class Aid:
    """A training after a growth; without options it is the plain one.

    Attributes:
        plan: of the growth.
        new, old: rates of entries, as of `growlib.EntryRates`.
        decays_new: whether weight decay reaches new entries.
        mup: whether a matrix whose inputs grew has a lower rate, as of `growlib.mup_groups`.
        frozen: whether what is old stays as it is, as of `growlib.freeze_old`.
    """

    plan: GrowthPlan
    new: float | Rewarm = 1.0
    old: float = 1.0
    decays_new: bool = True
    mup: bool = False
    frozen: bool = False

    def decided_by(self) -> Mapping[str, Any]:
        """What of it decides a result; the plan follows from the start."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name != "plan"}

    def prepare(
        self, model: PreTrainedModel, training: Training, learning_rate: float
    ) -> tuple[list[TrainerCallback], torch.optim.Optimizer | None]:
        """The Trainer's callbacks, and its optimizer where that is another one; freezes what is frozen."""
        callbacks: list[TrainerCallback] = []
        if (self.new, self.old) != (1.0, 1.0):
            callbacks.append(growlib.EntryRates(self.plan, new=self.new, old=self.old))
        if not self.decays_new:
            callbacks.append(NoDecayOfNew(self.plan))
        if self.frozen:
            growlib.freeze_old(model, self.plan)
        if not self.mup:
            return callbacks, None
        groups = growlib.mup_groups(model, self.plan, learning_rate, weight_decay=training.weight_decay)
        return callbacks, torch.optim.AdamW(groups, betas=(0.9, training.adam_beta2))


class NoDecayOfNew(TrainerCallback):
    """AdamW's step on an entry is p (1 - rate × decay) + something that does not depend on p: undone beforehand."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.origins = plan.new_parameters()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        names = {id(parameter): name for name, parameter in of_trainer["model"].named_parameters()}
        for group in of_trainer["optimizer"].param_groups:
            undone = 1 / (1 - group["lr"] * group["weight_decay"])
            for parameter in group["params"] if undone != 1 else ():
                is_new = self.origins[names[id(parameter)]].to(parameter.device) > Origin.OLD
                parameter.data = torch.where(is_new, parameter.data * undone, parameter.data)
