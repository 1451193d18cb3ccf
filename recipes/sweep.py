"""Which learning rate is the best one for each arm? The winners stand in the preset.

    python recipes/sweep.py --preset demo --learning-rates 2e-3,4e-3,8e-3 --out runs/sweep
    python recipes/sweep.py --small ckpt/ --target hidden_size=1536 --text corpus/ --arms weights

Hardware and time: as ki_plus_growth.py with the same preset, once per learning rate and seed. Runs that are
done are kept in OUT, so a sweep may be stopped, widened, and split over several processes that share OUT once
the small model lies there. The table goes to OUT/sweep.md; the lowest mean final held-out loss wins.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from base import options as shared
from base.command import guarded, say
from base.comparison import ARMS, prepare, run_arm
from base.flops import flops_saved
from base.report import as_markdown
from base.store import write_text

Runs = Mapping[tuple[str, float, int], Mapping[str, Any]]  # (arm, learning rate, seed) -> result


def winners(runs: Runs) -> dict[str, float]:
    """Per arm, the learning rate with the lowest mean final loss."""
    best: dict[str, tuple[float, float]] = {}
    for arm, rate in {(arm, rate): None for arm, rate, _ in runs}:
        loss = fmean(run["final_eval_loss"] for (a, r, _), run in runs.items() if (a, r) == (arm, rate))
        best[arm] = min(best.get(arm, (loss, rate)), (loss, rate))
    return {arm: rate for arm, (_, rate) in best.items()}


def rows_of(runs: Runs) -> list[tuple[str, ...]]:
    """One row per run; savings against scratch at its own best learning rate, same seed."""
    best = winners(runs)
    rows: list[tuple[str, ...]] = [("arm", "learning rate", "seed", "held-out loss", "FLOPs saved", "seconds")]
    for (arm, rate, seed), run in runs.items():
        scratch = runs.get(("scratch", best.get("scratch", 0.0), seed))
        saved = flops_saved({"scratch": scratch, "this": run})["this"] if scratch else None
        mark = "**" if best[arm] == rate else ""
        shown = "" if saved is None else f"{saved:.1%}"
        loss = f"{mark}{run['final_eval_loss']:.4f}{mark}"
        rows.append((arm, f"{mark}{rate:g}{mark}", str(seed), loss, shown, f"{run['seconds']:.0f}"))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    shared.add_arms_option(parser)
    parser.add_argument("--learning-rates", default="2e-3,4e-3,8e-3", help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    shared.add_method_option(parser)
    shared.add_setting_options(parser, preset="demo")
    shared.add_knowledge_options(parser)
    return parser.parse_args(arguments)


def sweep(options: argparse.Namespace) -> None:
    """Run what is not there yet, and write the table."""
    rates = shared.numbers("--learning-rates", options.learning_rates, float)
    seeds = shared.numbers("--seeds", options.seeds, int)
    setting, arms, target = shared.setting_of(options), shared.arms_of(options.arms), shared.target_of(options.target)
    folder, teachers = shared.results_folder(options, setting), shared.teachers_of(options)
    runs: dict[tuple[str, float, int], Mapping[str, Any]] = {}
    for seed in seeds:
        of_seed = dataclasses.replace(setting, seed=seed)
        teaches = any(ARMS[name].knowledge for name in arms)
        prepared = prepare(of_seed, folder, options.small, target, teachers, teaches=teaches)
        for arm in arms:
            for rate in rates:
                runs[arm, rate, seed] = run_arm(prepared.under(learning_rate=dict.fromkeys(ARMS, rate)), arm)
    table = as_markdown(rows_of(dict(sorted(runs.items(), key=lambda item: list(ARMS).index(item[0][0])))))
    say("\n" + table)
    write_text(folder / "sweep.md", table + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return guarded(lambda: sweep(options))


if __name__ == "__main__":
    sys.exit(main())
