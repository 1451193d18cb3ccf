"""Which method of growth trains best, on your model and your text?

    python recipes/compare_methods.py
    python recipes/compare_methods.py --methods lossless,stack --seeds 5     # names of growlib methods, or WIDTH+DEPTH
    python recipes/compare_methods.py --small ckpt/ --target hidden_size=1536 --text corpus/ --learning-rates 1e-4,2e-4
    python recipes/compare_methods.py --preset gpu --methods lossless+stack --seeds 1    # one GPU, a method per call

One small checkpoint is grown with each method and trained on the same tokens, beside the same model from scratch,
over seeds (of growth, initial values and order of the tokens). LAG (arXiv 2406.02469): the loss at the start says
little, so methods are ranked by the loss after a short lag; whether that foretold the end is said too. What a learned
method spends on its map counts. A method without a width, or without a depth, gets that of lossless.

Each method, and scratch, trains at its own best learning rate: the first seed tries all of the preset's, or of
--learning-rates, and the lowest loss at the end wins. OUT gets methods.json, methods.png and methods.md. The small
model and every finished training stay there too, and the next run with the same settings uses them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState

import growlib
from base import options as shared
from base.command import guarded, say
from base.comparison import Prepared, describe, prepare, run_arm
from base.library import method_named
from base.ranking import MOMENTS, SCRATCH, rank_correlation, remarks, summary, table, write
from base.reference import NAME, run_reference
from base.report import mean_and_deviation, show
from base.setting import Setting
from growlib import GrowError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    names = ", ".join(row.name for row in growlib.methods())
    parser.add_argument("--methods", help=f"comma-separated: {names}, or WIDTH+DEPTH; or all (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--lag", type=int, help="rank after so many steps (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed; that of the small model")
    parser.add_argument(
        "--learning-rates", "--learning-rate", help="comma-separated; one: for all methods (default: the preset's)"
    )
    shared.add_reference_option(parser)
    shared.add_setting_options(parser, preset="methods")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = shared.setting_of(options)
    given = {name: value for name in ("seeds", "lag") if (value := getattr(options, name)) is not None}
    if options.methods == "all":
        given["methods"] = [row.name for row in growlib.methods()]
    elif options.methods is not None:
        given["methods"] = [name.strip() for name in options.methods.split(",")]
    if options.learning_rates is not None:
        given["learning_rates"] = shared.numbers("--learning-rates", options.learning_rates, float)
    compare = dataclasses.replace(setting.compare, **given)
    names = [completed(name) for name in compare.methods if name != SCRATCH]
    training = setting.training
    evaluated = [round(i * training.steps / training.evaluations) for i in range(training.evaluations + 1)]
    if compare.lag not in evaluated[1:-1]:
        asked, wrong = f"a lag of {compare.lag} steps", "the loss is not measured there"
        raise GrowError(asked, wrong, f"one of {', '.join(map(str, evaluated[1:-1]))}")
    if compare.seeds < 1:
        raise GrowError(f"--seeds {compare.seeds}", "it is below 1", "1 or more")
    if not names:
        raise GrowError(f"--methods {options.methods}", "there is no method to compare", "names of growlib methods")
    if not compare.learning_rates:
        raise GrowError(f"preset {setting.preset!r}, learning_rates", "there is none", "at least one")
    compare = dataclasses.replace(compare, methods=list(dict.fromkeys(names)))
    return dataclasses.replace(setting, compare=compare, method=compare.methods[0])


def completed(name: str) -> str:
    """A method with a width and a depth: what it lacks is that of lossless. Raises GrowError for an unknown one."""
    row = method_named(name)
    if row.width is None:
        return f"lossless+{name}"
    return f"{name}+lossless" if row.depth is None else name


def variants(prepared: Prepared) -> dict[str, Prepared]:
    """What each method trains. Raises GrowError, before any of them does, for one that cannot grow this model."""
    small, target, seed = prepared.small.checkpoint.path, prepared.plan.config, prepared.setting.seed
    names = prepared.setting.compare.methods
    return {name: prepared.under(growlib.plan(small, target, name, seed=seed), method=name) for name in names}


def train(prepared: Prepared, name: str, rate: float, seed: int) -> Mapping[str, Any]:
    """One training of a method, or of scratch, or what is kept of it."""
    say(f"Seed {seed}: {name} at {rate:g}.")
    arm = SCRATCH if name == SCRATCH else "weights"
    return run_arm(prepared.under(seed=seed, learning_rate={arm: rate}), arm, shown=name)


def compare(prepared: Prepared) -> dict[str, Any]:
    """Run what is not finished. The content of methods.json."""
    setting, growths = prepared.setting, variants(prepared)
    trained = {SCRATCH: prepared, **growths}
    first, *others = range(setting.seed, setting.seed + setting.compare.seeds)
    sweeps = {
        name: {rate: train(of_name, name, rate, first) for rate in setting.compare.learning_rates}
        for name, of_name in trained.items()
    }
    best = {name: min(tried, key=lambda rate: tried[rate]["final_eval_loss"]) for name, tried in sweeps.items()}
    runs = {name: {first: sweeps[name][rate]} for name, rate in best.items()}
    for seed in others:
        for name, of_name in trained.items():
            runs[name][seed] = train(of_name, name, best[name], seed)
    reference: dict[int, Any] = {}
    for seed in (first, *others) if setting.reference.trained else ():
        say(f"Seed {seed}: {NAME}.")
        of_seed = {name: by_seed[seed] for name, by_seed in runs.items()}
        reference[seed] = run_reference(prepared.under(seed=seed), of_seed)
    summaries = {
        name: {
            "learning_rate": best[name],
            "sweep": {f"{rate:g}": run["final_eval_loss"] for rate, run in sweeps[name].items()},
            **summary(by_seed, runs[SCRATCH], reference, setting.compare.lag),
            **({} if name == SCRATCH else {"growth": describe(growths[name])["growth"]}),
        }
        for name, by_seed in runs.items()
    }
    in_order = sorted(summaries, key=lambda name: summaries[name]["loss"]["lag"]["mean"])
    ends = [run["final_eval_loss"] for run in reference.values()]
    rate = setting.reference.learning_rate
    return {
        "setting": {key: value for key, value in describe(prepared).items() if key not in {"growth", "method"}},
        "methods": {name: summaries[name] for name in in_order},
        "reference": {"learning_rate": rate, "loss": mean_and_deviation(ends), "runs": reference} if ends else None,
        "rank_correlation_with_the_end": {moment: rank_correlation(summaries, moment) for moment in MOMENTS[:-1]},
    }


def run(options: argparse.Namespace) -> None:
    """Prepare, compare, report."""
    setting, target = setting_of(options), shared.target_of(options.target)
    folder = shared.results_folder(options, setting)
    results = compare(prepare(setting, folder, options.small, target))
    if PartialState().is_main_process:
        write(folder, results)
    show(folder, "methods", table(results), remarks(results))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
