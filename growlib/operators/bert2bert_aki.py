"""bert2bert-aki: advanced knowledge initialisation, new rows from the next layer.

    in-dimension   U^l_j = W^l_g(j) / c_j                          (as bert2bert-fpi)
    out-dimension  W'^l_j = U^l_j for j < n,  U^(l+1)_g(j) beyond  (the last layer: its own)

Rows are those of every matrix and bias in a layer: units, whole heads, and what is written to the residual stream.
Norms, embeddings and everything outside the layers are as in bert2bert-fpi.

Source: bert2BERT (Chen et al., ACL 2022, arXiv 2110.07143).
"""

from dataclasses import replace

from growlib.architectures.schema import Axis, Sizes
from growlib.maps import AxisMap
from growlib.operators import bert2bert_fpi, hypercloning


def width(name: str, axis: Axis, old: Sizes, new: Sizes, seed: int) -> AxisMap:
    """Never exact: the copies of a layer's units are another layer's."""
    axis_map = bert2bert_fpi.width(name, axis, old, new, seed)
    if axis.role not in hypercloning.CLONED or new[name] == old[name]:
        return axis_map
    wrong = f"{axis.size} {old[name]} -> {new[name]} takes the new rows of a layer from the next one"
    return replace(axis_map, from_next=True, inexact=wrong)
