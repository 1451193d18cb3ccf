"""Should a training begin with a smaller model and grow on the way?

    python recipes/progressive_growth.py                                    # on one CPU core
    python recipes/progressive_growth.py --moments 0.5,0.8 --seeds 1 --steps 4000 --text corpus/
    python recipes/progressive_growth.py --preset miniature                 # seconds, for CI; its numbers mean nothing

One training begins with few layers and gets the target's, one begins with a part of the width. Each grows after some
share of its steps (a moment), inside the run: optimizer, data order and learning rate schedule go on. The schedule is
warm-up, stable, decay; the decay is the last steps of each training. Each is compared with the target's sizes from the
start: with as many tokens, which costs less; and with as many FLOPs, which is more tokens. "Never grown" is the model
that a way begins with, for the FLOPs.

Each way and the target train at their own best learning rate of the preset's: the first seed tries all (the ways at the
middle moment, with as many tokens). OUT gets progressive.json, progressive.png and progressive.md. Finished trainings
stay there too, and the next run uses them.
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

from base import job, text
from base import options as shared
from base.command import environment, guarded, say
from base.comparison import TEXT, exactness, text_used
from base.job import Finished
from base.lab import Lab, fresh
from base.library import method_named
from base.models import model_row, size_fields
from base.moments import NEVER, best_moment, middle, remarks, table, write
from base.report import show
from base.setting import Progressive, Setting
from base.start import Fresh
from base.trials import best_rate, lab_of, over_seeds, spent, step_flops
from growlib import GrowError, GrowthPlan, GrowthSchedule, Rewarm


@dataclass(frozen=True)
class Way:
    """From a smaller model to the target. `step_flops` are those of a step of the smaller one."""

    name: str
    start: Fresh
    plan: GrowthPlan
    parameters: int
    step_flops: int


@dataclass(frozen=True)
class Prepared:
    """What all trainings share; `step_flops` are those of a step of the target."""

    lab: Lab
    corpus: text.Corpus
    blocks: np.ndarray  # [number, L]
    target: Fresh
    parameters: int
    step_flops: int
    ways: list[Way]

    @property
    def progressive(self) -> Progressive:
        assert self.lab.setting.progressive is not None
        return self.lab.setting.progressive

    @property
    def steps(self) -> int:
        return self.lab.setting.training.steps

    @property
    def seeds(self) -> range:
        return range(self.lab.setting.seed, self.lab.setting.seed + self.progressive.seeds)

    def train(
        self, name: str, start: Fresh, steps: int, rate: float, seed: int, grows_at: int | None = None
    ) -> Finished:
        """A training of a seed that may grow into the target, or what is kept of it."""
        say(f"Seed {seed}, {name}, {steps} steps at {rate:g}" + (f", grows at {grows_at}." if grows_at else "."))
        decays = {"num_decay_steps": max(round(self.progressive.decay * steps), 1)}
        setting = self.lab.setting
        training = dataclasses.replace(setting.training, schedule="warmup_stable_decay", schedule_options=decays)
        lab = dataclasses.replace(self.lab, setting=dataclasses.replace(setting, seed=seed, training=training))
        wanted = lab.job(name, start, {TEXT: self.blocks}, learning_rate=rate, steps=steps, keeps_model=False)
        if grows_at:
            sizes = size_fields(model_row(setting.model), setting.target)
            rewarm = Rewarm(steps=self.progressive.rewarm) if self.progressive.rewarm else None
            growths = GrowthSchedule({grows_at: sizes}, setting.method, rewarm=rewarm, seed=seed, exact=False)
            wanted = dataclasses.replace(wanted, growths=growths)
        return job.run(wanted, lab.folder)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    parser.add_argument("--moments", help="comma-separated shares of the steps (default: the preset's)")
    parser.add_argument("--steps", type=int, help="of the target's training (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed")
    parser.add_argument("--learning-rates", help="comma-separated; one: for all (default: the preset's)")
    parser.add_argument("--rewarm", type=int, help="steps of a second warm-up of new entries; 0: none")
    shared.add_method_option(parser)
    shared.add_preset_options(parser, preset="progressive")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = shared.setting_of(options)
    progressive = shared.section_of(options, setting, "progressive", "moments", "learning_rates")
    if options.rewarm is not None:
        progressive = dataclasses.replace(progressive, rewarm=options.rewarm)
    steps = setting.training.steps if options.steps is None else options.steps
    if steps < 1 or progressive.rewarm < 0:
        asked = f"--steps {steps} --rewarm {progressive.rewarm}"
        raise GrowError(asked, "one of them is too small", "1 or more; --rewarm 0 or more")
    if not progressive.starts:
        raise GrowError(f"preset {setting.preset!r}, progressive", "starts is empty", "at least one way to the target")
    if not all(0 < moment < 1 and 0 < round(moment * steps) < steps for moment in progressive.moments):
        asked = f"moments {', '.join(f'{moment:g}' for moment in progressive.moments)} of {steps} steps"
        raise GrowError(asked, "the model would grow before the first step or after the last", "shares between 0 and 1")
    if not 0 < progressive.decay < 1:
        raise GrowError(f"progressive, decay {progressive.decay:g}", "it is no share", "a share such as 0.2")
    if method_named(setting.method).learned:
        raise GrowError(f"--method {setting.method}", "its map is learned", "a method that learns nothing")
    return dataclasses.replace(
        setting, progressive=progressive, training=dataclasses.replace(setting.training, steps=steps)
    )


def prepare(setting: Setting, folder: Path) -> Prepared:
    """Tokens, models and plans. What can be refused is refused here."""
    assert setting.progressive is not None
    target, sizes = fresh(setting, setting.target), size_fields(model_row(setting.model), setting.target)
    model, ways = target.model(), []
    for name, start_sizes in setting.progressive.starts.items():
        start = fresh(setting, start_sizes)
        small = start.model()
        (plan,) = GrowthSchedule({1: sizes}, setting.method, seed=setting.seed).plans(small)
        if not plan.grows:
            raise GrowError(f"progressive, starts, {name}", "it has the target's sizes", "smaller ones")
        ways.append(Way(name, start, plan, small.num_parameters(), step_flops(setting, small)))
    lab, corpus, blocks = lab_of(setting, folder, model)
    return Prepared(lab, corpus, blocks, target, model.num_parameters(), step_flops(setting, model), ways)


def steps_for_the_flops(prepared: Prepared, way: Way, moment: float) -> int:
    """How many steps cost what the target's training costs, where a share of them is the smaller model's."""
    steps = int(prepared.steps * prepared.step_flops / (moment * way.step_flops + (1 - moment) * prepared.step_flops))
    while cost_of(prepared, way, moment, steps) > prepared.steps * prepared.step_flops:  # rounded up at the growth
        steps -= 1
    return steps


def cost_of(prepared: Prepared, way: Way, moment: float, steps: int) -> int:
    """FLOPs of a training that grows after a share of its steps."""
    grows_at = round(moment * steps)
    return grows_at * way.step_flops + (steps - grows_at) * prepared.step_flops


def run_moment(
    prepared: Prepared, way: Way, moment: float, rate: float, constant: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """A growth at a moment with each seed: for the tokens and for the FLOPs of the target's training."""
    kinds = {"flops": steps_for_the_flops(prepared, way, moment)}
    if moment < NEVER:
        kinds = {"tokens": prepared.steps} | kinds
    cells = {}
    for kind, steps in kinds.items():
        grows_at = round(moment * steps) if moment < NEVER else None
        trained = {s: prepared.train(way.name, way.start, steps, rate, s, grows_at) for s in prepared.seeds}
        runs = {seed: spent(one) for seed, one in trained.items()}
        cells[kind] = {"steps": steps, "grows_at": grows_at, **over_seeds(runs, constant)}
    return cells


def run_way(prepared: Prepared, way: Way, constant: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Each moment of a way, at the rate that is best at the middle one."""
    first, steps, moments = prepared.seeds[0], prepared.steps, prepared.progressive.moments
    grows_at = round(middle(moments) * steps)
    rate, tried = best_rate(
        prepared.progressive.learning_rates,
        lambda rate: prepared.train(way.name, way.start, steps, rate, first, grows_at),
    )
    cells = {f"{m:g}": run_moment(prepared, way, m, rate, constant) for m in [*moments, NEVER]}
    return {
        "sizes": dataclasses.asdict(prepared.progressive.starts[way.name]),
        "parameters": way.parameters,
        "step_flops": way.step_flops,
        "growth": exactness(way.plan),
        "learning_rate": rate,
        "sweep": tried,
        "best_moment": {kind: best_moment(cells, kind) for kind in ("tokens", "flops")},
        "moments": cells,
    }


def compare(prepared: Prepared) -> dict[str, Any]:
    """Run what is not finished. The content of progressive.json."""
    setting, first, steps = prepared.lab.setting, prepared.seeds[0], prepared.steps
    rate, tried = best_rate(
        prepared.progressive.learning_rates,
        lambda rate: prepared.train("constant", prepared.target, steps, rate, first),
    )
    constant = {s: spent(prepared.train("constant", prepared.target, steps, rate, s)) for s in prepared.seeds}
    return {
        "setting": {
            **dataclasses.asdict(setting),
            "tokens_per_step": setting.tokens_per_step,
            "text_used": text_used(prepared.corpus, prepared.blocks),
            "environment": environment(),
        },
        "constant": {
            "parameters": prepared.parameters,
            "step_flops": prepared.step_flops,
            "steps": steps,
            "learning_rate": rate,
            "sweep": tried,
            **over_seeds(constant, constant),
        },
        "ways": {way.name: run_way(prepared, way, constant) for way in prepared.ways},
    }


def run(options: argparse.Namespace, command: str) -> None:
    """Prepare, compare, report."""
    setting = setting_of(options)
    folder = shared.results_folder(options, setting)
    results = {"command": command, "date": str(datetime.date.today())} | compare(prepare(setting, folder))
    if PartialState().is_main_process:
        write(folder, results)
    show(folder, "progressive", table(results), remarks(results))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "recipes/progressive_growth.py", *words])
    return guarded(lambda: run(options, command))


if __name__ == "__main__":
    sys.exit(main())
