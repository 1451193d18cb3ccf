"""Tiny models of real transformers classes, with every parameter randomised."""

import json

import torch
import transformers as T
from hypothesis import strategies as st
from transformers import PreTrainedModel

SIZES = {
    "llama": {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": 61, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 32},
    "bert": {
        "vocab_size": 61,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 112,
        "max_position_embeddings": 32,
    },
}
CONFIGS = {"llama": T.LlamaConfig, "gpt2": T.GPT2Config, "bert": T.BertConfig}
HEADS = {"llama": T.LlamaForCausalLM, "gpt2": T.GPT2LMHeadModel, "bert": T.BertForMaskedLM}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def tiny(
    family: str,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
    scale: float = 0.3,
    **options: object,
):
    """A model of the family's tiny sizes and the given config options, in eval mode."""
    tokens = {} if family == "bert" else SPECIAL_TOKENS
    config = CONFIGS[family](**{**SIZES[family], **tokens, **options})
    torch.manual_seed(seed)
    model = (model_class or HEADS[family])(config)
    return randomise(model, seed, scale).eval()


def randomise(model: PreTrainedModel, seed: int, scale: float = 0.3) -> PreTrainedModel:
    """Every parameter drawn anew, norms and biases too: a map that only holds at initialisation must fail."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if id(parameter) in norms else 0.0
            deviation = scale if parameter.ndim > 1 else 0.5
            parameter.copy_(centre + deviation * torch.randn(parameter.shape, generator=generator))
    return model


def token_ids(model: PreTrainedModel, length: int = 24) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


def edit(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Any value of a JSON file
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
