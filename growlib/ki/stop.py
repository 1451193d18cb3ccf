"""When the student has passed its teacher."""

import logging
import statistics
from typing import Any

import torch
from transformers import Trainer, TrainerState

from growlib.errors import GrowError
from growlib.ki.guide import Cached, Guide, Online
from growlib.ki.linear import teacher_ce
from growlib.ki.targets import rows_of

logger = logging.getLogger("growlib")

CHUNK = 1024  # positions of logits at once


class StopWhenPassed:
    """Remembers the teacher's held-out loss, and reads from the training's log whether the teacher was left."""

    def __init__(self) -> None:
        self._loss: float | None = None
        self._state: TrainerState | None = None
        self._seen = 0  # entries of the log that were read
        self._stopped = False

    def check(self, guide: Guide, trainer: Trainer) -> None:
        """Raise GrowError where a teacher's or the student's held-out loss cannot be known."""
        asked = 'KIConfig(stop_at="auto")'
        known = isinstance(guide, Cached) and guide.cache.header.held_out_ce is not None
        if not (known or isinstance(guide, Online)):
            raise GrowError(
                asked,
                "the teacher's held-out loss is not known: it is one of several, or a cache without it",
                "one online teacher, cache_teacher(..., held_out=...), or a share of training",
            )
        if trainer.eval_dataset is None:
            valid = "an eval_dataset, with eval_strategy in TrainingArguments; or a share of training"
            raise GrowError(asked, "the trainer has no held-out text on which to compare", valid)
        if trainer.args.eval_strategy == "no":
            logger.warning("%s: no eval_strategy, and the teacher stays until something else evaluates.", asked)

    def stopped(self, state: TrainerState) -> bool:
        """Whether the teacher was left, in this training or before its checkpoint."""
        if state is not self._state:  # a new training; the log of a resumed one holds what was logged before
            self._state, self._seen, self._stopped = state, 0, False
        new = state.log_history[self._seen :]
        self._seen += len(new)
        self._stopped = self._stopped or any("ki/stopped" in log for log in new)
        return self._stopped

    def compare(self, guide: Guide, trainer: Trainer, eval_dataset: Any, metrics: dict[str, float]) -> dict[str, float]:
        """What an evaluation adds to the log; empty where it was of something else than the held-out text.

        Several held-out sets count as the mean of their losses, for both.

        Args:
            eval_dataset: as in `Trainer.evaluate`.
            metrics: what that returned.
        """
        sets: Any = trainer.eval_dataset if eval_dataset is None else eval_dataset
        several = isinstance(sets, dict)
        names = [f"eval_{name}_loss" for name in sets] if several else ["eval_loss"]
        if not all(name in metrics for name in names):
            return {}
        student = statistics.fmean(metrics[name] for name in names)
        if self._loss is None and isinstance(guide, Cached):
            self._loss = guide.cache.header.held_out_ce
        if self._loss is None:
            assert isinstance(guide, Online)
            each = list(sets.values()) if several else [eval_dataset]
            self._loss = statistics.fmean(_teacher_loss(guide, trainer, one) for one in each)
        stopped = {"ki/stopped": float(trainer.state.global_step)} if student <= self._loss else {}
        return {"ki/teacher_held_out": self._loss, **stopped}


@torch.no_grad()
def _teacher_loss(guide: Online, trainer: Trainer, eval_dataset: Any) -> float:
    """The teacher's mean CE at τ = 1 over all processes; of a data set, None: the trainer's own."""
    total = torch.zeros(2, device=trainer.args.device)
    for batch in trainer.get_eval_dataloader(eval_dataset):
        inputs = trainer._prepare_inputs(batch)
        source, labels = guide.teacher.at_labels(inputs)
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            total += teacher_ce(rows_of(source, rows, 1.0, labels.device), labels[rows]).to(total.device)
    ce, positions = trainer.accelerator.reduce(total, "sum").tolist()
    return ce / max(positions, 1.0)
