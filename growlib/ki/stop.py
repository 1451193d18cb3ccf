"""`stop_at="auto"`: the teacher leaves once the student's held-out loss is no higher than its own, but for rounding."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState

from growlib.errors import GrowError
from growlib.ki.providers import HeldOut, TeacherProvider
from growlib.ki.tasks import Positions

logger = logging.getLogger("growlib")
ASKED = 'KIConfig(stop_at="auto")'
ALIKE = 1e-3  # nats: a student that grew exactly from its teacher has the same loss, but for rounding


class StopWhenPassed:
    """Remembers the teacher's held-out loss, and reads from the training's log whether the teacher has left."""

    def __init__(self) -> None:
        self.measures = False
        self._loss: float | None = None  # the teacher's
        self._sums = torch.zeros(3)  # the student's CE, the teacher's, and over how many positions
        self._state: TrainerState | None = None
        self._seen = 0  # entries of the log that were read
        self._stopped = False

    def check(self, provider: TeacherProvider, trainer: Trainer) -> None:
        """Raise GrowError where a teacher's or the student's held-out loss cannot be known."""
        if provider.held_out is None:
            wrong = "the teacher's held-out loss is not known: it is one of several, or a cache without it"
            raise GrowError(ASKED, wrong, "one online teacher, cache_teacher(..., held_out=...), or a number")
        if trainer.eval_dataset is None:
            valid = "an eval_dataset, with eval_strategy in TrainingArguments; or a number"
            raise GrowError(ASKED, "the trainer has no held-out text on which to compare", valid)
        if trainer.args.eval_strategy == "no":
            logger.warning("%s: no eval_strategy, and the teacher stays until something else evaluates.", ASKED)

    def stopped(self, state: TrainerState) -> bool:
        """Whether the teacher has left, in this training or before its checkpoint."""
        if state is not self._state:  # a new training; a resumed one has the log of what it resumes
            self._state, self._seen, self._stopped, self._loss = state, 0, False, None
        new = state.log_history[self._seen :]
        self._seen += len(new)
        self._stopped = self._stopped or any("ki/stopped" in log for log in new)
        return self._stopped

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While this lasts the held-out text is evaluated."""
        self.measures, self._sums = True, torch.zeros(3)
        try:
            yield
        finally:
            self.measures = False

    @torch.no_grad()
    def add(self, held_out: HeldOut, batch: dict[str, Any], positions: Positions, student_ce: Tensor) -> None:
        """Add a batch and the student's CE at its N positions.

        The teacher runs in the first evaluation only. Labels that it does not know are left out, for both.
        """
        of_teacher = student_ce.new_zeros(())
        if held_out.ce_of is None:
            self._loss = held_out.ce
        elif self._loss is None:
            of_teacher = held_out.ce_of(batch, positions)
        known = positions.labels < held_out.vocab
        self._sums += torch.stack([student_ce[known].sum(), of_teacher, known.sum()]).cpu()

    def compare(self, trainer: Trainer) -> dict[str, float]:
        """What the evaluation adds to the log: both mean CE over all processes, and whether the teacher leaves."""
        sums = trainer.accelerator.reduce(self._sums.to(trainer.args.device), "sum")
        student, teacher, positions = sums.tolist()
        if positions == 0:
            raise GrowError(ASKED, "the held-out text has no label that counts", "an eval_dataset with labels")
        if self._loss is None:
            self._loss = teacher / positions
        losses = {"ki/student_held_out": student / positions, "ki/teacher_held_out": self._loss}
        passed = student / positions <= self._loss + ALIKE
        return {**losses, "ki/stopped": float(trainer.state.global_step)} if passed else losses
