"""One training step's loss: from the hidden states before the student's head, or from its whole logits.

Shapes: N positions whose label counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.guide import Part
from growlib.ki.hidden import Reach, stand_in
from growlib.ki.linear import linear_ki_sums, teacher_ce
from growlib.ki.loss import at_least_float32, kl_per_position, mix

CHUNK = 1024  # positions of held-out logits at once
Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # CE, KL, the teacher's CE, and over how many positions the last is known


@dataclass(frozen=True)
class Step:
    """What the two forms of the loss share.

    Attributes:
        parts: what is known about the positions.
        labels: [N].
        counted: [batch · length], which positions they are.
        alpha: α.
        ki: the settings.
    """

    parts: list[Part]
    labels: Tensor
    counted: Tensor
    alpha: float
    ki: KIConfig


def linear_step(
    step: Step, found: Reach, model: nn.Module, inputs: dict[str, Any], weight: float | Tensor
) -> tuple[Tensor, Sums]:
    """The loss and `KIMetrics`' sums, computed where the student's head stands and instead of it.

    The computation runs inside the model's forward pass, where FSDP has gathered the head, and the loss leaves it as
    the gradient of its logits, so that DDP and FSDP see the graph that they prepare for.

    Args:
        inputs: the batch without labels.
        weight: of one position in the loss.
    """
    losses: list[Tensor] = []
    sums: list[Tensor] = []

    @torch.compiler.disable  # a compiled model ends before its head, and nothing here is traced anew at each step
    def at_head(hidden: Tensor) -> Tensor:
        student = found.projection(hidden).rows(step.counted)
        for part in step.parts:
            rows = slice(None) if part.rows is None else part.rows
            of_part = linear_ki_sums(
                student.rows(rows), step.labels[rows], part.predictions, step.alpha, step.ki.temperature, step.ki.gate
            )
            losses.append(of_part.loss)
            known = torch.stack(of_part[3:]) if part.teacher_ce is None else part.teacher_ce
            sums.append(torch.stack([of_part.ce, of_part.kd, *known]))
        loss = torch.stack(losses).sum() * weight
        losses[:] = [loss.detach()]
        # Logits of one token that is 0 everywhere, and whose first element has the loss's gradient.
        return (loss - loss.detach()).expand(*hidden.shape[:-1], 1)

    with found.replaced(at_head):
        outputs = model(**inputs)
    _refuse_auxiliary_loss(outputs)
    if not losses:
        raise GrowError("Knowledge Inheritance", "the student did not use its head", "a head that stays the same")
    first = outputs["logits"].reshape(-1)[0]
    ce, kd, teacher, known = torch.stack(sums).sum(0)
    # Beside 0, a soft-cap has slope 1.
    return losses[0] + (first - first.detach()) / found.scale, (ce, kd, teacher, known)


@torch.no_grad()
def held_out_ce(found: Reach, model: nn.Module, inputs: dict[str, Any], labels: Tensor, counted: Tensor) -> Tensor:
    """The student's CE at its counted positions, [N]; `labels`, `counted`: [batch · length]."""
    ce: list[Tensor] = []

    @torch.compiler.disable
    def at_head(hidden: Tensor) -> Tensor:
        student, wanted = found.projection(hidden).rows(counted), labels[counted]
        for start in range(0, len(wanted), CHUNK):
            rows = slice(start, start + CHUNK)
            ce.append(F.cross_entropy(student.rows(rows).logits(), wanted[rows], reduction="none"))
        return stand_in(hidden)

    with found.replaced(at_head):
        model(**inputs)
    return torch.cat([labels.new_zeros(0, dtype=torch.float32), *ce])


def plain_step(step: Step, ce: Tensor, outputs: Any, weight: float | Tensor) -> tuple[Tensor, Sums]:
    """The loss and `KIMetrics`' sums from the trainer's own loss and the student's logits.

    Raises:
        GrowError: there are no logits, or the loss has parts that no weight should touch.
    """
    if step.ki.gate:
        raise GrowError(
            "KIConfig(gate=True)",
            "the loss of this student cannot be taken apart into positions",
            "a model with its plain loss and a head that growlib reaches (the log says why not), or gate=False",
        )
    logits = logits_of(outputs, step.counted)
    _refuse_auxiliary_loss(outputs)
    if not logits.requires_grad:
        raise GrowError(
            "Knowledge Inheritance",
            "the student's logits carry no gradient: the trainer behind the mixin computes its loss without them",
            "loss_is_plain = True in the class that mixes them, where that loss is the plain cross-entropy",
        )
    student = at_least_float32(logits[step.counted.to(logits.device)])
    kd = ce.new_zeros((), dtype=student.dtype)
    known = student.new_zeros(2)
    for part in step.parts:
        rows = slice(None) if part.rows is None else part.rows
        targets = part.predictions.targets(step.ki.temperature, logits.device).over(student.shape[-1])
        kd = kd + kl_per_position(student[rows], targets).sum()
        known = known + (teacher_ce(targets, step.labels[rows]) if part.teacher_ce is None else part.teacher_ce)
    # The mean over no position is NaN; its gradient is 0, as the KL's.
    ce_sum = ce / weight if step.labels.numel() else torch.zeros_like(ce)
    return mix(ce, kd * weight, step.alpha), (ce_sum, kd, known[0], known[1])


def logits_of(outputs: Any, labels: Tensor) -> Tensor:
    """The student's logits, [batch · length, V], one row per label, of which there are [batch · length].

    Raises:
        GrowError: there are none, or not so many.
    """
    if not isinstance(outputs, dict) or outputs.get("logits") is None:
        raise GrowError(
            "Knowledge Inheritance",
            "the student returned no logits beside its loss",
            "return_dict=True and a loss that keeps the logits (no fused, chunked or Liger loss)",
        )
    logits = outputs["logits"].flatten(0, -2)
    if len(logits) != len(labels):
        raise GrowError(
            "Knowledge Inheritance",
            f"the student's logits are at {len(logits)} positions and the labels at {len(labels)}",
            "logits aligned with the labels: no virtual tokens in front (prompt tuning), LoRA for instance",
        )
    return logits


def _refuse_auxiliary_loss(outputs: Any) -> None:
    for name, value in outputs.items():
        if name.endswith(("aux_loss", "z_loss")) and value is not None:
            raise GrowError(
                "Knowledge Inheritance",
                f"the student adds an auxiliary loss ({name}), which the weight 1 - α would switch off",
                "output_router_logits=False",
            )
