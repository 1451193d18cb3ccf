"""The teacher-guided loss of Knowledge Inheritance (Qin et al. 2021, arXiv 2105.13880, Eq. 1 and 2).

    L = (1 - α) CE + α τ² KL(P_teacher(τ) ‖ P_student(τ)),    P(τ) = softmax(logits / τ)

Shapes: N positions, V tokens, K tokens that sparse targets list.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.targets import Targets, check_temperature, product, rows_of

NO_LABEL = -(1 << 62)  # of a position without weight; any other negative label is out of bounds


class KILoss(NamedTuple):
    """The loss and its two parts before the weighting, scalars in nats per position; `kd` holds the τ²."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def ki_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher: Tensor | Targets,
    *,
    alpha: float | Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    gate: bool = False,
) -> KILoss:
    """Mix the cross-entropy with the forward KL from the teacher (arXiv 2105.13880, Eq. 1 and 2).

    Both terms run over the positions whose label is not `ignore_index` and share one denominator. They are
    computed in log space, in float32 (float64 for float64 logits).

    Args:
        student_logits: [..., V]. Aligned with `labels`: a causal model's labels are shifted by the caller.
        labels: [...], token ids.
        teacher: the teacher's logits, [..., V_teacher], or Targets of all positions of `labels`, in their order;
            no gradient reaches them. Where the teacher's vocabulary differs from V (two paddings of one tokenizer)
            the KL is taken over the common first tokens, both sides renormalised there, and the CE over the
            student's V.
        alpha: weight of the KL, in [0, 1]; a tensor has no dimensions.
        temperature: τ > 0.
        num_items: the denominator; None: the number of labels that count in this call, which makes both terms
            means.
        gate: take α as 0 at positions where the teacher gives the label no more probability than the student, both
            at τ and over the common tokens.

    Returns:
        KILoss(loss, ce, kd); `ce` and `kd` are over all positions, gated or not. Without any label that counts,
        all three are 0 and so are the gradients.

    Raises:
        GrowError: a value is out of range; or the targets are sparse, and not of this temperature or of too large a
            vocabulary.
    """
    labels_N = check_request(labels, alpha, temperature, num_items)
    counted = labels_N != ignore_index
    labels_N, student_NV = labels_N[counted], student_logits.reshape(-1, student_logits.shape[-1])
    check_positions(student_NV, "the student's logits", labels.numel())
    student_NV = at_least_float32(student_NV[counted])
    source = as_source(teacher, counted, labels.numel())
    targets = rows_of(source, slice(None), temperature, student_NV.device).over(student_NV.shape[-1])
    targets = targets.to(student_NV.device, student_NV.dtype)
    denominator = max(labels_N.numel(), 1) if num_items is None else num_items
    ce_N = F.cross_entropy(student_NV, labels_N, reduction="none", ignore_index=NO_LABEL)
    kd_N = kl_per_position(student_NV, targets)
    ce, kd = ce_N.sum() / denominator, kd_N.sum() / denominator
    if not gate:
        return KILoss(mix(ce, kd, alpha), ce, kd)
    mine = replace(targets, logprobs=_log_q(student_NV.detach(), targets), ids=None, draws=0)
    listens_N = targets.label_logprobs(labels_N) > mine.label_logprobs(labels_N)
    return KILoss(mix(ce_N, torch.where(listens_N, kd_N, ce_N), alpha).sum() / denominator, ce, kd)


def check_request(labels: Tensor, alpha: float | Tensor, temperature: float, num_items: int | Tensor | None) -> Tensor:
    """The labels as int64 [N]; raises GrowError for what no KI loss takes. The values of tensors are not looked at."""
    for name, value in (("alpha", alpha), ("num_items", num_items)):
        if isinstance(value, Tensor) and value.ndim:
            raise GrowError(f"a KI loss with {name} of shape {list(value.shape)}", "one is for all", "no dimensions")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise GrowError(f"a KI loss with labels of {labels.dtype}", "they are no token ids", "integers")
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise GrowError(f"a KI loss with alpha={alpha}", "it is no weight", "0 to 1")
    if not (num_items is None or isinstance(num_items, Tensor) or num_items > 0):
        raise GrowError(f"a KI loss with num_items={num_items}", "nothing can be divided by it", "1 or more")
    check_temperature("a KI loss", temperature)
    return labels.reshape(-1).long()


def check_positions(rows: Tensor | Targets, whose: str, positions: int) -> None:
    """Raise GrowError where there are not as many rows as labels."""
    if len(rows) != positions:
        raise GrowError(f"{whose} at {len(rows)} positions", f"there are {positions} labels", "one label per position")


def as_source(teacher: Any, rows: Tensor | slice, positions: int) -> Tensor | Targets:
    """Some rows of a teacher's logits or targets at so many positions.

    Raises:
        GrowError: the number of positions is not that of the labels.
    """
    if not isinstance(teacher, Tensor | Targets):
        valid = "logits or Targets; hidden states and a head (Projection) in linear_ki_loss"
        raise GrowError(f"a teacher that is a {type(teacher).__name__}", "it says nothing here", valid)
    source = teacher.reshape(-1, teacher.shape[-1]) if isinstance(teacher, Tensor) else teacher
    check_positions(source, "targets", positions)
    return source[rows].detach()


def _log_q(student_NV: Tensor, targets: Targets) -> Tensor:
    """The student's log-probabilities where the teacher's are: over the same token ids, at the same τ."""
    return F.log_softmax(student_NV[:, : targets.vocab] / targets.temperature, dim=-1)


def kl_per_position(student_NV: Tensor, targets: Targets) -> Tensor:
    """τ² KL(P_teacher(τ) ‖ P_student(τ)) at each position, [N], as the targets' treatment defines it."""
    log_q = _log_q(student_NV, targets)
    squared = targets.temperature**2
    if targets.ids is None:
        return squared * product(targets.logprobs.exp(), targets.logprobs - log_q).sum(-1)
    listed = log_q.gather(1, targets.ids)
    log_w, constant = listed_weights(targets)
    kd = constant - product(log_w.exp(), listed).sum(1)
    if targets.treatment == "bucket":
        assert targets.tail is not None
        log_q_tail = log_q.scatter(1, targets.ids, -torch.inf).logsumexp(1)
        kd = kd - product(targets.tail.exp(), log_q_tail)
    return squared * kd


def listed_weights(targets: Targets) -> tuple[Tensor, Tensor]:
    """Log-weights [N, K] of the tokens that sparse targets list, and the KL's part that no student changes, [N]."""
    log_w = targets.logprobs
    if targets.treatment == "sampled":
        assert targets.entropy is not None
        return log_w, -targets.entropy
    if targets.treatment == "renorm_teacher":
        log_w = log_w.log_softmax(-1)
    constant = product(log_w.exp(), log_w).sum(1)
    if targets.treatment == "bucket":
        assert targets.tail is not None
        constant = constant + product(targets.tail.exp(), targets.tail)
    return log_w, constant


def mix(ce: Tensor, kd: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - α) CE + α KD; a float α of 0 or 1 leaves the other term out, NaN and inf included."""
    if isinstance(alpha, Tensor) or 0 < alpha < 1:
        return (1 - alpha) * ce + alpha * kd
    return kd if alpha == 1 else ce


def at_least_float32(logits: Tensor) -> Tensor:
    """Upcast half precision, keep float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
