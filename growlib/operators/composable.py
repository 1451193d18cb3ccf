"""composable: the source in one corner, new parts beside it that nothing reads yet.

    FFN     W1' = [W1, M],  W2' = [W2; 0]                        heads   W_O' = [W_O; 0], new heads random
    values  W_V' = [W_V, M], W_O' = [W_O; 0] in each head        keys    W_K' = [W_K, 0], W_Q' = [sqrt(k'/k) W_Q, M]
    hidden  every writer [W, 0], every reader [W; M], norm weight sqrt(h / h') g
    layers  W_O = W2 = b2 = 0        (y = x W; M: any values, drawn near the source's)

growlib's: the writers of the hidden axis are divided by sqrt(h / h') so that eps may stay; under LayerNorm, which the
paper has not, the new entries hold the mean of x; rotary key dimensions move to places of their frequency; new query
heads stand beside the old ones of their KV head. New layers copy the one before them.

Source: Gesmundo & Maile 2023, "Composable Function-preserving Expansions for Transformer Architectures" (arXiv
2308.06103).
"""

from dataclasses import replace

import numpy as np

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap
from growlib.operators import copies, llama_pro
from growlib.papers import Paper

PAPER = Paper(
    "Composable expansions",
    "Gesmundo and Maile",
    "Composable Function-preserving Expansions for Transformer Architectures",
    "",
    2023,
    "2308.06103",
)

depth = llama_pro.depth


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Exact at any size, save under a LayerNorm after the residual sum, which sees every new entry."""
    match axis.role:
        case "elementwise" | "linear" | "key_heads":
            return copies.append(name, axis, old, new)
        case "query_heads":
            return beside(name, axis, old, new)
        case "rms_norm" | "layer_norm":
            return copies.residual(name, axis, old, new, copies=1)
        case "unscaled":
            return copies.unscaled(name, axis, old, new, copies=1)
        case "post_layer_norm":
            wrong = f"{axis.size} {old[name]} -> {new[name]}: a LayerNorm after the residual sum sees the new entries"
            axis_map = copies.post_norm_residual(name, axis, old, new, copies=1)
            return replace(axis_map, inexact=wrong if new[name] > old[name] else "")
        case _:
            return copies.width(name, axis, old, new, seed)


def beside(name: str, axis: Axis, old: Sizes, new: Sizes) -> AxisMap:
    """Old query heads first in the group of their KV head; the rest of each group, and new groups, are new heads."""
    n, N = old[name], new[name]
    k, K = (old[axis.groups], new[axis.groups]) if axis.groups else (n, N)
    per_group, new_per_group = n // k, N // K
    group, slot = np.divmod(np.arange(N), new_per_group)
    source = np.where((group < k) & (slot < per_group), group * per_group + slot, -1)
    wrong = f"{N} query heads over {K} KV heads are {new_per_group} per group, fewer than the old {per_group}"
    return AxisMap(n, source, (source >= 0).astype(float), inexact=wrong if new_per_group < per_group else "")
