"""bert2bert-fpi: function-preserving initialisation, random copies of every width.

    g(j) = j for j < n, else random;    c_j = how many j' have g(j') = g(j)
    in-dimension  U_j = W_g(j) / c_j,    out-dimension  W'_j = U_g(j),    embeddings and norms by g

g takes every old entry once more before any a third time: with whole copies a LayerNorm sees the statistics that it
saw; between whole multiples it does not, and the growth is close but not exact. A tied head has 1/c on the norm before
it (between multiples n / N on all of it). Heads are copied whole; head_dim and vocabulary, which the paper leaves
alone, take the map of `copies`.

Source: bert2BERT (Chen et al., ACL 2022, arXiv 2110.07143).
"""

from dataclasses import replace

from growlib.architectures.schema import RESIDUAL, Axis, Sizes
from growlib.maps import AxisMap, chance, shuffled_copies, split_evenly
from growlib.operators import copies, net2net


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Exact where the hidden axis grows by whole copies."""
    n, N = old[name], new[name]
    if axis.role in ("key_heads", "query_heads"):
        return replace(net2net.whole_heads(name, axis, old, new, seed), copy_noise=0.0)
    if axis.role != "elementwise" and axis.role not in RESIDUAL:
        return copies.width(name, axis, old, new, seed)
    # By size, not by name: the residual stream may be two axes, one before and one after its norms.
    source = shuffled_copies(n, N, chance(seed, axis.size))
    wrong = f"{axis.size} {n} -> {N} copies some entries more often, which changes what a norm sees"
    inexact = wrong if N % n and axis.role in RESIDUAL else ""
    tied_gain = n / N if axis.role != "unscaled" else 1.0
    return AxisMap(n, source, split_evenly(n, source), tied_gain=tied_gain, copy_noise=0.0, inexact=inexact)
