"""copies: function-preserving growth by copies of what is there, at any size that the architecture allows.

Legend: an axis grows from n to N, q = N // n whole copies, r = N - q n entries left over, s = q n / N.

    RMSNorm, pre-norm     write [x, .., x, 0_r] / sqrt(s),       norm weight sqrt(s) g:  mean square, eps stay
    LayerNorm, pre-norm   write [x, .., x, mean(x)_r] / sqrt(s), norm weight sqrt(s) g:  mean, variance, eps stay
    LayerNorm, post-norm  write [x, .., x], q whole copies only
    elementwise           whole copies of units, each read with weight 1/m plus noise that cancels over the copies
    heads                 whole copies inside the group of their KV head
    head_dim              new key rows zero, queries times sqrt(N / n); rotary pair i moves to pair i N / n
    experts               whole copies, of which as many more act; readers as for units, each with weight 1
    tied head             the norm before it times sqrt(s) / q

After LayerNorm and RMSNorm the r entries left over are zero, so what reads them is free. `lossless` takes these rules
where no fresh part is exact.

Source: the mean padding is LEMON's (Wang et al. 2023, arXiv 2310.07999); rescaling the writers instead of eps,
the rotary rule and the tied head are growlib's own. The identity blocks are LLaMA-Pro's (arXiv 2401.02415).
"""

from dataclasses import replace

import numpy as np

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap, LayerMap, after_each, copy_numbers, split_evenly, tile


def lookup(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """Old ids stay where they are; rows of new ids are near the mean row."""
    source = np.arange(new[name])
    source[old[name] :] = -1
    read = (source >= 0).astype(float)
    return AxisMap(old[name], source, read, new_reads="free", spread=0.1)


def residual(name: str, axis: Axis, old: Sizes, new: Sizes, copies: int = 0) -> AxisMap:
    """q whole copies, or fewer; the rest is zero under RMSNorm and the mean under LayerNorm."""
    n, N = old[name], new[name]
    q = copies or N // n
    s = q * n / N
    source = tile(n, N)
    source[q * n :] = -1
    return AxisMap(
        n,
        source,
        split_evenly(n, source),
        write=s**-0.5,
        gain=s**0.5,
        tied_gain=s**0.5 / q,
        new_writes="zero" if axis.role == "rms_norm" else "mean",
        new_reads="free",
    )


def unscaled(name: str, axis: Axis, old: Sizes, new: Sizes, copies: int = 0) -> AxisMap:
    """The residual stream where no norm weight stands before the readers: they take the scale back themselves."""
    axis_map = residual(name, axis, old, new, copies)
    read = axis_map.read / axis_map.write
    return replace(axis_map, read=read, gain=1.0, tied_gain=1.0)


def post_norm_residual(name: str, axis: Axis, old: Sizes, new: Sizes, copies: int = 0) -> AxisMap:
    """q whole copies; a rest that is not empty can only come close (it holds the mean of the norm's bias)."""
    n, N = old[name], new[name]
    q = copies or N // n
    s = q * n / N
    source = tile(n, N)
    source[q * n :] = -1
    inexact = (
        f"{axis.size} {n} -> {N} is not a whole multiple, and a LayerNorm after the residual sum "
        f"preserves only whole copies; {n * q} and {n * (q + 1)} are exact, here the rest is the mean"
    )
    return AxisMap(
        n,
        source,
        split_evenly(n, source),
        gain=s**0.5,
        tied_gain=1 / q,
        new_writes="mean",
        new_shift="mean",
        new_scale="zero",
        inexact=inexact if N % n else "",
    )


def units(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """Copies of whole units; readers share them."""
    source = tile(old[name], new[name])
    return AxisMap(old[name], source, split_evenly(old[name], source))


def experts(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """q whole copies of all experts, of which q times as many act: their weights are shares of what one had."""
    n, N, k, K = old[name], new[name], old[axis.per_token], new[axis.per_token]
    source = tile(n, N)
    read = split_evenly(n, source) if axis.role == "gated_experts" else np.ones(N)
    inexact = (
        f"{n} experts of which {k} act -> {N} of which {K} act: exact are whole multiples, "
        f"such as {2 * n} of which {2 * k} act"
    )
    return AxisMap(n, source, read, inexact=inexact if N % n or K * n != k * N else "")


def append(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """New entries that nothing reads yet."""
    source = np.arange(new[name])
    source[old[name] :] = -1
    return AxisMap(old[name], source, (source >= 0).astype(float))


def query_heads(name: str, axis: Axis, old: Sizes, new: Sizes, groups: np.ndarray | None = None) -> AxisMap:
    """Copies of whole heads, each in a group whose KV head is a copy of its own; `groups`: the source of KV heads."""
    n, N = old[name], new[name]
    k, K = (old[axis.groups], new[axis.groups]) if axis.groups else (n, N)
    per_group, new_per_group = n // k, N // K
    groups = tile(k, K) if groups is None else groups
    # The groups of one KV head deal out its query heads in turn.
    group, slot = np.divmod(np.arange(N), new_per_group)
    source = groups[group] * per_group + (copy_numbers(groups)[group] * new_per_group + slot) % per_group
    lost = sorted(set(range(n)) - set(source.tolist()))
    needed = k * -(-per_group // new_per_group)
    inexact = (
        f"{N} query heads over {K} KV heads leave no place for the old heads {lost}: "
        f"{new_per_group} per group need at least {needed} KV heads"
    )
    return AxisMap(n, source, split_evenly(n, source), inexact=inexact if lost else "")


def normed_heads(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """q whole copies of all heads, which keep the mean square over them; the rest is faint, and nothing reads it."""
    n, N = old[name], new[name]
    k, K = (old[axis.groups], new[axis.groups]) if axis.groups else (n, N)
    plain = query_heads(name, axis, old, new) if axis.groups else units(name, axis, old, new)
    beside_a_copy = np.arange(N) // (N // K) < K // k * k
    nth = np.array([np.sum(plain.source[:j] == i) for j, i in enumerate(plain.source)])  # copies before this one
    q = np.bincount(plain.source[beside_a_copy], minlength=n).min()
    source = np.where(beside_a_copy & (nth < q), plain.source, -1)
    s, values = q * n / N, K // k * k / K  # queries and keys have a norm to take the scale back, values their readers
    return AxisMap(
        n,
        source,
        split_evenly(n, source) * values**0.5,
        write=s**-0.5 if q else 1.0,
        gain=s**0.5,
        new_writes="faint",
        spread=1e-3,
        inexact=plain.inexact,
    )


def _dot_product(name: str, axis: Axis, old: Sizes, new: Sizes, source: np.ndarray, inexact: str = "") -> AxisMap:
    # Queries take the growth of the score's 1/sqrt(head_dim) back; zero keys leave the new query rows free.
    is_query = axis.role.endswith("query")
    write = (new[name] / old[name]) ** 0.5 if is_query else 1.0
    read = (source >= 0).astype(float)
    return AxisMap(old[name], source, read, write, new_writes="free" if is_query else "zero", inexact=inexact)


def dot_product(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """Any larger head_dim."""
    source = np.arange(new[name])
    source[old[name] :] = -1
    return _dot_product(name, axis, old, new, source)


def rotary_dot_product(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """Pair i turns at base^(-i/n): it moves to pair i N / n, which has the same frequency."""
    n, N = old[name], new[name]
    source = np.full(N, -1)
    source[np.round(np.arange(n) * N / n).astype(int)] = np.arange(n)
    inexact = f"head_dim {2 * n} -> {2 * N}: rotary frequencies match only at whole multiples of {2 * n}"
    return _dot_product(name, axis, old, new, source, inexact if N % n else "")


def normed_dot_product(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """The same under an RMSNorm over the axis: writers times sqrt(N / n) keep the mean square, the norm's weight
    takes it back. New entries are zero in queries and faint in keys: their share of the mean square is 1e-6."""
    is_query = axis.role.endswith("query")
    axis_map = rotary_dot_product(name, axis, old, new)
    wider = (new[name] / old[name]) ** 0.5
    gain = 1.0 if is_query else 1 / wider
    return replace(axis_map, write=wider, gain=gain, new_writes="zero" if is_query else "faint", spread=1e-3)


RULES = {
    "lookup": lookup,
    "linear": append,
    "elementwise": units,
    "rms_norm": residual,
    "layer_norm": residual,
    "unscaled": unscaled,
    "post_layer_norm": post_norm_residual,
    "query_heads": query_heads,
    "key_heads": units,
    "normed_query_heads": normed_heads,
    "normed_key_heads": normed_heads,
    "query": dot_product,
    "key": dot_product,
    "rotary_query": rotary_dot_product,
    "rotary_key": rotary_dot_product,
    "normed_rotary_query": normed_dot_product,
    "normed_rotary_key": normed_dot_product,
    "experts": experts,
    "gated_experts": experts,
}


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """The map of one axis, by the axis's role."""
    return RULES[axis.role](name, axis, old, new)


def depth(old: int, new: int) -> LayerMap:
    """Each layer is followed by its share of the new ones, which start as the identity."""
    source = [layer * old // new for layer in range(new)]
    return after_each(old, [source.count(layer) - 1 for layer in range(old)])
