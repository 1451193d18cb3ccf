"""Which learning rate is the best one for each arm? The winners stand in the preset.

    python recipes/sweep.py --preset demo --learning-rates 2e-3,4e-3,8e-3 --out runs/sweep

Hardware and time: as ki_plus_growth.py with the same preset, once per learning rate and seed. Runs that are
done are kept in OUT, so a sweep may be stopped, widened, and split over several processes that share OUT once
the small model lies there. The table goes to OUT/sweep.md; the lowest mean final held-out loss wins.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import ki_plus_growth as recipe
from base.command import guarded, say
from base.comparison import ARMS, prepare, run_arm
from base.flops import flops_saved
from base.report import as_markdown
from base.store import open_folder, write_text
from growlib import GrowError

Runs = Mapping[tuple[str, float, int], dict[str, Any]]  # (arm, learning rate, seed) -> result


def numbers(option: str, kind: type[int] | type[float]) -> list[Any]:
    """Comma-separated numbers."""
    try:
        return [kind(part) for part in option.split(",")]
    except ValueError as error:
        raise GrowError(f"{option!r}", str(error), "numbers with commas between them") from error


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="as in ki_plus_growth.py")
    parser.add_argument("--arms", help=f"comma-separated: {', '.join(ARMS)} (default: all)")
    parser.add_argument("--learning-rates", default="2e-3,4e-3,8e-3", help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--method", help="of growth, instead of the preset's")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    return parser.parse_args(arguments)


def sweep(options: argparse.Namespace) -> None:
    """Run what is not there yet, and write the table."""
    rates, seeds = numbers(options.learning_rates, float), numbers(options.seeds, int)
    open_folder(options.out)
    runs: dict[tuple[str, float, int], dict[str, Any]] = {}
    for seed in seeds:
        given = ["--preset", options.preset, "--seed", str(seed)]
        given += ["--method", options.method] if options.method else []
        prepared = prepare(recipe.setting_of(recipe.parse(given)), options.out, None, None)
        for arm in recipe.arms_of(options.arms):
            for rate in rates:
                setting = dataclasses.replace(prepared.setting, learning_rate=dict.fromkeys(ARMS, rate))
                runs[arm, rate, seed] = run_arm(dataclasses.replace(prepared, setting=setting), arm)
    table = as_markdown(rows_of(dict(sorted(runs.items(), key=lambda item: list(ARMS).index(item[0][0])))))
    say("\n" + table)
    write_text(options.out / "sweep.md", table + "\n")


if __name__ == "__main__":
    sys.exit(guarded(lambda: sweep(parse(None))))
