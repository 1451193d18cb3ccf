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
def epilogue(
    logits,  # [n, V], what the head gives before scale and cap; becomes the gradient
    labels,  # [n], negative: no label
    alpha,  # [1]
    sums,  # [n, SUMS], written
    teacher,  # [n, V_t], dense: the teacher's logits before its scale and cap
    ids,  # [n, K], sparse, as all that follow
    listed,  # [n, K], log-weights
    constant,  # [n]
    silent,  # [n], where the targets are no numbers
    tail,  # [n], log-weight of all other tokens
    label_logprob,  # [n], the teacher's
    stride,
    teacher_stride,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    tau,
    V: tl.constexpr,
    V_T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    TAIL: tl.constexpr,  # the tail has a term: the softmax of the unlisted tokens is taken apart
    GATE: tl.constexpr,
    NUMBERS_ONLY: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,  # τ is not 1
    TOGETHER: tl.constexpr,  # one softmax serves both terms
    GRADIENT: tl.constexpr,
    MARK: tl.constexpr,  # a value that logits do not have: the token is listed
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    counts = label >= 0
    label_z = logits_of(tl.load(logits + tl.where(counts, label, 0)), scale, cap, CAPPED)
    k = tl.arange(0, K_BLOCK)
    if DENSE:
        teacher += row * teacher_stride
    else:
        ids_k = tl.load(ids + row * K + k, mask=k < K, other=0)
        z_k = logits_of(tl.load(logits + ids_k, mask=k < K, other=0.0), scale, cap, CAPPED)
        log_w_k = tl.load(listed + row * K + k, mask=k < K, other=float("-inf"))
        w_k = tl.exp(log_w_k)
        if TAIL:
            tl.debug_barrier()  # every thread has read what is overwritten now
            tl.store(logits + ids_k, tl.full((K_BLOCK,), MARK, tl.float32), mask=k < K)
            tl.debug_barrier()

    # The first reading: log Σ exp of the student at 1 and at τ, of the teacher at 1 and at τ, and the dense KL.
    high = float("-inf")
    total = 0.0
    high_tau = float("-inf")
    total_tau = 0.0
    high_t = float("-inf")
    total_t = 0.0
    high_t1 = float("-inf")
    total_t1 = 0.0
    apart = 0.0  # Σ exp(teacher - high_t) (teacher - student)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + column, mask=column < V, other=0.0)
        z = tl.where(column < V, logits_of(raw, scale, cap, CAPPED), float("-inf"))
        if TAIL:
            z = tl.where(raw.to(tl.float32) == MARK, float("-inf"), z)
        high, total = add_exps(high, total, z)
        z_tau = tl.where(column < V_T, z / tau, float("-inf"))
        if not TOGETHER:
            high_tau, total_tau = add_exps(high_tau, total_tau, z_tau)
        if DENSE:
            raw_t = tl.load(teacher + column, mask=column < V_T, other=0.0)
            z_t = tl.where(column < V_T, logits_of(raw_t, teacher_scale, teacher_cap, TEACHER_CAPPED), float("-inf"))
            if TEMPERED:
                high_t1, total_t1 = add_exps(high_t1, total_t1, z_t)
            z_t = z_t / tau
            before = high_t
            high_t, total_t = add_exps(high_t, total_t, z_t)
            p = tl.exp(z_t - finite(high_t))
            apart = apart * tl.exp(before - finite(high_t)) + tl.sum(tl.where(p == 0, 0.0, p * (z_t - z_tau)), 0)

    log_z = log_of(high, total)
    base = log_z  # of the tokens whose gradient the second reading writes
    if not TOGETHER:
        base = log_of(high_tau, total_tau)
    log_z_tau = base
    known = counts & (label < 0)
    teacher_ce = 0.0
    if DENSE:
        log_z_t = log_of(high_t, total_t)
        inside = counts & (label < V_T)
        label_t = logits_of(tl.load(teacher + tl.where(inside, label, 0)), teacher_scale, teacher_cap, TEACHER_CAPPED)
        log_z_t1 = log_z_t
        if TEMPERED:
            log_z_t1 = log_of(high_t1, total_t1)
        known = inside & (label_t - log_z_t1 > float("-inf"))
        teacher_ce = tl.where(known, log_z_t1 - label_t, 0.0)
        label_p = tl.where(inside, label_t / tau - log_z_t, float("-inf"))
        no_numbers = ~(tl.abs(log_z_t) < float("inf"))
        kl = tl.where(no_numbers, float("nan"), apart / total_t - log_z_t + log_z_tau)
        on_softmax = 1.0
        share = 1.0
    else:
        share = 1.0
        if TAIL:  # what was marked returns
            high_k = tl.max(tl.where(k < K, z_k, float("-inf")), 0)
            exp_k = tl.where(k < K, tl.exp(z_k - finite(high_k)), 0.0)
            log_z = log_add(log_z, log_of(high_k, tl.sum(exp_k, 0)))
            exp_k = tl.where(k < K, tl.exp((z_k - finite(high_k)) / tau), 0.0)
            log_z_tau = log_add(base, log_of(high_k / tau, tl.sum(exp_k, 0)))
        log_q_k = z_k / tau - log_z_tau
        kl = tl.load(constant + row) - tl.sum(weighed(w_k, log_q_k), 0)
        on_softmax = tl.sum(w_k, 0)
        if TAIL:
            t = tl.exp(tl.load(tail + row))
            kl -= weighed(t, base - log_z_tau)
            on_softmax = tl.exp(base - log_z_tau) - t
            share = tl.exp(base - log_z)  # where the softmax is one
            base = finite(base)
        no_numbers = tl.load(silent + row) != 0
        label_p = float("-inf")
        if GATE:
            label_p = tl.load(label_logprob + row)

    ce = tl.where(counts, log_z - label_z, 0.0)
    kd = tl.where(counts, kl * tau * tau, 0.0)
    taught = counts
    if NUMBERS_ONLY:
        taught = taught & ~no_numbers
    if GATE:
        taught = taught & (label_p > label_z / tau - log_z_tau)
    weight = tl.where(taught, tl.load(alpha), 0.0)
    loss = tl.where(weight == 1, 0.0, (1 - weight) * ce) + tl.where(weight == 0, 0.0, weight * kd)
    sums += row * SUMS
    tl.store(sums, tl.where(taught, kd - ce, 0.0))
    tl.store(sums + 1, loss)
    tl.store(sums + 2, ce)
    tl.store(sums + 3, kd)
    tl.store(sums + 4, teacher_ce)
    tl.store(sums + 5, tl.where(known, 1.0, 0.0))
    tl.store(sums + 6, tl.where(no_numbers, 1.0, 0.0))

    if GRADIENT:
        on_ce = tl.where(counts, 1 - weight, 0.0)
        on_kd = weight * tau
        hears = on_kd != 0
        on_kl = tl.where(hears, on_kd * on_softmax, 0.0)
        if TOGETHER:
            on_kl += on_ce * share
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            raw = tl.load(logits + column, mask=column < V, other=0.0)
            z = logits_of(raw, scale, cap, CAPPED)
            if TAIL:
                z = tl.where(raw.to(tl.float32) == MARK, float("-inf"), z)
            gradient = on_kl * tl.exp(z / tau - base)
            if not TOGETHER:
                gradient = tl.where(column < V_T, gradient, 0.0) + on_ce * tl.exp(z - log_z)
            if DENSE:
                raw_t = tl.load(teacher + column, mask=column < V_T, other=0.0)
                z_t = logits_of(raw_t, teacher_scale, teacher_cap, TEACHER_CAPPED) / tau
                of_teacher = tl.where(column < V_T, on_kd * tl.exp(z_t - log_z_t), 0.0)
                gradient -= tl.where(hears, of_teacher, 0.0)
            gradient = tl.where(column == label, gradient - on_ce, gradient) * slope_of(z, scale, cap, CAPPED)
            tl.store(logits + column, gradient, mask=column < V)
        if not DENSE:
            tl.debug_barrier()
            same_k = w_k  # the weight of all entries of the same token: draws may be equal
            if not TAIL:
                same_k = w_k * 0
                for j in range(0, K):
                    w = tl.exp(tl.load(listed + row * K + j))
                    same_k += tl.where(ids_k == tl.load(ids + row * K + j), w, 0.0)
            # The softmax has the weight of all K tokens, or with a tail of all outcomes, which is 1.
            sum_w = on_softmax
            if TAIL:
                sum_w = 1.0
            gradient = tl.where(hears, on_kd * (sum_w * tl.exp(log_q_k) - same_k), 0.0) + on_ce * tl.exp(z_k - log_z)
            gradient = tl.where(ids_k == label, gradient - on_ce, gradient) * slope_of(z_k, scale, cap, CAPPED)
            tl.store(logits + ids_k, gradient, mask=k < K)
