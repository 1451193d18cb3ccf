"""What is new after a growth, and the training that tells new from old."""

import re
from dataclasses import replace
from itertools import pairwise
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ki_distributed import two_processes
from tiny import tiny, token_ids
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

import growlib
from growlib import EntryRates, GrowError, Origin, Rewarm

GROWTHS = {
    "llama": {"hidden_size": 84, "intermediate_size": 113, "num_attention_heads": 6, "num_key_value_heads": 3}
    | {"head_dim": 24, "num_hidden_layers": 5, "vocab_size": 70},
    "gpt2": {"n_embd": 120, "n_head": 10, "n_layer": 5, "n_inner": 300, "vocab_size": 70, "n_positions": 40},
    "bert": {"hidden_size": 96, "num_hidden_layers": 5, "intermediate_size": 113, "vocab_size": 70},
}
METHODS = ["lossless", "copies", "lossless+stack", "lemon", "composable"]


def grown(small, growth, method="lossless", seed=0, noise=True):
    plan = growlib.plan(small, growth, method, seed=seed)
    if not noise:
        plan = replace(plan, maps={axis: replace(axis_map, copy_noise=0.0) for axis, axis_map in plan.maps.items()})
    return growlib.expand(small, plan, exact=False).state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", GROWTHS)
def test_every_old_value_goes_on_in_one_place(family, method):
    small, growth = tiny(family), GROWTHS[family]
    plan, big = growlib.plan(small, growth, method), grown(small, growth, method, noise=False)
    origins, old = plan.new_parameters(), small.state_dict()
    assert {name: tuple(o.shape) for name, o in origins.items()} == {e.name: e.new_shape for e in plan.tensors}
    places = dict.fromkeys((entry.source for entry in plan.tensors), 0)
    for entry in plan.tensors:
        is_old = origins[entry.name] == Origin.OLD
        if is_old.any():
            places[entry.source] += 1
            # Old indices keep their order on each axis, and growth only ever scales by positive numbers.
            assert torch.equal(big[entry.name][is_old].sign(), old[entry.source].flatten().sign()), entry.name
    assert set(places.values()) == {1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", GROWTHS)
def test_free_entries_are_those_that_the_seed_decides(family, method):
    small, growth = tiny(family), GROWTHS[family]
    origins = growlib.plan(small, growth, method).new_parameters()
    one, two = (grown(small, growth, method, seed) for seed in (0, 1))
    for name, origin in origins.items():
        # One in 65,536 is the same by chance.
        assert (one[name] == two[name])[origin == Origin.FREE].sum() < 3, name
        assert (one[name] == two[name])[origin == Origin.NEW].all(), name
    one, two = (grown(small, growth, method, seed, noise=False) for seed in (0, 1))
    for name, origin in origins.items():
        assert (one[name] == two[name])[origin <= Origin.COPIED].all(), name


def test_a_fused_matrix_entry_by_entry():
    small = tiny("gpt2", n_embd=4, n_head=2)
    origin = growlib.plan(small, {"n_embd": 6, "n_head": 3}).new_parameters()["transformer.h.0.attn.c_attn.weight"]
    expected = np.full((6, 18), Origin.FREE)  # rows 4 and 5 read what the LayerNorm leaves zero
    for first in (0, 6, 12):  # queries, keys, values: two old heads of two, and a new one
        expected[:4, first : first + 4] = Origin.OLD
    np.testing.assert_array_equal(origin.numpy(), expected)


def test_layers_that_start_as_the_identity():
    origins = growlib.plan(tiny("llama"), {"num_hidden_layers": 4}).new_parameters()
    for name, origin in origins.items():
        if "layers.1." in name or "layers.3." in name:
            writer = "o_proj" in name or "down_proj" in name
            assert (origin == (Origin.NEW if writer else Origin.COPIED)).all(), name
        else:
            assert (origin == Origin.OLD).all(), name


def test_a_post_norm_block_hands_its_last_norm_on():
    origins = growlib.plan(tiny("bert"), {"num_hidden_layers": 4}).new_parameters()
    norm = "bert.encoder.layer.{}.output.LayerNorm.weight"
    assert (origins[norm.format(0)] == Origin.NEW).all()  # set to 1
    assert (origins[norm.format(1)] == Origin.OLD).all()


def test_the_marks_of_a_uniform_tensor_take_one_byte():
    origins = growlib.plan(tiny("llama"), {"num_hidden_layers": 4}).new_parameters()
    assert {origin.untyped_storage().nbytes() for origin in origins.values()} == {1}


def trainer(model, folder, steps=5, callbacks=(), **options):
    ids = token_ids(model, length=8).repeat(4, 1)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "learning_rate": 1e-2, "weight_decay": 0.1, **options},
    )
    set_seed(0)
    made = Trainer(model=model.train(), args=arguments, train_dataset=rows, callbacks=list(callbacks))
    made.remove_callback(PrinterCallback)
    return made


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


WIDER = {"hidden_size": 72, "intermediate_size": 120, "num_hidden_layers": 3}


def wide(growth=WIDER):
    small = tiny("llama", scale=0.1)
    return growlib.plan(small, growth), growlib.expand(small, growth)


def test_only_new_blocks_train(tmp_path):
    plan, big = wide({"num_hidden_layers": 4})
    before = {name: p.detach().clone() for name, p in big.named_parameters()}
    frozen = growlib.freeze_old(big, plan)
    trainer(big, tmp_path).train()
    moved = {name for name, p in big.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "layers.1." in name or "layers.3." in name}
    assert set(frozen) == before.keys() - moved


def test_old_entries_are_frozen_inside_their_tensors(tmp_path):
    plan, big = wide()
    before = {name: p.detach().clone() for name, p in big.named_parameters()}
    trainer(big, tmp_path, callbacks=[EntryRates(plan, old=0.0)]).train()
    for name, origin in plan.new_parameters().items():
        moved = big.get_parameter(name).detach() != before[name]
        assert not moved[origin == Origin.OLD].any(), name
        new = moved[origin > Origin.OLD]
        assert not len(new) or new.any(), name


def test_new_entries_follow_a_schedule_of_their_own(tmp_path):
    """AdamW written out, in float64, with a rate for each entry."""
    plan, big = wide()
    small_steps, gradients = 5, []
    values = {name: p.detach().double().numpy().copy() for name, p in big.named_parameters()}
    rewarm = Rewarm(rho=1.3, steps=2)
    run = trainer(
        big, tmp_path, small_steps, [EntryRates(plan, new=rewarm)], lr_scheduler_type="cosine", max_grad_norm=0
    )
    step = run.training_step

    def recorded(*arguments):
        loss = step(*arguments)
        gradients.append({name: p.grad.double().numpy().copy() for name, p in big.named_parameters()})
        return loss

    run.training_step = recorded
    run.train()
    origins, decays = plan.new_parameters(), run.get_decay_parameter_names(big)

    def eta(t):
        return 1e-2 * (1 + cos(pi * t / small_steps)) / 2

    # From eta(0) to 1.3 eta(0) in two steps, then a cosine to eta(5) = 0 over the other three.
    new = [1e-2, 1.15e-2, *(1.3e-2 * (1 + cos(pi * t / 3)) / 2 for t in range(3))]
    for name, value in values.items():
        is_new, m, v = origins[name].numpy() > Origin.OLD, 0.0, 0.0
        for t in range(small_steps):
            gradient = gradients[t][name]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            rate = np.where(is_new, new[t], eta(t))
            value *= 1 - rate * (0.1 if name in decays else 0.0)
            value -= rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(big.get_parameter(name).detach().numpy(), value, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_rates_of_entries_under_fsdp2(tmp_path):
    """A process that holds a part of a tensor knows which of its entries are new."""
    both = two_processes("rates_sharded.py", tmp_path)
    plan, big = wide()
    for name, origin in plan.new_parameters().items():
        torch.testing.assert_close(both["sharded"][name], both["whole"][name], rtol=1e-5, atol=1e-6)
        moved = both["sharded"][name] != big.get_parameter(name).detach()
        assert not moved[origin == Origin.OLD].any(), name
        assert not (origin > Origin.OLD).any() or moved.any(), name


def test_a_resumed_training_goes_on_as_it_was(tmp_path):
    ends = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "resumed", 3)):
        plan, big = wide()
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
        rates = EntryRates(plan, new=Rewarm(steps=4))
        run = trainer(big, folder, 6, [rates], **options)
        if stop:
            run.add_callback(StopAt(stop))
        run.train()
        if stop:
            plan, big = wide()
            run = trainer(big, folder, 6, [EntryRates(plan, new=Rewarm(steps=4))], **options)
            run.train(resume_from_checkpoint=True)
        ends.append(run.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_second_warm_up():
    def cosine(t):
        return 0.1 + 0.9 * (1 + cos(pi * t / 1000)) / 2

    rewarm = Rewarm(start=400)
    rates = [rewarm.rate(t, 1000, cosine) for t in range(1001)]
    assert rates[:401] == [cosine(t) for t in range(401)]
    assert rates[650] == pytest.approx(1.3 * cosine(400))
    assert rates[525] == pytest.approx(1.15 * cosine(400))
    assert rates[1000] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[650:]))
    # Where the schedule warms up by itself, its peak is the reference.
    assert Rewarm(rho=2.0, steps=10).rate(10, 100, lambda t: min(t / 4, 1.0)) == 2.0
    assert Rewarm(steps=0).rate(0, 100, lambda t: 1.0) == 1.3
    assert Rewarm(steps=250).rate(100, 100, lambda t: 1.0) == pytest.approx(1.12)


def test_mup_rates(tmp_path):
    small = tiny("llama", scale=0.1)
    growth = {"hidden_size": 96, "intermediate_size": 168, "vocab_size": 70, "num_hidden_layers": 3}
    plan, big = growlib.plan(small, growth), growlib.expand(small, growth)
    groups = growlib.mup_groups(big, plan, 1e-2, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in big.named_parameters()}
    assert len(rates) == len(by_name)
    for name, expected in {
        "model.embed_tokens.weight": (1e-2, 0.1),
        "model.layers.2.self_attn.q_proj.weight": (5e-3, 0.1),
        "model.layers.2.self_attn.o_proj.weight": (1e-2, 0.1),  # as many heads as before
        "model.layers.2.mlp.down_proj.weight": (1e-2 / 1.5, 0.1),
        "model.norm.weight": (1e-2, 0.0),
        "lm_head.weight": (5e-3, 0.1),
    }.items():
        assert by_name[name] == pytest.approx(expected), name
    run = trainer(big, tmp_path)
    run.optimizer = torch.optim.AdamW(groups)
    run.train()


def test_what_is_refused(tmp_path):
    plan, big = wide()
    with pytest.raises(GrowError, match=r"partly old.*EntryRates"):
        growlib.freeze_old(big, plan)
    with pytest.raises(GrowError, match="not in the plan"):
        growlib.freeze_old(tiny("llama"), plan)
    with pytest.raises(GrowError, match="negative"):
        EntryRates(plan, old=-1.0)
    with pytest.raises(GrowError, match="rho must be positive"):
        Rewarm(rho=0.0)
    run = trainer(big, tmp_path, callbacks=[EntryRates(plan, new=Rewarm())])
    run.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(run.create_optimizer(), 0.9)
    with pytest.raises(GrowError, match="ExponentialLR"):
        run.train()


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "after.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, "docs/after.md", "exec"), names)
