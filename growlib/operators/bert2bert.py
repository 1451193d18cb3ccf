"""bert2bert: the whole paper, new rows from the next layer and the wider layers stacked.

    width  bert2bert-aki,    depth  W'_t = W_(t mod L)

Source: bert2BERT (Chen et al., ACL 2022, arXiv 2110.07143).
"""

from growlib.operators import bert2bert_aki, stack

width = bert2bert_aki.width
depth = stack.depth
