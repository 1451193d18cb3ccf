"""Growth must not lock: copies drift apart in training, and whatever should learn gets a gradient."""

from math import prod

import pytest
import torch
from einops import rearrange
from tiny import tiny, token_ids

import growlib

GROWTHS = {
    "llama": [
        {"hidden_size": 96},
        {"hidden_size": 72, "intermediate_size": 113, "head_dim": 24},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 224},
        {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 5, "intermediate_size": 224},
    ],
    "gpt2": [{"n_embd": 96}, {"n_embd": 84, "n_head": 6, "n_layer": 4}],
    "bert": [{"hidden_size": 96}, {"hidden_size": 144, "num_hidden_layers": 5, "intermediate_size": 224}],
}
CASES = [(family, growth) for family, growths in GROWTHS.items() for growth in growths]


def train(model, optimizer, steps):
    ids = token_ids(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def along(tensor, entry, axis, sizes):
    """Each part of a tensor that has the axis, as a matrix with one row for each entry of the axis."""
    for d, dim in enumerate(entry.layout):
        if any(axis in part for part in dim.parts):
            parts = tensor.split([prod(sizes[a] for a in part) for part in dim.parts], dim=d)
            for part, axes in zip(parts, dim.parts, strict=True):
                if axis in axes:
                    names, others = " ".join(axes), " ".join(a for a in axes if a != axis)
                    lengths = {a: sizes[a] for a in axes}
                    matrix = part.movedim(d, 0).flatten(1)
                    yield rearrange(matrix, f"({names}) rest -> {axis} ({others} rest)", **lengths)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("family", "growth"), CASES)
def test_copies_drift_apart_in_every_matrix(family, growth, optimizer):
    # Small weights: a GELU unit that is far on its flat side would rightly learn nothing.
    small = tiny(family, scale=0.1)
    plan, big = growlib.plan(small, growth), growlib.expand(small, growth)
    train(big, optimizer(big.parameters(), lr=1e-3 if optimizer is torch.optim.AdamW else 0.1), steps=5)
    parameters, checked = dict(big.named_parameters()), 0
    for entry in plan.tensors:
        grown = [a for a, m in plan.maps.items() if not m.is_identity and len(entry.new_shape) > 1]
        for axis in set(grown) - {"vocab", "positions", "types"}:
            for rows in along(parameters[entry.name].detach().double(), entry, axis, plan.new_sizes):
                distance = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
                assert distance.min() > 1e-7, (entry.name, axis)
                checked += 1
    assert checked > 10


@pytest.mark.parametrize(("family", "growth"), CASES)
def test_every_parameter_gets_a_gradient_by_the_third_step(family, growth):
    big = growlib.expand(tiny(family, scale=0.1), growth)
    train(big, torch.optim.AdamW(big.parameters(), lr=1e-3), steps=2)
    ids = token_ids(big)
    big.zero_grad()
    big(input_ids=ids, labels=ids).loss.backward()
    # The bias of a key shifts all scores of a query alike, so softmax leaves it without a gradient.
    dead = [n for n, p in big.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not [name for name in dead if "key.bias" not in name and "k_proj.bias" not in name]
