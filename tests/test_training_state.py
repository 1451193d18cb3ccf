"""A Trainer's checkpoint grows with all that it holds, and the training goes on."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers as T
from tiny import SIZES, SPECIAL_TOKENS, randomise, tiny, token_ids
from torch.nn.functional import layer_norm

import growlib
from growlib.moments import FACTORS, grown_moment, grown_state

DOUBLE = {
    "llama": {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 224},
    "gpt2": {"n_embd": 96, "n_head": 8},
    "bert": {"hidden_size": 96, "num_attention_heads": 8, "intermediate_size": 224},
}
CASES = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"num_hidden_layers": 3}),
    ("llama", {"tie_word_embeddings": True}, {}),
    ("llama", {}, {"num_hidden_layers": 3, "intermediate_size": 336}),
    ("gpt2", {}, {"n_layer": 3}),
    ("gpt2", {"tie_word_embeddings": False}, {}),
    ("bert", {}, {}),
    ("bert", {"tie_word_embeddings": False}, {"num_hidden_layers": 3, "intermediate_size": 336}),
]


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """RMSNorm in the precision of its input, which transformers computes in float32."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (T.models.llama.modeling_llama.LlamaRMSNorm, T.models.qwen3.modeling_qwen3.Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
    olmo = T.models.olmo.modeling_olmo.OlmoLayerNorm
    monkeypatch.setattr(olmo, "forward", lambda self, x: layer_norm(x, self.normalized_shape, eps=1e-5))


def gradients(model):
    ids = token_ids(model)
    model.zero_grad()
    logits = model(input_ids=ids).logits
    weights = torch.linspace(-1, 1, 61, dtype=logits.dtype)
    (logits[..., :61].log_softmax(-1) * weights).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def moments_and_gradients(small, plan):
    """Of each tensor that goes on: its plan, the source's gradient grown as a first moment, the grown model's gradient.

    That is every tensor of the source. The gradient of what starts anew is not in the source.
    """
    old, new = gradients(small), gradients(growlib.expand(small, plan))
    origins = plan.new_parameters()
    made = [made for made in plan.tensors if old.get(made.source) is not None and (origins[made.name] == 0).any()]
    assert len(made) == sum(gradient is not None for gradient in old.values())
    return [(one, grown_moment(one, old[one.source], plan), new[one.name]) for one in made]


@pytest.mark.parametrize(("family", "options", "target"), CASES)
def test_first_moments_grow_as_gradients_do(family, options, target):
    small = tiny(family, **options).double()
    plan = growlib.plan(small, {**DOUBLE[family], **target}, "copies")
    assert plan.exact
    # Maps without free entries: whole copies, and no noise between them.
    plan = replace(plan, maps={axis: replace(m, copy_noise=0.0) for axis, m in plan.maps.items()})
    old = gradients(small)
    for made, grown, gradient in moments_and_gradients(small, plan):
        torch.testing.assert_close(grown, gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=made.name: f"{n}: {m}")
        torch.testing.assert_close(grown_moment(made, old[made.source] ** 2, plan, 2), grown**2, rtol=1e-10, atol=0)


UNEVEN = [
    ("llama", {}, {"head_dim": 24, "intermediate_size": 150, "num_hidden_layers": 3}),
    ("llama", {"tie_word_embeddings": True}, {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    ("qwen3", {}, {}),  # norms over queries and keys
    ("qwen3", {"tie_word_embeddings": True}, {"head_dim": 24}),
    ("olmo", {"tie_word_embeddings": False}, {}),  # norms without weights
    ("gpt2", {"tie_word_embeddings": False}, {"n_inner": 250}),
    ("gpt2", {}, {"n_layer": 3}),
]
UNEVEN_SIZES = {
    "llama": {"hidden_size": 84, "num_attention_heads": 6, "num_key_value_heads": 3},
    "gpt2": {"n_embd": 84, "n_head": 7},
}
OTHERS = {"qwen3": T.Qwen3ForCausalLM, "olmo": T.OlmoForCausalLM}  # of the sizes of llama


def source_of(family, options):
    if family not in OTHERS:
        return tiny(family, **options).double()
    config = OTHERS[family].config_class(**{**SIZES["llama"], **SPECIAL_TOKENS, **options})
    return randomise(OTHERS[family](config), 0).double().eval()


def without_free_entries(axis_map):
    fills = {name: "zero" for name in ("new_reads", "new_writes") if getattr(axis_map, name) in ("free", "faint")}
    return replace(axis_map, copy_noise=0.0, **fills)


@pytest.mark.parametrize(("family", "options", "target"), UNEVEN)
def test_first_moments_grow_as_gradients_do_at_any_ratio(family, options, target):
    small = source_of(family, options)
    plan = growlib.plan(small, {**UNEVEN_SIZES.get(family, UNEVEN_SIZES["llama"]), **target}, "copies")
    assert plan.exact
    plan = replace(plan, maps={axis: without_free_entries(m) for axis, m in plan.maps.items()})
    # Under LayerNorm the new entries hold the mean of the old ones. What tells the two apart changes nothing in the
    # source, whose gradients know nothing of it.
    apart = torch.tensor([1 / 48] * 48 + [-1 / 36] * 36, dtype=torch.float64)
    apart = apart / apart.norm()
    for made, grown, gradient in moments_and_gradients(small, plan):
        difference = grown - gradient
        for dim, layout in enumerate(made.layout):
            if family in ("gpt2", "olmo") and layout.side == "write" and layout.parts == (("hidden",),):
                last = difference.movedim(dim, -1)
                difference = (last - (last @ apart).unsqueeze(-1) * apart).movedim(-1, dim)
        assert difference.abs().max() < 1e-10 * max(gradient.abs().max(), 1e-2), made.name


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_readers_grow_as_gradients_do_where_copies_are_read_unevenly(tied):
    small = tiny("llama", tie_word_embeddings=tied).double()
    plan = growlib.plan(small, DOUBLE["llama"], "lemon")
    assert plan.exact
    plan = replace(plan, maps={axis: without_free_entries(m) for axis, m in plan.maps.items()})
    assert len(set(plan.maps["hidden"].read)) > 1
    checked = 0
    for made, grown, gradient in moments_and_gradients(small, plan):
        # Through a norm's mean square all copies see what is written, and the source's gradient does not tell how.
        if not any(dim.side == "write" and dim.parts == (("hidden",),) for dim in made.layout):
            torch.testing.assert_close(grown, gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=made.name: f"{n}: {m}")
            checked += 1
    assert checked == 2 * 7 + 1 + (not tied)


# The Trainer's checkpoints


class Lines(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(61, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Watched(T.Trainer):
    """Remembers the first tokens and the loss of each step."""

    def compute_loss(self, model, inputs, *arguments, **named):
        loss = super().compute_loss(model, inputs, *arguments, **named)
        value = loss[0] if isinstance(loss, tuple) else loss
        self.__dict__.setdefault("seen", []).append((inputs["input_ids"][:, 0].tolist(), value.item()))
        return loss


def trainer(model, folder, optimizer=None, **options):
    default = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-3, "logging_strategy": "no", "weight_decay": 0.1}
    arguments = T.TrainingArguments(
        str(folder),
        **{**default, **options},
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    own = (optimizer(model), None) if optimizer else (None, None)
    return Watched(model=model, args=arguments, train_dataset=Lines(), optimizers=own)


FAMILIES = [("llama", {}), ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
            ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})]  # fmt: skip


def grown_run(tmp_path, family, options, moments, groups=None, **of_trainer):
    run = trainer(tiny(family, scale=0.1, **options), tmp_path / "small", **of_trainer)
    run.train()
    growth = {**DOUBLE[family], ("n_layer" if family == "gpt2" else "num_hidden_layers"): 3 if family != "bert" else 2}
    steps = tmp_path / "big" / "checkpoint-3"
    plan = growlib.expand_training_checkpoint(
        tmp_path / "small" / "checkpoint-3", steps, growth, moments=moments, groups=groups
    )
    assert plan.exact
    model = type(run.model).from_pretrained(steps)
    on = trainer(model, tmp_path / "big", **of_trainer)
    on.train(resume_from_checkpoint=str(steps))
    return run, on, plan


@pytest.mark.parametrize(
    ("family", "options", "moments"),
    [(*family, "dual") for family in FAMILIES] + [(*FAMILIES[0], policy) for policy in ("keep-old-zero-new", "reset")],
)
def test_the_training_goes_on(family, options, moments, tmp_path):
    run, on, _ = grown_run(tmp_path, family, options, moments)
    assert on.state.global_step == 6
    assert [ids for ids, _ in on.seen] == [ids for ids, _ in run.seen[3:]]  # the same data, in the same order
    losses, before = [loss for _, loss in on.seen], [loss for _, loss in run.seen]
    assert losses[0] == pytest.approx(before[3], rel=1e-4)  # no jump
    assert max(losses) < max(before) + 0.05
    assert on.lr_scheduler.get_last_lr() == run.lr_scheduler.get_last_lr()


def matrices(model):
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def by_depth(model):
    """Parameter groups of one's own."""
    names = [name for name, _ in model.named_parameters()]
    return [[n for n in names if "layers" not in n], [n for n in reversed(names) if "layers" in n]]


def in_groups(model):
    groups = [{"params": [model.get_parameter(name) for name in names]} for names in by_depth(model)]
    return torch.optim.AdamW(groups, lr=1e-3, amsgrad=True)


OPTIMIZERS = [
    ({"optim": "adamw_torch"}, {"step", "exp_avg", "exp_avg_sq"}),
    ({"optim": "adamw_torch_fused"}, {"step", "exp_avg", "exp_avg_sq"}),
    ({"optim": "sgd"}, None),
    ({"optim": "adafactor"}, {"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"}),
    ({"optimizer": lambda model: torch.optim.Adafactor(model.parameters())}, {"step", "row_var", "col_var"}),
    ({"optimizer": lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)}, {"momentum_buffer"}),
    ({"optimizer": lambda model: torch.optim.Muon(matrices(model))}, {"momentum_buffer"}),
    ({"optimizer": in_groups, "groups": by_depth}, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
]


@pytest.mark.parametrize(("of_trainer", "kept"), OPTIMIZERS)
def test_each_optimizer_goes_on(of_trainer, kept, tmp_path):
    run, on, plan = grown_run(tmp_path, "llama", {}, "dual", **of_trainer)
    losses, before = [loss for _, loss in on.seen], [loss for _, loss in run.seen]
    assert losses[0] == pytest.approx(before[3], rel=1e-4)
    assert losses[2] < losses[0]
    small, big = (torch.load(tmp_path / size / "checkpoint-3" / "optimizer.pt") for size in ("small", "big"))
    assert [group.keys() for group in small["param_groups"]] == [group.keys() for group in big["param_groups"]]
    name = "model.layers.1.mlp.down_proj.weight"
    made = next(made for made in plan.tensors if made.name == name.replace("1", "2"))
    assert made.source == name
    old, new = (
        state["state"].get(number_of(one.model, place, state, of_trainer.get("groups")))
        for one, state, place in ((run, small, name), (on, big, made.name))
    )
    if kept is None:
        assert not old
        assert not big["state"]
        return
    assert old.keys() == new.keys() == kept
    for key in kept & {"exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq"}:
        assert old[key].any()
        torch.testing.assert_close(
            new[key], grown_moment(made, old[key], plan, 2 if "sq" in key else 1), rtol=0, atol=0
        )


def number_of(model, wanted, state, groups):
    """Of a parameter in the optimizer of a Trainer."""
    parameters = dict(model.named_parameters())
    two_dimensional = [name for name, parameter in parameters.items() if parameter.ndim == 2]
    order = list(parameters) if len(state["state"]) == len(parameters) else two_dimensional
    if groups:
        order = list(chain.from_iterable(groups(model)))
    elif len(state["param_groups"]) == 2:
        order = [*two_dimensional, *(n for n in parameters if n not in two_dimensional)]
    return order.index(wanted)


@pytest.mark.parametrize("factors", FACTORS)
def test_factors_grow_as_what_they_stand_for(factors):
    small = tiny("llama")
    plan = growlib.plan(
        small,
        {
            "hidden_size": 84,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 12,
            "intermediate_size": 150,
        },
        "copies",
    )
    made = next(made for made in plan.tensors if made.name.endswith("0.mlp.down_proj.weight"))
    rows, columns = torch.rand(48, 1) + 0.1, torch.rand(1, 112) + 0.1
    columns *= rows.mean() / columns.mean()  # both are means of the same
    held = {factors.rows: rows, factors.columns: columns}
    if not factors.keeps_dims:
        held = {factors.rows: rows[:, 0], factors.columns: columns[0]}
    grown = grown_state(made, held, plan)
    rows_, columns_ = grown[factors.rows], grown[factors.columns]
    assert (rows_.ndim, columns_.ndim) == ((2, 2) if factors.keeps_dims else (1, 1))
    rebuilt = rows_.reshape(-1, 1) * columns_.reshape(1, -1) / rows_.mean()
    torch.testing.assert_close(rebuilt, grown_moment(made, rows * columns / rows.mean(), plan, 2))


@pytest.mark.parametrize(("optim", "keeps"), [("adagrad", "sum"), ("rmsprop", "square_avg")])
def test_other_optimizers_are_refused_or_begin_anew(optim, keeps, tmp_path):
    with pytest.raises(growlib.GrowError, match=f"keeps {keeps}, which no rule is known for"):
        grown_run(tmp_path / "refused", "llama", {}, "dual", optim=optim)
    assert not list((tmp_path / "refused" / "big").glob("*"))
    run, on, _ = grown_run(tmp_path / "reset", "llama", {}, "reset", optim=optim)
    assert on.seen[0][1] == pytest.approx(run.seen[3][1], rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on(tmp_path):
    """Under DDP: each process reads its own part of the text, and has its own random numbers."""
    script = Path(__file__).with_name("state_two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, script, tmp_path], env=environment, check=True, timeout=240)
    written = {path.name for path in (tmp_path / "grown-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= written
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in (0, 1))
    assert first["before"][0][0] != second["before"][0][0]
    for seen in (first, second):
        assert [ids for ids, _ in seen["after"]] == [ids for ids, _ in seen["before"]]
        assert seen["after"][0][1] == pytest.approx(seen["before"][0][1], rel=1e-4)
        assert seen["after"][2][1] < seen["after"][0][1] + 0.05


def turned(model, state):
    """The Trainer's groups, their parameters in another order."""
    names, counts = [n for n, _ in model.named_parameters()], [len(g["params"]) for g in state["param_groups"]]
    return [names[: counts[0]], names[counts[0] :]]


def test_what_cannot_be_grown_is_told(tmp_path):
    run = trainer(tiny("llama"), tmp_path / "small")
    run.train()
    folder, target = tmp_path / "small" / "checkpoint-3", {"hidden_size": 96}
    place = tmp_path / "big"
    with pytest.raises(growlib.GrowError, match="there is no such policy"):
        growlib.expand_training_checkpoint(folder, place, target, moments="none")
    state = torch.load(folder / "optimizer.pt")
    with pytest.raises(growlib.GrowError, match=r"the moment of .*norm.weight is"):
        growlib.expand_training_checkpoint(folder, place, target, groups=lambda model: turned(model, state))
    state["state"][0]["hessian"] = torch.zeros(1)
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(growlib.GrowError, match="keeps hessian, which no rule is known for"):
        growlib.expand_training_checkpoint(folder, place, target)
    state["param_groups"].append({**state["param_groups"][0], "params": [99]})
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(growlib.GrowError, match="which are not the Trainer's"):
        growlib.expand_training_checkpoint(folder, place, target)
    with pytest.raises(growlib.GrowError, match="has no parameter lm_head"):
        growlib.expand_training_checkpoint(folder, place, target, groups=lambda model: [["lm_head"]])
    torch.save({"first": state, "second": state}, folder / "optimizer.pt")
    with pytest.raises(growlib.GrowError, match="no state of one optimizer of torch"):
        growlib.expand_training_checkpoint(folder, place, target)
    (folder / "optimizer.pt").unlink()
    (folder / "global_step3").mkdir()
    with pytest.raises(growlib.GrowError, match="in DeepSpeed's format"):
        growlib.expand_training_checkpoint(folder, place, target)
    assert not place.exists()
