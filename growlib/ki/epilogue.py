"""The Triton kernel behind `fused`: what follows the product with the head, in two readings of the logits.

One program has one position. It finds the softmaxes' normalisers online, CE and KL, and writes d loss / d logits over
the logits. Arithmetic is in float32. The mathematics is that of `linear`, whose PyTorch code is the test's twin.

Shapes: n positions of a chunk, V tokens, V_t of the teacher's that count, K tokens that sparse targets list.
"""

import triton
import triton.language as tl

SUMS = tl.constexpr(7)  # d loss / d α, loss, CE, KL, the teacher's CE, whether that is known, no numbers


@triton.jit
def logits_of(raw, scale, cap, CAPPED: tl.constexpr):
    """cap · tanh(scale · raw / cap), and the logits as they are without a cap."""
    z = raw.to(tl.float32) * scale
    if CAPPED:
        small = tl.exp(-2 * tl.abs(z / cap))
        bounded = cap * (1 - small) / (1 + small)
        z = tl.where(z < 0, -bounded, bounded)
    return z


@triton.jit
def slope_of(z, scale, cap, CAPPED: tl.constexpr):
    """d logits / d raw."""
    slope = scale
    if CAPPED:
        slope = scale * (1 - (z / cap) * (z / cap))
    return slope


@triton.jit
def finite(x):
    """The largest value seen so far, or 0 where it is -inf: what exponents may be taken from."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def add_exps(high, total, z):
    """One block more in (high, total), where Σ exp is total · exp(high)."""
    higher = tl.maximum(high, tl.max(z, 0))
    base = finite(higher)
    return higher, total * tl.exp(high - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def log_of(high, total):
    """log Σ exp, -inf for none."""
    return tl.where(total == 0, float("-inf"), finite(high) + tl.log(total))


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b))."""
    base = finite(tl.maximum(a, b))
    total = tl.exp(a - base) + tl.exp(b - base)
    return tl.where(total == 0, float("-inf"), base + tl.log(total))


@triton.jit
def weighed(weight, log):
    """weight · log, 0 where the weight is 0."""
    return tl.where(weight == 0, 0.0, weight * log)


@triton.jit
def read(logits, column, end, scale, cap, CAPPED: tl.constexpr, MARKED: tl.constexpr, MARK: tl.constexpr):
    """A block of a row, in float32; -inf from `end` on, and where the token is marked as listed."""
    raw = tl.load(logits + column, mask=column < end, other=0.0)
    z = tl.where(column < end, logits_of(raw, scale, cap, CAPPED), float("-inf"))
    if MARKED:
        z = tl.where(raw.to(tl.float32) == MARK, float("-inf"), z)
    return z


@triton.jit
def first_reading(
    logits, teacher, scale, cap, teacher_scale, teacher_cap, tau,
    V: tl.constexpr, V_T: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr, TAIL: tl.constexpr,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEMPERED: tl.constexpr, TOGETHER: tl.constexpr,
    MARK: tl.constexpr,
):  # fmt: skip
    """log Σ exp of the student at 1 and at τ, of the teacher at τ and at 1, and E_teacher[teacher - student] at τ."""
    high, total = float("-inf"), 0.0
    high_tau, total_tau = float("-inf"), 0.0
    high_t, total_t = float("-inf"), 0.0
    high_t1, total_t1 = float("-inf"), 0.0
    apart = 0.0  # of the teacher's exp(... - high_t)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = read(logits, column, V, scale, cap, CAPPED, TAIL, MARK)
        high, total = add_exps(high, total, z)
        z_tau = tl.where(column < V_T, z / tau, float("-inf"))
        if not TOGETHER:
            high_tau, total_tau = add_exps(high_tau, total_tau, z_tau)
        if DENSE:
            z_t = read(teacher, column, V_T, teacher_scale, teacher_cap, TEACHER_CAPPED, False, MARK)
            if TEMPERED:
                high_t1, total_t1 = add_exps(high_t1, total_t1, z_t)
            z_t = z_t / tau
            before = high_t
            high_t, total_t = add_exps(high_t, total_t, z_t)
            p = tl.exp(z_t - finite(high_t))
            apart = apart * tl.exp(before - finite(high_t)) + tl.sum(tl.where(p == 0, 0.0, p * (z_t - z_tau)), 0)
    if TOGETHER:
        high_tau, total_tau = high, total
    if not TEMPERED:
        high_t1, total_t1 = high_t, total_t
    log_z_t, log_z_t1 = log_of(high_t, total_t), log_of(high_t1, total_t1)
    return log_of(high, total), log_of(high_tau, total_tau), log_z_t, log_z_t1, apart / total_t


@triton.jit
def with_listed(log_z, z_k, k, K: tl.constexpr):
    """log Σ exp of what was marked, too."""
    z_k = tl.where(k < K, z_k, float("-inf"))
    high = tl.max(z_k, 0)
    return log_add(log_z, log_of(high, tl.sum(tl.exp(z_k - finite(high)), 0)))


@triton.jit
def write_gradient(
    logits, teacher, label, on_ce, on_kd, on_kl, log_z, base, log_z_t, scale, cap, teacher_scale, teacher_cap, tau,
    V: tl.constexpr, V_T: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr, TAIL: tl.constexpr,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TOGETHER: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """The second reading: on_kl exp(z / τ - base) - on_kd p_teacher + on_ce (p - 1 at the label)."""
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = read(logits, column, V, scale, cap, CAPPED, TAIL, MARK)
        gradient = on_kl * tl.exp(z / tau - base)
        if not TOGETHER:
            gradient = tl.where(column < V_T, gradient, 0.0) + on_ce * tl.exp(z - log_z)
        if DENSE:
            z_t = read(teacher, column, V_T, teacher_scale, teacher_cap, TEACHER_CAPPED, False, MARK)
            gradient -= tl.where(on_kd == 0, 0.0, on_kd * tl.exp(z_t / tau - log_z_t))
        gradient = tl.where(column == label, gradient - on_ce, gradient) * slope_of(z, scale, cap, CAPPED)
        tl.store(logits + column, gradient, mask=column < V)


@triton.jit
def write_listed(
    logits, label, ids, listed, ids_k, w_k, z_k, k, on_ce, on_kd, log_z, log_z_tau, scale, cap, tau,
    K: tl.constexpr, TAIL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The gradient at the K tokens, over what the second reading wrote there."""
    of_teacher, all_w = w_k, 1.0
    if not TAIL:  # draws may be equal: all entries of one token get the same, the gradient by their sum
        all_w = tl.sum(w_k, 0)
        of_teacher = w_k * 0
        for j in range(0, K):
            of_teacher += tl.where(ids_k == tl.load(ids + j), tl.exp(tl.load(listed + j)), 0.0)
    gradient = weighed(on_kd, all_w * tl.exp(z_k / tau - log_z_tau) - of_teacher) + on_ce * tl.exp(z_k - log_z)
    gradient = tl.where(ids_k == label, gradient - on_ce, gradient) * slope_of(z_k, scale, cap, CAPPED)
    tl.store(logits + ids_k, gradient, mask=k < K)


@triton.jit
def weigh(sums, alpha, counts, taught, ce, kl, teacher_ce, known, no_numbers, tau):
    """Write a position's sums; the weights of the gradients of CE and of KL, the latter's by logits / τ."""
    ce = tl.where(counts, ce, 0.0)
    kd = tl.where(counts, kl * tau * tau, 0.0)
    weight = tl.where(taught, tl.load(alpha), 0.0)
    tl.store(sums, tl.where(taught, kd - ce, 0.0))
    # A term without weight is left out, NaN included.
    tl.store(sums + 1, tl.where(weight == 1, 0.0, (1 - weight) * ce) + tl.where(weight == 0, 0.0, weight * kd))
    tl.store(sums + 2, ce)
    tl.store(sums + 3, kd)
    tl.store(sums + 4, tl.where(known, teacher_ce, 0.0))
    tl.store(sums + 5, tl.where(known, 1.0, 0.0))
    tl.store(sums + 6, tl.where(no_numbers, 1.0, 0.0))
    return tl.where(counts, 1 - weight, 0.0), weight * tau


@triton.jit
def dense_epilogue(
    logits,  # [n, V], what the head gives before scale and cap; becomes the gradient
    labels,  # [n], negative: no label
    alpha,  # [1]
    sums,  # [n, SUMS], written
    teacher,  # [n, V_t], its logits before its scale and cap
    stride, teacher_stride, scale, cap, teacher_scale, teacher_cap, tau,
    V: tl.constexpr, V_T: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, NUMBERS_ONLY: tl.constexpr,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEMPERED: tl.constexpr, TOGETHER: tl.constexpr,
    GRADIENT: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """One position of a chunk. TEMPERED: τ is not 1. TOGETHER: one softmax serves both terms."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    counts = label >= 0
    inside = counts & (label < V_T)
    label_z = logits_of(tl.load(logits + tl.maximum(label, 0)), scale, cap, CAPPED)
    label_t = logits_of(tl.load(teacher + tl.where(inside, label, 0)), teacher_scale, teacher_cap, TEACHER_CAPPED)
    log_z, log_z_tau, log_z_t, log_z_t1, apart = first_reading(
        logits, teacher, scale, cap, teacher_scale, teacher_cap, tau,
        V, V_T, BLOCK, True, False, CAPPED, TEACHER_CAPPED, TEMPERED, TOGETHER, MARK,
    )  # fmt: skip
    known = inside & (label_t - log_z_t1 > float("-inf"))
    no_numbers = ~(tl.abs(log_z_t) < float("inf"))
    kl = tl.where(no_numbers, float("nan"), apart - log_z_t + log_z_tau)
    taught = counts
    if NUMBERS_ONLY:
        taught = taught & ~no_numbers
    if GATE:
        taught = taught & inside & (label_t / tau - log_z_t > label_z / tau - log_z_tau)
    sums += row * SUMS
    on_ce, on_kd = weigh(sums, alpha, counts, taught, log_z - label_z, kl, log_z_t1 - label_t, known, no_numbers, tau)
    if GRADIENT:
        on_kl = on_kd
        if TOGETHER:
            on_kl += on_ce
        tl.debug_barrier()
        write_gradient(
            logits, teacher, label, on_ce, on_kd, on_kl, log_z, log_z_tau, log_z_t, scale, cap, teacher_scale,
            teacher_cap, tau, V, V_T, BLOCK, True, False, CAPPED, TEACHER_CAPPED, TOGETHER, MARK,
        )  # fmt: skip


@triton.jit
def sparse_kl(z_k, w_k, k, log_z, base, constant, tail, tau, K: tl.constexpr, TAIL: tl.constexpr):
    """The KL; log Σ exp at 1 and at τ of all tokens; the KL's and the CE's slopes on exp(z / τ - base)."""
    log_z_tau, share = base, 1.0
    if TAIL:  # what was marked returns
        log_z, log_z_tau = with_listed(log_z, z_k, k, K), with_listed(base, z_k / tau, k, K)
        share = tl.exp(base - log_z)  # where one softmax serves both terms
    kl = constant - tl.sum(weighed(w_k, z_k / tau - log_z_tau), 0)
    slope = tl.sum(w_k, 0)
    if TAIL:  # a token of the tail has exp(base - log_z_tau) exp(z / τ - base) of the student, t of it of the teacher
        t = tl.exp(tl.load(tail))
        kl -= weighed(t, base - log_z_tau)
        slope = tl.exp(base - log_z_tau) - t
    return kl, log_z, log_z_tau, slope, share


@triton.jit
def sparse_epilogue(
    logits, labels, alpha, sums,  # as in `dense_epilogue`
    ids, listed, constant, silent,  # [n, K], log-weights [n, K], [n], [n] where they are no numbers
    tail, label_logprob,  # [n], log-weight of all other tokens; [n], the teacher's, with a gate
    stride, scale, cap, tau,
    V: tl.constexpr, V_T: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    TAIL: tl.constexpr, GATE: tl.constexpr, NUMBERS_ONLY: tl.constexpr, CAPPED: tl.constexpr, TOGETHER: tl.constexpr,
    GRADIENT: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """One position of a chunk. TAIL: the tail has a term, and the softmax of unlisted tokens is taken apart."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ids += row * K
    listed += row * K
    label = tl.load(labels + row)
    counts = label >= 0
    label_z = logits_of(tl.load(logits + tl.maximum(label, 0)), scale, cap, CAPPED)
    k = tl.arange(0, K_BLOCK)
    ids_k = tl.load(ids + k, mask=k < K, other=0)
    z_k = logits_of(tl.load(logits + ids_k, mask=k < K, other=0.0), scale, cap, CAPPED)
    w_k = tl.exp(tl.load(listed + k, mask=k < K, other=float("-inf")))
    if TAIL:
        tl.debug_barrier()  # every thread has read what is overwritten now
        tl.store(logits + ids_k, tl.full((K_BLOCK,), MARK, tl.float32), mask=k < K)
        tl.debug_barrier()
    log_z, base, _, _, _ = first_reading(
        logits, logits, scale, cap, scale, cap, tau, V, V_T, BLOCK, False, TAIL, CAPPED, False, False, TOGETHER, MARK
    )
    constant = tl.load(constant + row)
    kl, log_z, log_z_tau, slope, share = sparse_kl(z_k, w_k, k, log_z, base, constant, tail + row, tau, K, TAIL)
    no_numbers = tl.load(silent + row) != 0
    taught = counts
    if NUMBERS_ONLY:
        taught = taught & ~no_numbers
    if GATE:
        taught = taught & (tl.load(label_logprob + row) > label_z / tau - log_z_tau)
    sums += row * SUMS
    on_ce, on_kd = weigh(sums, alpha, counts, taught, log_z - label_z, kl, 0.0, label < label, no_numbers, tau)
    if GRADIENT:
        on_kl = weighed(on_kd, slope)
        if TOGETHER:
            on_kl += on_ce * share
        tl.debug_barrier()
        write_gradient(
            logits, logits, label, on_ce, on_kd, on_kl, log_z, finite(base), 0.0, scale, cap, scale, cap, tau,
            V, V_T, BLOCK, False, TAIL, CAPPED, False, TOGETHER, MARK,
        )  # fmt: skip
        tl.debug_barrier()
        write_listed(
            logits, label, ids, listed, ids_k, w_k, z_k, k, on_ce, on_kd, log_z, log_z_tau, scale, cap, tau,
            K, TAIL, CAPPED,
        )  # fmt: skip
