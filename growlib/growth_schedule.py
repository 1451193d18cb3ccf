"""Growth inside a run: one training whose model gets larger at given steps."""

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from growlib.config import Target
from growlib.errors import GrowError
from growlib.growth import plan
from growlib.growth_plan import GrowthPlan
from growlib.moments import Policy
from growlib.operators import Method
from growlib.optimizer_state import Groups
from growlib.training import EntryRates, Rewarm
from growlib.training_checkpoint import expand_training_checkpoint

MakeTrainer = Callable[[PreTrainedModel], Trainer]


@dataclass(frozen=True)
class GrowthSchedule:
    """A training in which the model grows: Trainer runs one after another, each from the grown checkpoint of the last.

    At each step of `growths` the Trainer saves and stops, the checkpoint grows with all that it holds
    (`expand_training_checkpoint`), and a new Trainer goes on from there: at the same step, with the same learning rate
    schedule, with the data in the same order. A growth at a number of tokens is one at tokens // (tokens per step).

    Args:
        growths: optimizer step -> what the model grows into after it, as `target_config` of `expand`: a dict of
            overrides of the config that the model has then, a config, or a folder.
        method, seed, exact: as for `expand`.
        moments, groups: as for `expand_training_checkpoint`.
        rewarm: a second warm-up of the entries that a growth made new, until the next growth; its `start` is set to the
            step of the growth. None: all entries follow the schedule.

    Raises:
        GrowError: there is no growth, or one that is not after a step.
    """

    growths: Mapping[int, Target]
    method: str | Method = "lossless"
    moments: Policy = "dual"
    groups: Groups | None = None
    rewarm: Rewarm | None = None
    seed: int = 0
    exact: bool | None = None

    def __post_init__(self) -> None:
        if not self.growths or not all(type(step) is int and step > 0 for step in self.growths):
            wrong = "there is no growth, or its key is no step"
            raise GrowError(
                f"GrowthSchedule({dict(self.growths)!r})", wrong, 'such as {1000: {"num_hidden_layers": 24}}'
            )

    @property
    def steps(self) -> list[int]:
        """The steps of the growths, in their order."""
        return sorted(self.growths)

    def plans(self, model: PreTrainedModel) -> list[GrowthPlan]:
        """The plan of each growth, without weights. Raises GrowError for one that cannot be, or breaks `exact=True`."""
        made: list[GrowthPlan] = []
        for step in self.steps:
            with torch.device("meta"):
                source = type(model)(copy.deepcopy(made[-1].config if made else model.config))
            made.append(plan(source, self.growths[step], self.method, seed=self.seed))
            if self.exact and made[-1].reasons:
                asked, wrong = f"the growth at step {step} with exact=True", "; ".join(made[-1].reasons)
                raise GrowError(asked, wrong, "another target, or exact=None")
        return made

    def train(self, make_trainer: MakeTrainer, model: PreTrainedModel, *, resume: bool = False) -> Trainer:
        """Train a model from its first size to its last.

        Args:
            make_trainer: a Trainer of a model. It is called once for each size. The Trainers differ in the model alone:
                the same arguments, with `max_steps` (or epochs) of the whole training, and the same data.
            model: of the first size.
            resume: go on where an interrupted call was, at the last checkpoint in `output_dir`.

        Returns:
            The Trainer of the last size, after the training. What was grown after step N is in `output_dir/grown-N`,
            with its plan and its model card.

        Raises:
            GrowError: before the first step where a growth has no meaning or would not be reached, where `output_dir`
                holds another run, and for Trainers that this cannot stop and resume (FSDP1, DeepSpeed,
                load_best_model_at_end, save_only_model); later as `expand_training_checkpoint`.
        """
        plans = dict(zip(self.steps, self.plans(model), strict=True))
        model_class, trainer = type(model), make_trainer(model)
        out = Path(str(trainer.args.output_dir))
        self._check(trainer, out, resume)
        done = sum(_grown(out, step).is_dir() for step in self.steps)
        for begin, end in list(pairwise([0, *self.steps, None]))[done:]:
            assert begin is not None
            if begin:
                del trainer
                gc.collect()  # what holds the smaller model, before the larger one comes
                trainer = make_trainer(model_class.from_pretrained(_grown(out, begin)))
                if self.rewarm:
                    trainer.add_callback(EntryRates(_grown(out, begin), new=replace(self.rewarm, start=begin)))
            if end:
                trainer.add_callback(_StopAt(end))
            last = _last_step(out) if resume else 0
            if end is None or last < end:
                start = out / f"checkpoint-{last}" if last > begin else _grown(out, begin)
                trainer.train(resume_from_checkpoint=str(start) if last or begin else None)
            if end:
                self._grow(trainer, out, end, plans[end])
        return trainer

    def _check(self, trainer: Trainer, out: Path, resume: bool) -> None:
        """Raise GrowError for a Trainer that cannot be stopped at the steps of the growths and resumed."""
        args, asked = trainer.args, f"a training that grows at the steps {', '.join(map(str, self.steps))}"
        if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
            wrong = "the Trainer splits the model over processes in a way that growlib cannot read"
            raise GrowError(asked, wrong, "one process, DDP, or FSDP2 (fsdp_config version 2)")
        if args.load_best_model_at_end or args.save_only_model:
            wrong = "load_best_model_at_end and save_only_model leave no checkpoint to go on from"
            raise GrowError(asked, wrong, "TrainingArguments without them")
        if 0 < args.max_steps <= self.steps[-1]:
            raise GrowError(asked, f"it ends at step {args.max_steps}", f"steps below {args.max_steps}")
        if not resume and any(_grown(out, step).exists() for step in self.steps):
            raise GrowError(asked, f"{out} holds another run", "resume=True, or an output_dir of its own")

    def _grow(self, trainer: Trainer, out: Path, step: int, growth: GrowthPlan) -> None:
        """Grow the checkpoint of a step, once for all processes."""
        folder = out / f"checkpoint-{step}"
        if not folder.is_dir():
            wrong = f"the training ended at step {trainer.state.global_step}"
            raise GrowError(f"growing after step {step}", wrong, "a step that the training reaches")
        if trainer.is_world_process_zero():
            expand_training_checkpoint(folder, _grown(out, step), growth, moments=self.moments, groups=self.groups)
        trainer.accelerator.wait_for_everyone()


class _StopAt(TrainerCallback):
    """Saves a checkpoint at a step, and ends the training there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def _grown(out: Path, step: int) -> Path:
    return out / f"grown-{step}"


def _last_step(out: Path) -> int:
    """Of the checkpoints of the Trainer in a folder; 0 where there is none."""
    last = get_last_checkpoint(out) if out.is_dir() else None
    return int(last.rpartition("-")[2]) if last else 0
