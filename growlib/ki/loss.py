"""The teacher-guided loss of Knowledge Inheritance (Qin et al. 2021, arXiv 2105.13880, Eq. 1 and 2).

    L = (1 - α) CE + α τ² KL(P_teacher(τ) ‖ P_student(τ)),    P(τ) = softmax(logits / τ)

Shapes: N positions, V tokens, K tokens that sparse targets list.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.predictions import Predictions, as_predictions, check_positions
from growlib.ki.targets import Targets, check_temperature
from growlib.ki.treatments import product

NO_LABEL = -(1 << 62)  # of a position without weight; any other negative label is out of bounds


class KILoss(NamedTuple):
    """The loss and its two parts before the weighting, scalars in nats per position; `kd` holds the τ²."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def ki_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher: Tensor | Predictions,
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
        teacher: the teacher's logits, [..., V_teacher], or Targets or a Projection of all positions of `labels`, in
            their order; no gradient reaches them. Where the teacher's vocabulary differs from V (two paddings of one
            tokenizer) the KL is taken over the common first tokens, both sides renormalised there, and the CE over the
            student's V.
        alpha: weight of the KL, in [0, 1]; a tensor has no dimensions.
        temperature: τ > 0.
        num_items: the denominator; None: the number of labels that count, which makes both terms means.
        gate: α is 0 at positions where the teacher gives the label no more probability than the student, both at τ and
            over the common tokens.

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
    check_positions(len(student_NV), "the student's logits", labels.numel())
    student_NV = at_least_float32(student_NV[counted])
    with torch.no_grad():
        predictions = as_predictions(teacher, labels.numel()).rows(counted)
        targets = targets_for(predictions, temperature, student_NV.shape[-1], student_NV)
    denominator = max(labels_N.numel(), 1) if num_items is None else num_items
    ce_N = F.cross_entropy(student_NV, labels_N, reduction="none", ignore_index=NO_LABEL)
    kd_N = kl_per_position(student_NV, targets)
    ce, kd = ce_N.sum() / denominator, kd_N.sum() / denominator
    if not gate:
        return KILoss(mix(ce, kd, alpha), ce, kd)
    student = Targets(_log_q(student_NV.detach(), targets), targets.vocab)
    taught_N = targets.label_logprobs(labels_N) > student.label_logprobs(labels_N)
    return KILoss(mix(ce_N, torch.where(taught_N, kd_N, ce_N), alpha).sum() / denominator, ce, kd)


def check_request(labels: Tensor, alpha: float | Tensor, temperature: float, num_items: int | Tensor | None) -> Tensor:
    """The labels as int64 [N]; raises GrowError for what no KI loss takes. The values of tensors are not checked."""
    for name, value in (("alpha", alpha), ("num_items", num_items)):
        if isinstance(value, Tensor) and value.ndim:
            raise GrowError(f"a KI loss with {name} of shape {list(value.shape)}", "it is one number", "no dimensions")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise GrowError(f"a KI loss with labels of {labels.dtype}", "they are not token ids", "integers")
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise GrowError(f"a KI loss with alpha={alpha}", "it is out of range", "0 to 1")
    if not (num_items is None or isinstance(num_items, Tensor) or num_items > 0):
        raise GrowError(f"a KI loss with num_items={num_items}", "it is not positive", "1 or more")
    check_temperature("a KI loss", temperature)
    return labels.reshape(-1).long()


def targets_for(teacher: Predictions, temperature: float, vocab: int, like: Tensor) -> Targets:
    """The teacher's targets for a student of V = `vocab`, on the device and in the dtype of its logits."""
    return teacher.targets(temperature, like.device).over(vocab).to(like.device, like.dtype)


def _log_q(student_NV: Tensor, targets: Targets) -> Tensor:
    """The student's log-probabilities over the teacher's token ids, at the same τ."""
    return F.log_softmax(student_NV[:, : targets.vocab] / targets.temperature, dim=-1)


def kl_per_position(student_NV: Tensor, targets: Targets) -> Tensor:
    """τ² KL(P_teacher(τ) ‖ P_student(τ)) at each position, [N], by the targets' treatment."""
    log_q = _log_q(student_NV, targets)
    squared = targets.temperature**2
    if targets.ids is None:
        return squared * product(targets.logprobs.exp(), targets.logprobs - log_q).sum(-1)
    listed = log_q.gather(1, targets.ids)
    terms = targets.kl_terms
    kd = terms.constant - product(terms.listed.exp(), listed).sum(1)
    if terms.tail is not None:
        log_q_tail = log_q.scatter(1, targets.ids, -torch.inf).logsumexp(1)
        kd = kd - product(terms.tail.exp(), log_q_tail)
    return squared * kd


def mix(ce: Tensor, kd: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - α) CE + α KD; a float α of 0 or 1 leaves the other term out, NaN and inf included."""
    if isinstance(alpha, Tensor) or 0 < alpha < 1:
        return (1 - alpha) * ce + alpha * kd
    return kd if alpha == 1 else ce


def at_least_float32(logits: Tensor) -> Tensor:
    """Upcast half precision, keep float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
