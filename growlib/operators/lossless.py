"""lossless: new features beside silent readers wherever that is exact, copies where only copies are (the default).

Legend: an axis grows from n to N.

    hidden, RMSNorm      write [x, 0] sqrt(N / n),       norm weight sqrt(n / N) [g, 2 mean(g)],  readers [W, M]
    hidden, LayerNorm    write [x, mean(x)] sqrt(N / n), norm weight as above, bias [b, 0],       readers [W, M]
    FFN units, heads     write [W, M], readers [W, 0]: new heads beside the old ones of their KV head, and in new groups
    all else             as `copies`: head_dim, experts, ids, post-norm streams; heads where a KV head gets fewer query
                         heads; and where a tiny model has shown that only whole copies are exact

M is drawn around the source's mean, as wide as its values. New layers start as the identity: see `depth`.

Fresh parts train better than copies, whose noise cannot make them different enough: docs/results/defaults.md. The norm
weight of 2 on new entries lets what reads them learn faster.

Source: the corner is that of composable expansions (arXiv 2308.06103); what is exact under LayerNorm, rotary embedding
and tied heads is growlib's own.
"""

from dataclasses import replace

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap
from growlib.operators import composable, copies

NEW_GAIN = 2.0  # of a norm's weight on new entries, as a share of the mean of the old ones

depth = copies.depth


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Exact wherever the architecture allows it."""
    if axis.only_copies or new[name] == old[name]:
        return copies.width(name, axis, old, new, seed)
    match axis.role:
        case "rms_norm" | "layer_norm":
            return replace(copies.residual(name, axis, old, new, copies=1), new_gain=NEW_GAIN)
        case "unscaled":
            return replace(copies.unscaled(name, axis, old, new, copies=1), new_gain=NEW_GAIN)
        case "elementwise":
            return copies.append(name, axis, old, new)
        case "key_heads" if not axis.shared_by or _keeps_groups(axis.shared_by, name, old, new):
            return copies.append(name, axis, old, new)
        case "query_heads" if not axis.groups or _keeps_groups(name, axis.groups, old, new):
            return composable.beside(name, axis, old, new)
        case _:
            return copies.width(name, axis, old, new, seed)


def _keeps_groups(heads: str, kv_heads: str, old: Sizes, new: Sizes) -> bool:
    """Whether each KV head still has room for its query heads: then new heads stand beside them, and in new groups."""
    return new[heads] // new[kv_heads] >= old[heads] // old[kv_heads]
