"""The teacher-guided loss of Knowledge Inheritance (Qin et al. 2021, arXiv 2105.13880, Eq. 1 and 2).

    L = (1 - α) CE + α τ² KL(P_teacher(τ) ‖ P_student(τ)),    P(τ) = softmax(logits / τ)

Shapes: N positions, V tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class KILoss(NamedTuple):
    """The loss and its two parts before the weighting, scalars in nats per position; `kd` holds the τ²."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def ki_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    alpha: float | Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
) -> KILoss:
    """Mix the cross-entropy with the forward KL from the teacher (arXiv 2105.13880, Eq. 1 and 2).

    Both terms run over the positions whose label is not `ignore_index` and share one denominator. They are
    computed in log space, in float32 (float64 for float64 logits).

    Args:
        student_logits: [..., V]. Aligned with `labels`: a causal model's labels are shifted by the caller.
        labels: [...], token ids.
        teacher: the teacher's logits, [..., V_teacher]; no gradient reaches them. Where V_teacher differs
            from V (two paddings of one tokenizer) the KL is taken over the first min(V, V_teacher) tokens,
            both sides renormalised there, and the CE over the student's V.
        alpha: weight of the KL, in [0, 1]; a tensor has no dimensions.
        temperature: τ > 0.
        num_items: the denominator; None: the number of labels that count in this call, which makes both terms
            means.

    Returns:
        KILoss(loss, ce, kd). Without any label that counts, all three are 0 and so are the gradients.
    """
    counted = labels.reshape(-1) != ignore_index
    labels_N = labels.reshape(-1)[counted]
    student_NV = student_logits.reshape(-1, student_logits.shape[-1])[counted]
    teacher_NV = teacher.reshape(-1, teacher.shape[-1])[counted]
    denominator = max(labels_N.numel(), 1) if num_items is None else num_items
    ce = F.cross_entropy(at_least_float32(student_NV), labels_N, reduction="sum") / denominator
    kd = kl_sum(student_NV, teacher_NV, temperature) / denominator
    return KILoss(mix(ce, kd, alpha), ce, kd)


def kl_sum(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """τ² KL(P_teacher(τ) ‖ P_student(τ)), summed over the N positions and the tokens that both sides have."""
    common = min(student_NV.shape[-1], teacher_NV.shape[-1])
    log_student, log_teacher = (
        F.log_softmax(at_least_float32(logits[:, :common]) / temperature, dim=-1)
        for logits in (student_NV, teacher_NV.detach())
    )
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def mix(ce: Tensor, kd: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - α) CE + α KD; a float α of 0 or 1 leaves the other term out, NaN and inf included."""
    if isinstance(alpha, Tensor) or 0 < alpha < 1:
        return (1 - alpha) * ce + alpha * kd
    return kd if alpha == 1 else ce


def at_least_float32(logits: Tensor) -> Tensor:
    """Upcast half precision, keep float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
