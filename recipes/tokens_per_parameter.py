"""What is left of the saving where training is long? Each arm at several numbers of tokens per parameter.

    python recipes/tokens_per_parameter.py                                  # on one CPU core, an hour
    python recipes/tokens_per_parameter.py --per-parameter 1,20 --seeds 1 --arms scratch,weights,both --teacher better/
    python recipes/tokens_per_parameter.py --preset miniature               # a minute, for CI; its numbers mean nothing

The small model gets a share of the steps that the arms get, so it is trained in proportion. Every arm, and the small
model trained on for the FLOPs of the costliest arm, sees so many tokens per parameter of the target. Each arm trains
at its own best learning rate: the first seed tries all of the preset's at the middle number, and the lowest loss at
the end wins. OUT gets tokens.json, tokens.png and tokens.md. Finished trainings stay there too, and the next run uses
them. Expected result: docs/results/tokens.md.
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from base import options as shared
from base.command import guarded, say
from base.comparison import ARMS, Prepared, describe, prepare, run_arm
from base.horizons import middle, over_seeds, remarks, table, write
from base.lab import fresh
from base.reference import NAME, run_reference
from base.report import show
from base.setting import Setting
from growlib import GrowError

DEFAULT_ARMS = "scratch,weights,knowledge"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    parser.add_argument("--per-parameter", help="comma-separated, tokens per parameter (default: the preset's)")
    parser.add_argument(
        "--arms", default=DEFAULT_ARMS, help="comma-separated (default: %(default)s); scratch is needed"
    )
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed")
    parser.add_argument("--learning-rates", help="comma-separated; one: for all arms (default: the preset's)")
    shared.add_method_option(parser)
    shared.add_preset_options(parser, preset="tokens")
    shared.add_knowledge_options(parser)
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = shared.setting_of(options)
    tokens = shared.section_of(options, setting, "tokens", "per_parameter", "learning_rates")
    if not tokens.small_share > 0:
        asked = f"preset {setting.preset!r}, tokens, small_share = {tokens.small_share:g}"
        raise GrowError(asked, "the small model would not be trained", "a number above 0")
    return dataclasses.replace(setting, tokens=tokens)


def steps_of(setting: Setting, parameters: int, per_parameter: float) -> int:
    """The steps in which an arm sees so many tokens for each parameter."""
    steps = round(per_parameter * parameters / setting.tokens_per_step)
    if steps < 1:
        asked = f"{per_parameter:g} tokens per parameter of {parameters:,} parameters"
        raise GrowError(asked, f"that is less than a step of {setting.tokens_per_step} tokens", "more tokens")
    return steps


def prepared_at(setting: Setting, folder: Path, steps: int, seed: int, teachers: tuple[Path, ...]) -> Prepared:
    """What the arms of one length and one seed share; the small model is trained for its share of the steps."""
    assert setting.tokens is not None
    of_small = max(round(setting.tokens.small_share * steps), 1)
    at = dataclasses.replace(
        setting,
        seed=seed,
        small=dataclasses.replace(setting.small, steps=of_small),
        training=dataclasses.replace(setting.training, steps=steps),
    )
    return prepare(at, folder, None, None, teachers, teaches=True)


def best_rates(prepared: Prepared, arms: list[str], rates: list[float]) -> dict[str, dict[str, float]]:
    """By arm, the loss at the end at each rate; nothing where there is one."""
    if len(rates) == 1:
        return {arm: {} for arm in arms}
    return {
        arm: {
            f"{rate:g}": run_arm(prepared.under(learning_rate=dict.fromkeys(ARMS, rate)), arm)["final_eval_loss"]
            for rate in rates
        }
        for arm in arms
    }


def compare(setting: Setting, folder: Path, arms: list[str], teachers: tuple[Path, ...]) -> dict[str, Any]:
    """Run what is not finished. The content of tokens.json."""
    tokens = setting.tokens
    assert tokens is not None
    parameters, of_small = (
        fresh(setting, sizes).model().num_parameters() for sizes in (setting.target, setting.initial)
    )
    lengths = {per: steps_of(setting, parameters, per) for per in sorted(tokens.per_parameter)}
    first = prepared_at(setting, folder, lengths[middle(lengths)], setting.seed, teachers)
    sweep = best_rates(first, arms, tokens.learning_rates)
    only = tokens.learning_rates[0]
    rates = {arm: float(min(tried, key=lambda rate: tried[rate], default=only)) for arm, tried in sweep.items()}
    horizons = {}
    for per, steps in lengths.items():
        runs, small_flops = {}, {}
        for seed in range(setting.seed, setting.seed + tokens.seeds):
            say(f"{per:g} tokens per parameter, {steps} steps, seed {seed}.")
            prepared = prepared_at(setting, folder, steps, seed, teachers)
            prepared = prepared.under(learning_rate=dict(setting.learning_rate) | rates)
            runs[seed] = {arm: run_arm(prepared, arm) for arm in arms}
            runs[seed][NAME] = run_reference(prepared, runs[seed])
            small_flops[seed] = prepared.small.flops or 0.0
        horizons[f"{per:g}"] = {"steps": steps, "arms": over_seeds(runs, small_flops)}
    seen = max(lengths.values()) * setting.tokens_per_step
    return {
        "setting": describe(first),
        "parameters": parameters,
        "small": of_small,
        "passes": seen / first.blocks.size,
        "learning_rates": rates,
        "sweep": sweep,
        "horizons": horizons,
    }


def arms_of(option: str) -> list[str]:
    """The arms that were asked for; scratch is what the others are compared with."""
    arms = shared.arms_of(option)
    if "scratch" not in arms:
        raise GrowError(f"--arms {option}", "the others are compared with scratch", f"scratch,{option}")
    return arms


def run(options: argparse.Namespace, command: str) -> None:
    """Prepare, compare, report."""
    setting = setting_of(options)
    arms, teachers = arms_of(options.arms), shared.teachers_of(options)
    folder = shared.results_folder(options, setting)
    found: Mapping[str, Any] = compare(setting, folder, arms, teachers)
    results = {"command": command, "date": str(datetime.date.today()), **found}
    if PartialState().is_main_process:
        write(folder, results)
    show(folder, "tokens", table(results), remarks(results))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "recipes/tokens_per_parameter.py", *given])
    return guarded(lambda: run(options, command))


if __name__ == "__main__":
    sys.exit(main())
