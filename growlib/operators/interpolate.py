"""interpolate: new layers between the old ones, on straight lines through their weights.

    W'_t = (1 - a) W_k + a W_(k+1),    k + a = t (L - 1) / (L' - 1)

These are rows of LiGO's depth matrix w with two entries that sum to 1 (W'_l = sum_k w_lk W_k), as an initial map
that is not trained. LiGO's code itself starts from one-hot rows, which are `stack` and `interleave`.

Source: LiGO (Wang et al., ICLR 2023, arXiv 2303.00980).
"""

from dataclasses import replace

from growlib.maps import LayerMap, repeated


def depth(old: int, new: int) -> LayerMap:
    """The first and the last layer stay; those between are averages of neighbours. Not exact."""
    places = [divmod(layer * (old - 1), max(new - 1, 1)) for layer in range(new)]
    layers = repeated(old, tuple(below for below, _ in places))
    return replace(layers, share=tuple(rest / max(new - 1, 1) for _, rest in places))
