"""With a budget of FLOPs and no small model: how long should one train a small one, and how much should it grow?

    python recipes/when_to_grow.py                                          # on one CPU core
    python recipes/when_to_grow.py --shares 0.1,0.2,1 --seeds 1 --steps 4000 --text corpus/
    python recipes/when_to_grow.py --preset miniature                       # seconds, for CI; its numbers mean nothing

The budget is what so many steps of the target cost from scratch. A share of it trains a small model, the rest trains
what is grown from it: the target. Several small models make several factors of growth. With a share of 1 the small
model gets the whole budget and never grows.

Each small model, what is grown from it, and scratch train at their own best learning rate: the first seed tries all of
the preset's (small and grown at the middle share), and the lowest loss at the end wins. OUT gets when.json, when.png
and when.md. Finished trainings stay there too, and the next run uses them. Expected result: docs/results/when.md.
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

import growlib
from base import job, text
from base import options as shared
from base.command import environment, guarded, say
from base.comparison import TEXT, exactness, text_used
from base.job import Finished
from base.lab import Lab, fresh
from base.library import method_named
from base.models import model_row, size_fields
from base.report import mean_and_deviation, show
from base.setting import Setting, Sizes, When
from base.shares import NEVER, best_share, grown_shares, middle_share, remarks, table, write
from base.start import Fresh, Grown
from base.trials import best_rate, lab_of, over_seeds, spent, step_flops
from growlib import GrowError, GrowthPlan


@dataclass(frozen=True)
class Growth:
    """A small model and the way from it to the target.

    Attributes:
        factor: parameters of the target over those of the small model, as it is shown.
        step_flops: of a step of the small model.
        steps: share of the budget -> steps of the small model, steps of the target.
    """

    factor: str
    sizes: Sizes
    start: Fresh
    plan: GrowthPlan
    parameters: int
    step_flops: int
    steps: Mapping[float, tuple[int, int]]


@dataclass(frozen=True)
class Prepared:
    """What all trainings share; `step_flops` are those of a step of the target."""

    lab: Lab
    corpus: text.Corpus
    blocks: np.ndarray  # [number, L]
    target: Fresh
    parameters: int
    step_flops: int
    growths: list[Growth]

    @property
    def when(self) -> When:
        assert self.lab.setting.when is not None
        return self.lab.setting.when

    @property
    def seeds(self) -> range:
        return range(self.lab.setting.seed, self.lab.setting.seed + self.when.seeds)

    def train(self, name: str, start: Fresh | Grown, rate: float, seed: int, **fields: Any) -> Finished:
        """A training of a seed, or what is kept of it; `fields` are those of `Lab.job`."""
        lab = dataclasses.replace(self.lab, setting=dataclasses.replace(self.lab.setting, seed=seed))
        wanted = lab.job(name, start, {TEXT: self.blocks}, learning_rate=rate, **fields)
        return job.run(wanted, lab.folder)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    parser.add_argument("--shares", help="comma-separated, of the budget (default: the preset's)")
    parser.add_argument("--steps", type=int, help="the budget, in steps of the target (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed")
    parser.add_argument("--learning-rates", help="comma-separated; one: for all models (default: the preset's)")
    shared.add_method_option(parser)
    shared.add_preset_options(parser, preset="when")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = shared.setting_of(options)
    when = shared.section_of(options, setting, "when", "shares", "learning_rates")
    steps = setting.training.steps if options.steps is None else options.steps
    if steps < 1:
        raise GrowError(f"--steps {steps}", "it is below 1", "1 or more")
    if not when.small:
        raise GrowError(f"preset {setting.preset!r}, when", "small is empty", "at least one small model")
    if not all(0 < share <= NEVER for share in when.shares) or not grown_shares(when.shares):
        asked = f"shares {', '.join(f'{share:g}' for share in when.shares)}"
        raise GrowError(asked, "they are no shares of a budget", "numbers above 0, up to 1, one of them below 1")
    if method_named(setting.method).learned:
        asked, wrong = f"--method {setting.method}", "what its map costs is not counted here"
        raise GrowError(asked, wrong, "a method that learns nothing")
    return dataclasses.replace(setting, when=when, training=dataclasses.replace(setting.training, steps=steps))


def prepare(setting: Setting, folder: Path) -> Prepared:
    """Tokens, models and plans. What can be refused is refused here."""
    target = fresh(setting, setting.target)
    model = target.model()
    lab, corpus, blocks = lab_of(setting, folder, model)
    assert setting.when is not None
    growths = [growth_of(setting, model, sizes) for sizes in setting.when.small]
    if len({growth.factor for growth in growths}) < len(growths):
        asked, factors = f"preset {setting.preset!r}, when, small", ", ".join(growth.factor for growth in growths)
        raise GrowError(asked, f"two of the growths in parameters are equal ({factors})", "sizes that differ more")
    return Prepared(lab, corpus, blocks, target, model.num_parameters(), step_flops(setting, model), growths)


def growth_of(setting: Setting, target: PreTrainedModel, sizes: Sizes) -> Growth:
    """From a small model of some sizes to the target."""
    assert setting.when is not None
    start = fresh(setting, sizes)
    small = start.model()
    plan = growlib.plan(small, size_fields(model_row(setting.model), setting.target), setting.method, seed=setting.seed)
    factor = f"×{target.num_parameters() / small.num_parameters():.1f}"
    costs = step_flops(setting, small), step_flops(setting, target)
    steps = {share: steps_of(setting, factor, share, *costs) for share in setting.when.shares}
    return Growth(factor, sizes, start, plan, small.num_parameters(), costs[0], steps)


def steps_of(setting: Setting, factor: str, share: float, of_small: int, of_target: int) -> tuple[int, int]:
    """The steps of the small model and of the target, whose FLOPs per step are given, not above the budget.

    Raises:
        GrowError: one of them gets none.
    """
    budget = setting.training.steps * of_target
    small = int(share * budget) // of_small
    grown = 0 if share == NEVER else (budget - small * of_small) // of_target
    if not small or (share < NEVER and not grown):
        asked = f"a share of {share:g} of {setting.training.steps} steps, growth {factor}"
        raise GrowError(asked, f"it leaves {small} steps before the growth and {grown} after it", "more --steps")
    return small, grown


def small_of(prepared: Prepared, growth: Growth, share: float, rate: float, seed: int) -> Finished:
    """A share of the budget on the small model. It reads the text in another order than what grows from it."""
    say(f"Seed {seed}, {growth.factor}, share {share:g}: small at {rate:g}.")
    steps, _ = growth.steps[share]
    return prepared.train(f"small{growth.factor}", growth.start, rate, seed, steps=steps, order=seed + 1)


def grown_of(prepared: Prepared, growth: Growth, share: float, small: Finished, rate: float, seed: int) -> Finished:
    """The rest of the budget on what is grown from the small model."""
    say(f"Seed {seed}, {growth.factor}, share {share:g}: grown at {rate:g}.")
    setting, (_, steps) = prepared.lab.setting, growth.steps[share]
    start = Grown(small.model, growth.plan.config, setting.method, setting.learned)
    return prepared.train(f"grown{growth.factor}", start, rate, seed, steps=steps, keeps_model=False)


def scratch_of(prepared: Prepared, rate: float, seed: int) -> Finished:
    """The whole budget on the target."""
    say(f"Seed {seed}, scratch at {rate:g}.")
    return prepared.train("scratch", prepared.target, rate, seed, keeps_model=False)


def spend(prepared: Prepared, growth: Growth, share: float, rates: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The whole budget on one way to the target."""
    small = small_of(prepared, growth, share, rates["small"], seed)
    grown = [] if share == NEVER else [grown_of(prepared, growth, share, small, rates["grown"], seed)]
    return {"small_loss": small.losses[TEXT], **spent(small, *grown)}


def run_growth(prepared: Prepared, growth: Growth, scratch: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Each share of the budget on a small model, with each seed, at the rates that are best at the middle share."""
    first, share = prepared.seeds[0], middle_share(prepared.when.shares)
    small, of_small = best_rate(
        prepared.when.learning_rates, lambda rate: small_of(prepared, growth, share, rate, first)
    )
    source = small_of(prepared, growth, share, small, first)
    grown, of_grown = best_rate(
        prepared.when.learning_rates, lambda rate: grown_of(prepared, growth, share, source, rate, first)
    )
    rates, cells = {"small": small, "grown": grown}, {}
    for share, steps in growth.steps.items():
        runs = {seed: spend(prepared, growth, share, rates, seed) for seed in prepared.seeds}
        cells[f"{share:g}"] = {
            "steps": dict(zip(("small", "grown"), steps, strict=True)),
            "small_loss": mean_and_deviation([run["small_loss"] for run in runs.values()]),
            **over_seeds(runs, scratch),
        }
    return {
        "sizes": dataclasses.asdict(growth.sizes),
        "parameters": growth.parameters,
        "step_flops": growth.step_flops,
        "start": exactness(growth.plan),
        "learning_rate": rates,
        "sweep": {"small": of_small, "grown": of_grown},
        "best_share": best_share(cells),
        "shares": cells,
    }


def compare(prepared: Prepared) -> dict[str, Any]:
    """Run what is not finished. The content of when.json."""
    setting, cost, first = prepared.lab.setting, prepared.step_flops, prepared.seeds[0]
    rate, tried = best_rate(prepared.when.learning_rates, lambda rate: scratch_of(prepared, rate, first))
    scratch = {seed: spent(scratch_of(prepared, rate, seed)) for seed in prepared.seeds}
    return {
        "setting": {
            **dataclasses.asdict(setting),
            "tokens_per_step": setting.tokens_per_step,
            "text_used": text_used(prepared.corpus, prepared.blocks),
            "environment": environment(),
        },
        "budget": {"flops": setting.training.steps * cost, "step_flops": cost, "parameters": prepared.parameters},
        "scratch": {"learning_rate": rate, "sweep": tried, **over_seeds(scratch, scratch)},
        "growths": {growth.factor: run_growth(prepared, growth, scratch) for growth in prepared.growths},
    }


def run(options: argparse.Namespace, command: str) -> None:
    """Prepare, compare, report."""
    setting = setting_of(options)
    folder = shared.results_folder(options, setting)
    results = {"command": command, "date": str(datetime.date.today())} | compare(prepare(setting, folder))
    if PartialState().is_main_process:
        write(folder, results)
    show(folder, "when", table(results), remarks(results))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    command = shlex.join(["python", "recipes/when_to_grow.py", *(sys.argv[1:] if arguments is None else arguments)])
    return guarded(lambda: run(options, command))


if __name__ == "__main__":
    sys.exit(main())
