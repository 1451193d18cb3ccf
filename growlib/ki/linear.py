"""The KI loss from hidden states: CE and KL in one pass over the head, never an N x V tensor.

With sparse targets at τ = 1 the two terms together are a linear cross-entropy with K + 1 weighted targets: the same
three products with the head as CE alone.

Shapes: N positions (n in a chunk), H hidden size, V tokens (v in this process), K tokens that sparse targets list.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from growlib.errors import GrowError
from growlib.ki import fused
from growlib.ki.columns import Columns
from growlib.ki.loss import NO_LABEL, KILoss, check_request, targets_for
from growlib.ki.predictions import Predictions, as_predictions, check_positions
from growlib.ki.projection import Projection
from growlib.ki.targets import Targets
from growlib.ki.treatments import product

CHUNK_BYTES = 1 << 27  # of float32 logits at once


def linear_ki_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Tensor | Predictions,
    *,
    alpha: float | Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    gate: bool = False,
    chunk: int | None = None,
    recompute: bool = False,
) -> KILoss:
    """`ki_loss` of the logits softcap(logit_scale (hidden weightᵀ + bias)), without these logits as a whole.

    Args:
        hidden: [..., H], the states that the head reads, aligned with `labels`.
        weight: [V, H]. A DTensor is gathered; its gradient is then the same in every process. Where processes have
            different data, pass `weight.full_tensor(grad_placements=[Partial()])`, whose gradient is the sum. Of a
            vocabulary-parallel head, pass `hidden` as a replicated DTensor of the same mesh: each process then computes
            its own tokens' logits, and `bias` is split as the weight is.
        teacher: as in `ki_loss`; a Projection's hidden states may be of another size.
        logit_scale, softcap: what the model does to its logits; see `Projection`.
        chunk: positions at once; None: as many as `CHUNK_BYTES` of logits hold, on CUDA as `fused.chunk_size` says.
        recompute: compute the gradients in the backward pass, with one more product with the head; False: in the
            forward pass, which keeps the head's gradient in float32.
        alpha, temperature, ignore_index, num_items, gate: as in `ki_loss`, also what is refused.

    Returns:
        KILoss(loss, ce, kd). Gradients flow from `loss`, to hidden, weight, bias and alpha; `ce` and `kd` are detached.
    """
    labels = check_request(labels, alpha, temperature, num_items)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    check_positions(len(hidden), "hidden states", len(labels))
    if chunk is not None and chunk < 1:
        raise GrowError(f"linear_ki_loss(chunk={chunk})", "it is below 1", "1 or more, or None")
    if softcap is not None and not softcap > 0:
        raise GrowError(f"linear_ki_loss(softcap={softcap})", "it is not positive", "above 0, or None")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        asked = f"hidden states of width {hidden.shape[1]} with a head {tuple(weight.shape)}"
        raise GrowError(asked, "the sizes do not match", f"a weight [vocabulary, {hidden.shape[1]}]")
    counted = labels != ignore_index
    number = counted.sum().clamp(min=1) if num_items is None else num_items
    if torch.compiler.is_compiling():  # their number cannot be a size of the graph: the others stay, without weight
        rows: slice | Tensor = slice(None)
        labels_N = labels.masked_fill(~counted, NO_LABEL)
    else:
        rows, labels_N = counted, labels[counted]
    student = Projection(hidden, weight, bias, logit_scale, softcap).rows(rows)
    predictions = as_predictions(teacher, len(labels)).rows(rows)
    sums = linear_ki_sums(student, labels_N, predictions, alpha, temperature, gate, chunk, recompute)
    return KILoss(*(total / number for total in sums[:3]))


class KISums(NamedTuple):
    """Sums over positions: `KILoss`, the teacher's own CE at τ = 1 and over how many positions that is known.

    `no_numbers` is how many positions have targets that are no numbers.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    teacher_ce: Tensor
    known: Tensor
    no_numbers: Tensor


def linear_ki_sums(
    student: Projection,
    labels: Tensor,
    teacher: Predictions,
    alpha: float | Tensor,
    temperature: float,
    gate: bool = False,
    chunk: int | None = None,
    recompute: bool = False,
    numbers_only: bool = False,
) -> KISums:
    """`linear_ki_loss` as sums over the N positions whose label, [N], is not `NO_LABEL`.

    With `numbers_only`, α is 0 at positions where the teacher says no numbers; otherwise the loss is NaN, too.
    """
    device = student.hidden.device.type
    if torch.is_autocast_enabled(device) and student.hidden.dtype != torch.float64:  # which autocast leaves alone
        student = student.cast(torch.get_autocast_dtype(device))
    usual = fused.chunk_size(student, teacher) if fused.usable(student) else chunk_size(student.vocab)
    chunk = chunk or usual
    settings = _Settings(
        student.scale, student.softcap, student.part, temperature, gate, chunk, recompute, numbers_only
    )
    exact = torch.promote_types(student.hidden.dtype, torch.float32)
    alpha = student.hidden.new_zeros((), dtype=exact) + (alpha.to(exact) if isinstance(alpha, Tensor) else alpha)
    with torch.autocast(device, enabled=False):
        sums = _LinearKILoss.apply(student.hidden, student.weight, student.bias, alpha, labels, teacher, settings)
    return KISums(*sums)


def chunk_size(vocab: int) -> int:
    """How many positions' logits are computed at once."""
    return max(CHUNK_BYTES // (4 * vocab), 16)


class _Settings(NamedTuple):
    scale: float
    softcap: float | None
    part: Columns | None
    temperature: float
    gate: bool
    chunk: int
    recompute: bool
    numbers_only: bool


class _LinearKILoss(torch.autograd.Function):
    """`KISums`, with the gradient of the first."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor,
        labels: Tensor,
        teacher: Predictions,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        student = Projection(hidden, weight, bias, *settings[:3])
        now = ctx.needs_input_grad[:3] if not settings.recompute else (False, False, False)
        sums, gradients = _run(student, alpha, labels, teacher, settings, now)
        difference, *results = sums
        ctx.recompute, ctx.settings, ctx.teacher = settings.recompute, settings, teacher
        if settings.recompute:
            ctx.save_for_backward(difference, hidden, weight, bias, alpha, labels)
        else:
            ctx.save_for_backward(difference, *gradients)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        difference, *saved = ctx.saved_tensors
        if ctx.recompute:
            hidden, weight, bias, alpha, labels = saved
            student = Projection(hidden, weight, bias, *ctx.settings[:3])
            with torch.autocast(hidden.device.type, enabled=False):
                _, saved = _run(student, alpha, labels, ctx.teacher, ctx.settings, ctx.needs_input_grad[:3])
        gradients = [None if gradient is None else gradient * upstream[0].to(gradient.dtype) for gradient in saved]
        return (*gradients, difference * upstream[0], None, None, None)


@torch.no_grad()
def _run(
    student: Projection,
    alpha: Tensor,
    labels: Tensor,
    teacher: Predictions,
    settings: _Settings,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums [d loss / d α, *KISums], and the gradients of (hidden, weight, bias) that are wanted."""
    hidden, weight, bias = student.hidden, student.weight, student.bias
    of_chunks = fused.FusedChunks if fused.usable(student) else PlainChunks
    chunks: fused.Chunks = of_chunks(
        student, alpha, labels, teacher, settings.temperature, settings.gate, settings.numbers_only
    )
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=alpha.dtype) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=alpha.dtype) if wanted[2] and bias is not None else None
    for start in range(0, len(labels), settings.chunk):
        rows = slice(start, start + settings.chunk)
        gradient = chunks.gradient(rows, any(wanted))
        if gradient is None:
            continue
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=d_bias.dtype)
        gradient = gradient.to(weight.dtype)
        if d_hidden is not None:
            torch.mm(gradient, weight, out=d_hidden[rows])
        if d_weight is not None:
            if d_weight.dtype == gradient.dtype:
                d_weight.addmm_(gradient.T, hidden[rows])
            else:
                d_weight += gradient.T @ hidden[rows]
    return chunks.sums, [d_hidden, None if d_weight is None else d_weight.to(weight.dtype), d_bias]


class PlainChunks:
    """A `fused.Chunks` in PyTorch, for every device and dtype."""

    def __init__(
        self,
        student: Projection,
        alpha: Tensor,
        labels: Tensor,
        teacher: Predictions,
        temperature: float,
        gate: bool,
        numbers_only: bool,
    ) -> None:
        self.student, self.alpha, self.labels, self.teacher = student, alpha, labels, teacher
        self.temperature, self.gate, self.numbers_only = temperature, gate, numbers_only
        self.sums = alpha.new_zeros(7)
        if student.part is not None:  # no process may look up a label out of bounds, which is PyTorch's error else
            alpha.expand(student.vocab).gather(0, labels.masked_fill(labels == NO_LABEL, 0))

    def gradient(self, rows: slice, wanted: bool) -> Tensor | None:
        student, labels = self.student, self.labels[rows]
        logits = student.rows(rows).own_logits()
        slope = None if student.softcap is None else 1 - (logits / student.softcap).square()
        targets = targets_for(self.teacher.rows(rows), self.temperature, student.vocab, logits)
        no_numbers = targets.no_numbers
        self.sums[4:6] += teacher_ce(targets, labels)
        self.sums[6] += no_numbers.sum()
        heard = ~no_numbers if self.numbers_only else None
        parts, gradient = _chunk_loss(logits, student.columns, labels, targets, self.alpha, self.gate, heard, wanted)
        self.sums[:4] += parts
        if gradient is None:
            return None
        if slope is not None:
            gradient *= slope
        if student.scale != 1.0:
            gradient *= student.scale
        return gradient


def _chunk_loss(
    logits: Tensor,
    columns: Columns,
    labels: Tensor,
    targets: Targets,
    alpha: Tensor,
    gate: bool,
    heard: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums [d loss / d α, loss, ce, kd] of n positions, and d loss / d logits, in the logits' own memory.

    The logits are those of `columns`, [n, v]. `heard`, [n], is where the teacher has a weight; None: everywhere.
    """
    counts = labels != NO_LABEL
    at_label = labels.masked_fill(~counts, 0)[:, None]
    label_logits = columns.at(logits, at_label)[:, 0]
    together = targets.temperature == 1.0 and targets.vocab == columns.vocab  # one softmax serves both terms
    scaled = logits if together else columns.first(logits, targets.vocab) / targets.temperature
    kl = _kl(scaled, columns, targets)
    log_z = kl.log_z if together else columns.logsumexp(logits)
    ce = torch.where(counts, log_z - label_logits, 0)
    kd = torch.where(counts, kl.value * targets.temperature**2, 0)
    taught = counts if heard is None else counts & heard
    if gate:
        taught = taught & (targets.label_logprobs(labels) > label_logits / targets.temperature - kl.log_z)
    weight = alpha * taught
    # A term without weight is left out, NaN included, as in `mix`.
    loss = torch.where(weight == 1, 0, (1 - weight) * ce) + torch.where(weight == 0, 0, weight * kd)
    sums = torch.stack([torch.where(taught, kd - ce, 0).sum(), loss.sum(), ce.sum(), kd.sum()])
    if not with_gradient:
        return sums, None
    on_ce, on_kd = ((1 - weight) * counts)[:, None], (weight * targets.temperature)[:, None]
    silent = on_kd == 0
    gradient = logits.sub_((kl.base if together else log_z)[:, None]).exp_()
    if not together:
        of_kl = _kl_gradient(scaled, columns, targets, kl).mul_(on_kd).masked_fill_(silent, 0)
        columns.first(gradient.mul_(on_ce), targets.vocab).add_(of_kl)
    elif targets.ids is None:
        gradient.mul_(on_ce + on_kd).addcmul_(kl.added.masked_fill_(silent, 0), -on_kd)
    else:
        slope, added = ((on_kd * part).masked_fill(silent, 0) for part in (kl.slope, kl.added))
        if kl.listed is not None:  # the listed tokens were taken out of the softmax
            added = added + on_ce * kl.listed
        columns.add(gradient.mul_(on_ce * kl.share + slope), targets.ids, added)
    return sums, columns.add(gradient, at_label, -on_ce)


def teacher_ce(targets: Targets, labels: Tensor) -> Tensor:
    """The teacher's CE at τ = 1 and the number of labels that its vocabulary holds, summed, [2]; 0 where sparse."""
    if targets.ids is not None:
        return labels.new_zeros(2, dtype=targets.logprobs.dtype)
    logprobs = targets.at(1.0).label_logprobs(labels)
    known = logprobs > -torch.inf
    return torch.stack([-torch.where(known, logprobs, 0.0).sum(), known.sum().to(logprobs.dtype)])


class _KL(NamedTuple):
    """The KL of n positions, and its gradient in parts: slope · exp(logits - base) + what is added at the listed ids.

    Where the tail has a term, only the logits of unlisted tokens are left, and `base` is their log Σ exp.
    """

    value: Tensor  # [n], without τ²
    log_z: Tensor  # [n], log Σ exp of the student's logits / τ
    base: Tensor  # [n]
    share: Tensor  # [n, 1], exp(base - log_z)
    slope: Tensor  # [n, 1]
    added: Tensor  # [n, K]; of dense targets [n, v], and what is taken away
    listed: Tensor | None  # [n, K], the student's probabilities; where the tail has a term


def _kl(logits: Tensor, columns: Columns, targets: Targets) -> _KL:
    """Changes the logits: where the tail has a term, those of listed tokens become -inf."""
    one = logits.new_ones((len(logits), 1))
    if targets.ids is None:
        logprobs = columns.own(targets.logprobs)
        log_z, p = columns.logsumexp(logits), logprobs.exp()
        # p · (log p - z) with 0 · -inf = 0, for a teacher that excludes tokens and for a student that does
        log_ratio = logprobs.sub(logits).masked_fill_(p == 0, 0.0)
        return _KL(log_z + columns.sum(torch.linalg.vecdot(p, log_ratio)), log_z, log_z, one, one, p, None)
    terms = targets.kl_terms
    w = terms.listed.exp()
    listed = columns.at(logits, targets.ids)
    if terms.tail is None:
        log_z = columns.logsumexp(logits)
        value = terms.constant - product(w, listed - log_z[:, None]).sum(1)
        return _KL(value, log_z, log_z, one, w.sum(1, keepdim=True), -w, None)
    tail = columns.logsumexp(columns.exclude(logits, targets.ids))
    log_z = torch.logaddexp(tail, listed.logsumexp(1))
    q, q_tail, t = (listed - log_z[:, None]).exp(), (tail - log_z).exp(), terms.tail.exp()
    value = terms.constant - product(w, listed - log_z[:, None]).sum(1) - product(t, tail - log_z)
    base = tail.masked_fill(tail == -torch.inf, 0.0)
    # A token of the tail has q_tail exp(logit - tail) of the student, t of it of the teacher.
    return _KL(value, log_z, base, q_tail[:, None], (q_tail - t)[:, None], q - w, q)


def _kl_gradient(logits: Tensor, columns: Columns, targets: Targets, kl: _KL) -> Tensor:
    """d KL / d (logits / τ), [n, targets.vocab or its part], of the logits that `_kl` has read."""
    gradient = (logits - kl.base[:, None]).exp()
    if targets.ids is None:
        return gradient.sub_(kl.added)
    return columns.add(gradient.mul_(kl.slope), targets.ids, kl.added)
