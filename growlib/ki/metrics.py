"""What Knowledge Inheritance reports at logging steps, kept on the device in between."""

import torch
from accelerate import Accelerator
from torch import Tensor

from growlib.ki.loss import at_least_float32


class KIMetrics:
    """Sums over the steps since the last report; nothing leaves the device before `drain`.

    Attributes:
        alpha: α of the last training step.
    """

    def __init__(self) -> None:
        self.alpha = 0.0
        self._sums: Tensor | None = None  # ce, kd, teacher_ce, positions, positions with a teacher_ce

    @torch.no_grad()
    def add(self, ce: Tensor, kd: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> None:
        """Add a micro-batch of N positions; `ce` and `kd` are sums over them, in nats."""
        teacher_ce, known = teacher_ce_sum(teacher_NV, labels_N)
        positions = torch.full_like(known, labels_N.numel())
        sums = torch.stack([ce.detach(), kd.detach(), teacher_ce, positions, known]).float()
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


def teacher_ce_sum(teacher_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's CE at τ = 1, summed over the labels that its vocabulary holds, and how many; scalars."""
    known = labels_N < teacher_NV.shape[-1]
    logits = at_least_float32(teacher_NV)
    label_logits = logits.gather(-1, labels_N.clamp(max=teacher_NV.shape[-1] - 1)[:, None])[:, 0]
    ce_N = logits.logsumexp(-1) - label_logits
    return (ce_N * known).sum(), known.sum().to(ce_N.dtype)
