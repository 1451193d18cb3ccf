"""What Knowledge Inheritance reports at logging steps, kept on the device in between."""

import torch
from accelerate import Accelerator
from torch import Tensor


class KIMetrics:
    """Sums over the steps since the last report; nothing leaves the device before `drain`.

    Attributes:
        alpha: α of the last training step.
    """

    def __init__(self) -> None:
        self.alpha = 0.0
        self._sums: Tensor | None = None  # ce, kd, teacher_ce, positions, positions with a teacher_ce

    @torch.no_grad()
    def add(self, ce: Tensor, kd: Tensor, teacher_ce: Tensor, known: Tensor, positions: int) -> None:
        """Add a micro-batch: sums over its positions, in nats; `known` says over how many `teacher_ce` is."""
        sums = torch.stack([ce.detach(), kd.detach(), teacher_ce, known.new_tensor(positions), known]).float()
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call; every process must call it at the same step."""
        logs = {"ki/alpha": self.alpha}
        if self._sums is not None:
            ce, kd, teacher_ce, positions, known = accelerator.reduce(self._sums, "sum").tolist()
            self._sums = None
            if positions:
                logs |= {"ki/ce": ce / positions, "ki/kd": kd / positions}
            if known:
                logs["ki/teacher_ce"] = teacher_ce / known
        return logs
