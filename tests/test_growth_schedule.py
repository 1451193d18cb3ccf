"""One training whose model grows at given steps."""

import pytest
import torch
from test_training_state import DOUBLE, Lines, Watched
from test_training_state import trainer as trainer_of
from tiny import tiny

import growlib
from growlib import GrowError, GrowthSchedule, Rewarm

STABLE = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 2, "min_lr_ratio": 0.0},
    "warmup_steps": 1,
}
DEEPER, WIDER = {"num_hidden_layers": 3}, DOUBLE["llama"]


def maker(folder, made, **options):
    """Trainers of six steps; what was made is in `made`."""

    def make_trainer(model):
        made.append(trainer_of(model, folder, **{**STABLE, "save_strategy": "no", **options}))
        return made[-1]

    return make_trainer


def run(folder, growths, *, resume=False, made=None, rewarm=None, **options):
    made = [] if made is None else made
    small = tiny("llama", scale=0.1)
    schedule = GrowthSchedule(growths, rewarm=rewarm)
    return schedule.train(maker(folder, made, **options), small, resume=resume), made


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """The same training without a growth."""
    folder = tmp_path_factory.mktemp("constant")
    made = []
    trainer = maker(folder, made, logging_strategy="steps", logging_steps=1)(tiny("llama", scale=0.1))
    trainer.train()
    return trainer


def seen(made):
    return [step for trainer in made for step in trainer.__dict__.get("seen", [])]


def test_data_and_rates_are_those_of_a_training_without_growth(constant, tmp_path):
    last, made = run(tmp_path, {4: WIDER, 2: DEEPER}, logging_strategy="steps", logging_steps=1)
    assert last is made[-1]
    assert [trainer.model.config.num_hidden_layers for trainer in made] == [2, 3, 3]
    assert [trainer.model.config.hidden_size for trainer in made] == [48, 48, 96]
    assert [ids for ids, _ in seen(made)] == [ids for ids, _ in seen([constant])]
    rates = [[log["learning_rate"] for log in one.state.log_history if "loss" in log] for one in (last, constant)]
    assert rates[0] == rates[1]
    assert len(set(rates[1])) == 3  # warm-up, stable, decay
    losses = [[loss for _, loss in seen(one)] for one in (made, [constant])]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)  # up to the first step with more layers
    assert losses[0] == pytest.approx(losses[1], abs=0.2)  # no jump
    for step in (2, 4):
        assert growlib.GrowthPlan.load(tmp_path / f"grown-{step}").exact
        assert (tmp_path / f"grown-{step}" / "README.md").is_file()


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole", {2: DEEPER, 4: WIDER}, save_strategy="steps", save_steps=1)
    step_of = Watched.compute_loss

    def stop_after(count, folder):
        left = [count]

        def compute_loss(self, *arguments, **named):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return step_of(self, *arguments, **named)

        monkeypatch.setattr(Watched, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            run(folder, {2: DEEPER, 4: WIDER}, resume=True, save_strategy="steps", save_steps=1)

    for count in (1, 2, 2):  # at steps 1, 3 and 5
        stop_after(count, tmp_path / "stopped")
    monkeypatch.setattr(Watched, "compute_loss", step_of)
    made = []
    last, _ = run(
        tmp_path / "stopped", {2: DEEPER, 4: WIDER}, resume=True, made=made, save_strategy="steps", save_steps=1
    )
    assert [len(trainer.__dict__.get("seen", [])) for trainer in made] == [0, 1]  # step 6
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, last.model.get_parameter(name)), name


def test_a_checkpoint_at_the_growth_is_not_trained_again(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("growlib.growth_schedule.expand_training_checkpoint", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(tmp_path, {2: DEEPER})
    _, made = run(tmp_path, {2: DEEPER}, resume=True)
    assert [len(trainer.__dict__.get("seen", [])) for trainer in made] == [0, 4]


def test_new_entries_warm_up_again(tmp_path):
    """With a rate of nearly nothing, the new entries stay as they were."""
    still = Rewarm(rho=1e-9, steps=0)
    last, _ = run(tmp_path, {2: DEEPER}, rewarm=still)
    (callback,) = (one for one in last.callback_handler.callbacks if isinstance(one, growlib.EntryRates))
    assert callback.new == Rewarm(rho=1e-9, steps=0, start=2)
    grown = type(last.model).from_pretrained(tmp_path / "grown-2")
    new = growlib.GrowthPlan.load(tmp_path / "grown-2").new_parameters()
    moved = {
        name: (parameter - last.model.get_parameter(name)).abs().max().item()
        for name, parameter in grown.named_parameters()
    }
    fresh = [name for name in moved if (new[name] > growlib.Origin.OLD).all()]
    assert len(fresh) == 9  # of the new layer
    assert max(moved[name] for name in fresh) < 1e-7
    assert min(moved[name] for name in moved if name not in fresh) > 1e-5


@pytest.mark.parametrize(
    ("growths", "options", "says"),
    [
        ({}, {}, "there is no growth"),
        ({0: DEEPER}, {}, "its key is no step"),
        ({0.5: DEEPER}, {}, "its key is no step"),
        ({6: DEEPER}, {}, "it ends at step 6"),
        ({2: {"hidden_size": 50}}, {}, "multiple"),
        ({2: DEEPER, 4: {"num_hidden_layers": 2}}, {}, "shrink"),
        ({2: DEEPER}, {"save_only_model": True}, "no checkpoint to go on from"),
        ({2: DEEPER}, {"load_best_model_at_end": True, "eval_strategy": "no"}, "no checkpoint to go on from"),
    ],
)
def test_what_would_fail_later_is_refused_first(growths, options, says, tmp_path):
    made = []
    with pytest.raises(GrowError, match=says):
        run(tmp_path / "out", growths, made=made, **options)
    assert not seen(made)


@pytest.mark.parametrize("split", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_a_model_that_is_split_in_another_way_is_refused(split, tmp_path):
    make_trainer = maker(tmp_path, [])

    def split_trainer(model):
        trainer = make_trainer(model)
        setattr(trainer, split, True)  # on a CPU accelerate has neither; FSDP without version 2 is FSDP1
        return trainer

    with pytest.raises(GrowError, match="one process, DDP, or FSDP2"):
        GrowthSchedule({2: DEEPER}).train(split_trainer, tiny("llama"))


def test_growths_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(GrowError, match="exact=True"):
        GrowthSchedule({2: DEEPER}, method="stack", exact=True).plans(tiny("llama"))
    (tmp_path / "grown-2").mkdir()
    with pytest.raises(GrowError, match="holds another run"):
        run(tmp_path, {2: DEEPER})
    # 64 lines in batches of 8: an epoch is 8 steps.
    assert len(Lines()) == 64
    with pytest.raises(GrowError, match="the training ended at step 8"):
        run(
            tmp_path / "short",
            {20: DEEPER},
            max_steps=-1,
            num_train_epochs=1,
            lr_scheduler_type="constant",
            lr_scheduler_kwargs={},
        )
