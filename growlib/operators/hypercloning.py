"""hypercloning: m whole copies of everything, with noise that cancels between the copies.

    W' = [[W + N_1, .., W + N_m], ..] / m,    sum N_i = 0,    10 log10(var(W) / var(N_i)) = snr_db
    b' = [b, .., b],    embeddings and norms likewise,    head / m

At m = 2 the noise is the paper's (N, -N). At larger m the paper alternates its sign, which leaves copies 1, 3, ..
equal; here it is centred over the copies, at the same signal-to-noise ratio. The paper leaves embeddings and head
without noise; here an untied head has it too. A tied head stays tied, with 1/m on the norm before it (the paper's code
unties). head_dim is not the paper's: it takes the map of `copies`.

Source: HyperCloning (Samragh et al. 2024, arXiv 2409.12903).
"""

from dataclasses import replace

from growlib.architectures.schema import RESIDUAL, Axis, Sizes
from growlib.errors import GrowError
from growlib.maps import AxisMap
from growlib.operators import copies
from growlib.papers import Paper

PAPER = Paper(
    "HyperCloning",
    "Samragh et al.",
    "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization",
    "",
    2024,
    "2409.12903",
)

CLONED = {*RESIDUAL, "elementwise", "query_heads", "key_heads"}


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int, *, snr_db: float = 10.0) -> AxisMap:
    """Whole multiples only. `snr_db=inf` is the paper's symmetric cloning, whose copies stay equal in training."""
    axis_map = copies.width(name, axis, old, new, seed)
    if axis.role not in CLONED:
        return axis_map
    m = whole_copies("hypercloning", axis, axis_map)
    # The noise is drawn m times and centred, which leaves (1 - 1/m) of its variance.
    noise = 10 ** (-snr_db / 20) / (1 - 1 / m) ** 0.5 if m > 1 else 0.0
    return replace(axis_map, copy_noise=noise)


def whole_copies(method: str, axis: Axis, axis_map: AxisMap) -> int:
    """The number of copies of each entry. Raises GrowError where they differ."""
    n, N = axis_map.old, axis_map.new
    if N % n or len(set(axis_map.copies())) > 1:
        asked = f"growing {axis.size} {n} -> {N} with method {method!r}"
        valid = f"{N // n * n} or {N // n * n + n}, or method 'lossless'"
        raise GrowError(asked, "it copies every entry equally often", valid)
    return N // n
