"""When the student has passed its teacher."""

from typing import Any

import torch
from transformers import Trainer, TrainerState

from growlib.errors import GrowError
from growlib.ki.guide import Cached, Guide, Online
from growlib.ki.linear import teacher_ce
from growlib.ki.targets import rows_of

CHUNK = 1024  # positions of logits at once


class StopWhenPassed:
    """Remembers the teacher's held-out loss, and reads from the training's log whether the teacher was left."""

    def __init__(self) -> None:
        self._loss: float | None = None
        self._state: TrainerState | None = None
        self._seen = 0  # entries of the log that were read
        self._stopped = False

    def check(self, guide: Guide) -> None:
        """Raise GrowError where a teacher's held-out loss cannot be known."""
        if isinstance(guide, Online) or (isinstance(guide, Cached) and guide.cache.header.held_out_ce is not None):
            return
        raise GrowError(
            'KIConfig(stop_at="auto")',
            "the teacher's held-out loss is not known: it is one of several, or a cache without it",
            "one online teacher, cache_teacher(..., held_out=...), or a share of training",
        )

    def stopped(self, state: TrainerState) -> bool:
        """Whether the teacher was left, in this training or before its checkpoint."""
        if state is not self._state:  # a new training; the log of a resumed one holds what was logged before
            self._state, self._seen, self._stopped = state, 0, False
        new = state.log_history[self._seen :]
        self._seen += len(new)
        self._stopped = self._stopped or any("ki/stopped" in log for log in new)
        return self._stopped

    @torch.no_grad()
    def teacher_loss(self, guide: Guide, trainer: Trainer, eval_dataset: Any) -> float:
        """The teacher's mean CE at τ = 1 on the held-out text, over all processes; computed once."""
        if self._loss is None and isinstance(guide, Cached):
            self._loss = guide.cache.header.held_out_ce
        if self._loss is None:
            assert isinstance(guide, Online)
            total = torch.zeros(2, device=trainer.args.device)
            for batch in trainer.get_eval_dataloader(eval_dataset):
                inputs = trainer._prepare_inputs(batch)
                source, labels = guide.whole(inputs)
                for start in range(0, len(labels), CHUNK):
                    rows = slice(start, start + CHUNK)
                    total += teacher_ce(rows_of(source, rows, 1.0, labels.device), labels[rows])
            ce, positions = trainer.accelerator.reduce(total, "sum").tolist()
            self._loss = ce / max(positions, 1.0)
        return self._loss
