"""What the recipe on the training after a growth changes is what it says, one optimizer step at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny

import growlib
from base.aids import Aid
from base.presets import load_preset
from base.text import OfDomains, Ordered, train_tokenizer
from base.training import train
from growlib import Origin

RATE = 1e-2
WIDER = {"hidden_size": 96, "intermediate_size": 130, "num_attention_heads": 6, "num_key_value_heads": 3}
DEEPER = {"num_hidden_layers": 5}


def one_step(target, **options):
    """The plan, and the parameters before and after one step of AdamW at `RATE` with a weight decay of 0.5."""
    small = tiny("llama")
    plan = growlib.plan(small, target)
    model = growlib.expand(small, plan)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    training = replace(load_preset("miniature").training, steps=1, warmup_steps=0, evaluations=1, weight_decay=0.5)
    training = replace(training, schedule="constant", batch_size=2, device_batch_size=2)
    rows = np.random.default_rng(0).integers(1, small.config.vocab_size, (2, 12)).astype(np.int32)
    ordered, held_out = OfDomains({"text": rows}, 2, 0, None, False), Ordered(rows, 2, 0, None)
    tokenizer = train_tokenizer(["a few words, a few words"], 300)
    aid = Aid(plan, **options) if options else None
    after = train("step", model, ordered, held_out, tokenizer, training, learning_rate=RATE, seed=0, aid=aid).model
    return plan, before, {name: value.detach() for name, value in after.named_parameters()}


def test_weight_decay_leaves_new_entries_alone():
    plan, before, plain = one_step(WIDER)
    _, _, without = one_step(WIDER, decays_new=False)
    decayed = 0
    for name, origin in plan.new_parameters().items():
        is_new = origin > Origin.OLD
        assert torch.equal(plain[name][~is_new], without[name][~is_new]), name
        decay = RATE * 0.5 * before[name] if before[name].ndim > 1 else 0.0
        torch.testing.assert_close(without[name][is_new], (plain[name] + decay)[is_new], atol=1e-6, rtol=0)
        decayed += int((without[name] != plain[name]).sum())
    assert decayed > 1000


@pytest.mark.parametrize(("options", "of_new", "of_old"), [({"new": 2.0}, 2.0, 1.0), ({"old": 0.0}, 1.0, 0.0)])
def test_new_and_old_entries_have_rates_of_their_own(options, of_new, of_old):
    plan, before, plain = one_step(WIDER)
    _, _, changed = one_step(WIDER, **options)
    for name, origin in plan.new_parameters().items():
        rates = torch.where(origin > Origin.OLD, of_new, of_old)
        expected = before[name] + rates * (plain[name] - before[name])
        torch.testing.assert_close(changed[name], expected, atol=1e-6, rtol=0)


def test_mup_lowers_the_rate_of_matrices_whose_inputs_grew():
    plan, before, plain = one_step(WIDER)
    _, _, mup = one_step(WIDER, mup=True)
    wider = plan.source.hidden_size / plan.config.hidden_size
    for name, share in (("model.layers.0.mlp.up_proj.weight", wider), ("model.embed_tokens.weight", 1.0)):
        step, full = mup[name] - before[name], plain[name] - before[name]
        torch.testing.assert_close(step, share * full, atol=1e-6, rtol=1e-4)


def test_frozen_blocks_stay():
    plan, before, after = one_step(DEEPER, frozen=True)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) > 6
    assert all((origin > Origin.OLD).all() for name, origin in plan.new_parameters().items() if name in changed)
