"""llama-pro: the layers in as many groups as there are new ones, each group followed by an identity block.

    x'_t = x_t + A'(x_t) + F'(..) = x_t    where the output projections of A' and F' are zero

With E new blocks, floor((l + 1) E / L) - floor(l E / L) of them follow layer l: one after every L / E layers.

Source: LLaMA-Pro (Wu et al. 2024, arXiv 2401.02415). In post-norm models the norms around the block are (1, 0) and it
takes the last norm of the layer before; under sandwich norms the post-norm's weight is zero: both growlib's.
"""

from growlib.maps import LayerMap, after_each


def depth(old: int, new: int) -> LayerMap:
    """New blocks are copies of the layer before them with zeroed output projections."""
    extra = new - old
    return after_each(old, [(layer + 1) * extra // old - layer * extra // old for layer in range(old)])
