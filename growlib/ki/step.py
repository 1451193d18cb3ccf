"""One training step's loss, from the hidden states before the student's head or from its whole logits, and its log.

Shapes: B batch, L length, V tokens, N positions that count.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.guard import Guard
from growlib.ki.head_access import HeadAccess, stand_in
from growlib.ki.linear import linear_ki_sums, teacher_ce
from growlib.ki.loss import at_least_float32, kl_per_position, mix
from growlib.ki.providers import CHUNK, Part, listen
from growlib.ki.tasks import Positions, Task, logits_in

logger = logging.getLogger("growlib")

ASKED = "Knowledge Inheritance"
ECHO = 1e-3  # nats per position: a teacher so close to its student has nothing to teach it
# CE, KL, the teacher's CE, over how many positions the last is known, and the auxiliary loss of a mixture of experts
Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class KIMetrics:
    """What is logged: sums over the steps since the last report. Nothing leaves the device before `drain`.

    Attributes:
        alpha: α of the last training step.
    """

    def __init__(self) -> None:
        self.alpha = 0.0
        self._sums: Tensor | None = None  # ce, kd, teacher_ce, positions, positions with a teacher_ce, auxiliary, steps
        self._first: Tensor | None = None  # the same of the first micro-batch
        self._told = False

    @torch.no_grad()
    def add(
        self, ce: Tensor, kd: Tensor, teacher_ce: Tensor, known: Tensor, auxiliary: Tensor | None, positions: int
    ) -> None:
        """Add a micro-batch: sums over its positions, in nats; `teacher_ce` is over `known` of them."""
        count, (aux, has_aux) = known.new_tensor(positions), _value_and_count(auxiliary, known)
        sums = torch.stack([ce.detach(), kd.detach(), teacher_ce, count, known, aux, has_aux]).float()
        self._first = sums if self._first is None else self._first
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call; every process must call it at the same step."""
        logs = {"ki/alpha": self.alpha}
        if self._sums is not None:
            ce, kd, teacher_ce, positions, known, aux, has_aux = accelerator.reduce(self._sums, "sum").tolist()
            self._sums = None
            if positions:
                logs |= {"ki/ce": ce / positions, "ki/kd": kd / positions}
            if known:
                logs["ki/teacher_ce"] = teacher_ce / known
            if has_aux:
                logs["ki/aux"] = aux / has_aux
        if accelerator.is_main_process:
            self._tell_of_an_echo()
        return logs

    def _tell_of_an_echo(self) -> None:
        """Say once if the teacher's first words were the student's own."""
        if self._told or self._first is None:
            return
        self._told = True
        _, kd, _, positions, *_ = self._first.tolist()
        if positions and kd / positions < ECHO:
            logger.warning(
                "This teacher adds nothing: in the first batch it predicts what the student predicts (KL %.1e nats per"
                " position), as the source of an exact growth does. A better model of the same tokenizer teaches more.",
                kd / positions,
            )


def _value_and_count(value: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """A value that may not be there, and how often it is."""
    zero = torch.zeros_like(like)
    return (zero, zero) if value is None else (value.detach().to(like), torch.ones_like(like))


@dataclass(frozen=True)
class Step:
    """What both forms of the loss need: the teacher's parts, the batch's positions, α, the settings and the guard.

    `auxiliary` is what an auxiliary loss has been multiplied by, and `scale` what the trainer's own loss has been.
    """

    parts: list[Part]
    positions: Positions
    alpha: float
    ki: KIConfig
    guard: Guard
    auxiliary: float | None = None
    scale: int = 1


def linear_step(
    step: Step, access: HeadAccess, model: nn.Module, inputs: dict[str, Any], weight: float | Tensor
) -> tuple[Tensor, Sums]:
    """The loss and `KIMetrics`' sums, computed in place of the student's head on a batch without labels.

    The computation runs inside the model's forward pass, where FSDP has gathered the head. It returns logits that are 0
    and have the loss's gradient, so that DDP and FSDP see the graph that they prepare for. `weight` is of one position.
    """
    labels = step.positions.labels
    losses: list[Tensor] = []
    sums: list[Tensor] = []

    @torch.compiler.disable  # a compiled model ends before its head, and this is not traced again at each step
    def at_head(hidden: Tensor) -> Tensor:
        student = access.projection(hidden).rows(step.positions.flat)
        for part in step.parts:
            rows = slice(None) if part.rows is None else part.rows
            settings = (step.alpha, step.ki.temperature, step.ki.gate)
            of_part = linear_ki_sums(student.rows(rows), labels[rows], part.predictions, *settings, numbers_only=True)
            listen(step.guard, part.teacher, of_part.no_numbers)
            losses.append(of_part.loss)
            known = torch.stack(of_part[3:5]) if part.teacher_ce is None else part.teacher_ce
            sums.append(torch.stack([of_part.ce, of_part.kd, *known]))
        loss = torch.stack(losses).sum() * weight
        losses[:] = [loss.detach()]
        # Logits of one token that is 0 everywhere, and whose first element has the loss's gradient.
        return (loss - loss.detach()).expand(*hidden.shape[:-1], 1)

    with access.replaced(at_head):
        outputs = model(**inputs)
    auxiliary = _auxiliary_loss(outputs, step)
    if not losses:
        raise GrowError(ASKED, "the student no longer uses its head", "the head of the first step")
    first = outputs["logits"].reshape(-1)[0]
    ce, kd, teacher, known = torch.stack(sums).sum(0)
    # At 0, a soft-cap has slope 1.
    loss = losses[0] + (first - first.detach()) / access.scale
    if auxiliary is not None:
        loss = loss + step.scale * auxiliary.to(loss.device)
    return loss, (ce, kd, teacher, known, auxiliary)


@torch.no_grad()
def held_out_ce(access: HeadAccess, model: nn.Module, inputs: dict[str, Any], positions: Positions) -> Tensor:
    """The student's CE at the positions that count, [N]."""
    ce: list[Tensor] = []

    @torch.compiler.disable
    def at_head(hidden: Tensor) -> Tensor:
        student = access.projection(hidden).rows(positions.flat)
        for start in range(0, positions.count, CHUNK):
            rows = slice(start, start + CHUNK)
            ce.append(F.cross_entropy(student.rows(rows).logits(), positions.labels[rows], reduction="none"))
        return stand_in(hidden)

    with access.replaced(at_head):
        model(**inputs)
    return torch.cat([positions.labels.new_zeros(0, dtype=torch.float32), *ce])


def plain_step(
    step: Step, ce: Tensor, outputs: Any, weight: float | Tensor, task: Task, behind_is_plain: Callable[[], bool]
) -> tuple[Tensor, Sums]:
    """The loss and `KIMetrics`' sums from the trainer's own loss and the student's logits.

    `behind_is_plain` measures whether the loss of the trainer behind the mixin is the plain cross-entropy.
    """
    if step.ki.gate:
        valid = "a model whose loss is the plain cross-entropy, with access to its head (the log says what is missing)"
        raise GrowError("KIConfig(gate=True)", "the loss of this student is not known position by position", valid)
    logits = logits_of(outputs, step.positions, task)
    auxiliary = _auxiliary_loss(outputs, step)
    if not logits.requires_grad:
        raise _no_gradient(behind_is_plain())
    labels = step.positions.labels
    student = at_least_float32(logits[step.positions.flat.to(logits.device)])
    kd = ce.new_zeros((), dtype=student.dtype)
    known = student.new_zeros(2)
    for part in step.parts:
        rows = slice(None) if part.rows is None else part.rows
        targets = part.predictions.targets(step.ki.temperature, logits.device).over(student.shape[-1])
        no_numbers = targets.no_numbers
        listen(step.guard, part.teacher, no_numbers.any())
        kd_n = torch.where(no_numbers, 0, kl_per_position(student[rows], targets.without(no_numbers)))
        shares = step.positions.shares
        kd = kd + (kd_n if shares is None else kd_n * shares[rows]).sum()
        known = known + (teacher_ce(targets, labels[rows]) if part.teacher_ce is None else part.teacher_ce)
    # The mean over no position is NaN; its gradient is 0, as the KL's.
    if auxiliary is None:
        loss = mix(ce, kd * weight, step.alpha)
    else:  # α weighs the cross-entropy alone
        added = step.scale * auxiliary.to(ce.device)
        ce = ce - added
        loss = mix(ce, kd * weight, step.alpha) + added
    ce_sum = ce / weight if step.positions.count else torch.zeros_like(ce)
    return loss, (ce_sum, kd, known[0], known[1], auxiliary)


def _no_gradient(behind_is_plain: bool) -> GrowError:
    """What to raise where the trainer's loss gives no logits that a teacher could teach."""
    wrong = "the student's logits carry no gradient: the trainer behind the mixin computes its loss without them"
    if behind_is_plain:
        return GrowError(ASKED, wrong, "loss_is_plain = True in your class: it is the plain cross-entropy here")
    wrong += ", and it is not the plain cross-entropy"
    valid = "a loss that is (no loss_type='dft', label smoothing or compute_loss_func), or one that returns its logits"
    return GrowError(ASKED, wrong, valid)


def logits_of(outputs: Any, positions: Positions, task: Task) -> Tensor:
    """The student's logits, [B · L, V]; raises GrowError where there is not one row per label."""
    whole = logits_in(outputs, task)
    if whole is None:
        valid = "return_dict=True and a loss that keeps the logits (no fused, chunked or Liger loss)"
        raise GrowError(ASKED, "the student returned no logits beside its loss", valid)
    logits, count = whole.flatten(0, -2), positions.mask.numel()
    if len(logits) != count:
        wrong = f"the student's logits are at {len(logits)} positions and the labels at {count}"
        raise GrowError(ASKED, wrong, "logits aligned with the labels: no virtual tokens in front (prompt tuning)")
    return logits


def _auxiliary_loss(outputs: Any, step: Step) -> Tensor | None:
    """What the student adds to its cross-entropy; raises GrowError where the first batch did not show its weight."""
    for name, value in outputs.items():
        if name.endswith(("aux_loss", "z_loss")) and value is not None:
            if name == "aux_loss" and step.auxiliary is not None:
                return step.auxiliary * value
            wrong = f"the student adds an auxiliary loss ({name}), and its config does not tell the weight that it has"
            raise GrowError(ASKED, wrong, "output_router_logits=False")
    return None
