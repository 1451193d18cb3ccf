"""Which method of growth trains best, on your model and your text?

    python recipes/compare_methods.py                                        # on 2 CPU cores in under 20 minutes
    python recipes/compare_methods.py --methods lossless,stack --seeds 5     # names of growlib methods, or WIDTH+DEPTH
    python recipes/compare_methods.py --small ckpt/ --target hidden_size=1536 --text corpus/
    python recipes/compare_methods.py --preset gpu --methods lossless+stack --seeds 1    # one GPU, a method per call

One small checkpoint is grown with each method and trained on the same tokens, beside the same model from scratch,
over seeds (of growth, initial values and order of the tokens). LAG (arXiv 2406.02469): the loss at the start says
little, so methods are ranked by the loss after a short lag; whether that foretold the end is said too. What a learned
method spends on its map counts. A method without a width, or without a depth, gets that of lossless.

OUT gets methods.json, methods.png and methods.md. The small model and every finished training stay there too, and
the next run with the same settings uses them. All methods train at the preset's rate for arm weights.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import numpy as np
from accelerate import PartialState

import growlib
import ki_plus_growth as recipe
from base.command import guarded, say
from base.comparison import Prepared, describe, prepare, run_arm
from base.flops import flops_saved
from base.report import as_markdown, as_text, draw_curves, mean_and_deviation, shown
from base.setting import Setting
from base.store import open_folder, write_json, write_text
from growlib import GrowError
from growlib.operators import method

SCRATCH = "scratch"
MOMENTS = ("start", "lag", "end")
HEADER = ("method", "loss at the start", "after the lag", "at the end", "FLOPs saved", "growth")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(row.name for row in growlib.methods())
    parser.add_argument("--methods", help=f"comma-separated: {names}, or WIDTH+DEPTH; or all (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--lag", type=int, help="rank after so many steps (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed; that of the small model")
    recipe.add_setting_options(parser, preset="methods")
    parser.set_defaults(method=None)
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = recipe.setting_of(options)
    given = {name: value for name in ("seeds", "lag") if (value := getattr(options, name)) is not None}
    if options.methods == "all":
        given["methods"] = [row.name for row in growlib.methods()]
    elif options.methods is not None:
        given["methods"] = [name.strip() for name in options.methods.split(",")]
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
    compare = dataclasses.replace(compare, methods=list(dict.fromkeys(names)))
    return dataclasses.replace(setting, compare=compare, method=compare.methods[0])


def completed(name: str) -> str:
    """A method with a width and a depth: what it lacks is that of lossless. Raises GrowError for an unknown one."""
    row = method(name)
    if row.width is None:
        return f"lossless+{name}"
    return f"{name}+lossless" if row.depth is None else name


def variants(prepared: Prepared) -> dict[str, Prepared]:
    """What each method trains. Raises GrowError, before any of them does, for one that cannot grow this model."""
    setting, growths = prepared.setting, {}
    for name in setting.compare.methods:
        plan = growlib.plan(prepared.small, prepared.plan.config, name, seed=setting.seed)
        of_method = dataclasses.replace(setting, method=name)
        growths[name] = dataclasses.replace(prepared, setting=of_method, plan=plan)
    return growths


def compare(prepared: Prepared) -> dict[str, Any]:
    """Run what is not finished. The content of methods.json."""
    setting, growths = prepared.setting, variants(prepared)
    runs: dict[str, dict[int, Any]] = {name: {} for name in (SCRATCH, *growths)}
    for seed in range(setting.seed, setting.seed + setting.compare.seeds):
        for name in runs:
            say(f"Seed {seed}: {name}.")
            of_name = growths.get(name, prepared)
            of_seed = dataclasses.replace(of_name, setting=dataclasses.replace(of_name.setting, seed=seed))
            runs[name][seed] = run_arm(of_seed, SCRATCH if name == SCRATCH else "weights")
    summaries = {name: summary(of_name, runs[SCRATCH], setting.compare.lag) for name, of_name in runs.items()}
    for name, of_method in growths.items():
        summaries[name]["growth"] = describe(of_method)["growth"]
    in_order = sorted(summaries, key=lambda name: summaries[name]["loss"]["lag"]["mean"])
    said = {key: value for key, value in describe(prepared).items() if key not in {"growth", "method"}}
    return {
        "setting": said,
        "methods": {name: summaries[name] for name in in_order},
        "rank_correlation_with_the_end": {moment: rank_correlation(summaries, moment) for moment in ("start", "lag")},
    }


def summary(runs: Mapping[int, Any], scratch: Mapping[int, Any], lag: int) -> dict[str, Any]:
    """The runs of one method, by seed, and their mean and deviation over seeds."""
    losses: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    for run in runs.values():
        curve = {point["step"]: point["eval_loss"] for point in run["curve"]}
        for moment, step in zip(MOMENTS, (0, lag, max(curve)), strict=True):
            losses[moment].append(curve[step])
    saved = {seed: flops_saved({SCRATCH: scratch[seed], "this": run})["this"] for seed, run in runs.items()}
    reached = [share for share in saved.values() if share is not None]
    return {
        "loss": {moment: mean_and_deviation(values) for moment, values in losses.items()},
        "flops_saved": mean_and_deviation(reached) if len(reached) == len(saved) else None,
        "flops_saved_by_seed": saved,
        "runs": dict(runs),
    }


def rank_correlation(summaries: Mapping[str, Any], moment: str) -> float | None:
    """Spearman's, over the methods (scratch left out), of the mean loss at a moment with that at the end."""
    of_methods = [entry["loss"] for name, entry in summaries.items() if name != SCRATCH]
    if len(of_methods) < 3:
        return None
    at, end = (np.argsort(np.argsort([loss[m]["mean"] for loss in of_methods])) for m in (moment, "end"))
    return correlation(at.tolist(), end.tolist())


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the best after the lag first."""
    rows: list[tuple[str, ...]] = [HEADER]
    for name, entry in results["methods"].items():
        losses = [shown(entry["loss"][moment], "{:.3f}") for moment in MOMENTS]
        growth = entry.get("growth", "").partition(":")[0]
        saved = "never reached" if entry["flops_saved"] is None else shown(entry["flops_saved"], "{:.0%}")
        missed = sum(share is None for share in entry["flops_saved_by_seed"].values())
        if 0 < missed < len(entry["runs"]):
            saved = f"not reached with {missed} of {len(entry['runs'])} seeds"
        rows.append((name, *losses, "" if name == SCRATCH else saved, growth))
    return rows


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, entries = results["setting"], results["methods"]
    small, scratch = setting["small_model"]["eval_loss"], entries[SCRATCH]["loss"]["end"]["mean"]
    said = [
        f"Held-out loss, mean ± deviation over {setting['compare']['seeds']} seeds; ranked after a lag of "
        f"{setting['compare']['lag']} of {setting['training']['steps']} steps. The small model's: {small:.3f}.",
        "FLOPs saved: 1 - (FLOPs, those of learned maps included, to scratch's final loss of the same seed) / "
        "(scratch's FLOPs). The small model's own training is not counted.",
    ]
    for moment, value in results["rank_correlation_with_the_end"].items():
        if value is not None:
            said.append(f"Rank correlation over the methods of the loss at the {moment} with the end's: {value:.2f}.")
    if scratch >= small:
        said.append(
            f"THE COMPARISON MEANS NOTHING: scratch ends at {scratch:.3f}, not below the small model's {small:.3f}. "
            "Train for longer, or from a smaller or less trained model."
        )
    return said


def mean_curves(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each method's curve averaged over seeds, as `draw_curves` takes it."""
    arms = {}
    for name, entry in results["methods"].items():
        curves = [run["curve"] for run in entry["runs"].values()]
        mean = [
            {"flops": points[0]["flops"], "eval_loss": fmean(p["eval_loss"] for p in points)}
            for points in zip(*curves, strict=True)
        ]
        arms[name] = {"curve": mean, "final_eval_loss": mean[-1]["eval_loss"]}
    return {"setting": results["setting"], "arms": arms}


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write methods.json, methods.png and methods.md."""
    write_json(folder / "methods.json", results)
    draw_curves(folder / "methods.png", mean_curves(results))
    setting, said = results["setting"], "\n".join(f"- {remark}" for remark in remarks(results))
    inexact = [f"- {n}: {e['growth']}" for n, e in results["methods"].items() if ":" in e.get("growth", "")]
    text = f"""# Methods of growth: {setting["model"]}, preset {setting["preset"]}

{as_markdown(table(results))}

![held-out loss against FLOPs, mean over seeds](methods.png)

{said}

{chr(10).join(inexact)}

All settings and all curves are in methods.json.
"""
    write_text(folder / "methods.md", text)


def run(options: argparse.Namespace) -> None:
    """Prepare, compare, report."""
    setting, target = setting_of(options), recipe.target_of(options.target)
    folder = options.out or Path("runs") / Path(setting.preset).stem
    open_folder(folder)
    say(f"Preset {setting.preset}; results go to {folder}.")
    results = compare(prepare(setting, folder, options.small, target))
    if PartialState().is_main_process:
        write(folder, results)
    say("\n" + as_text(table(results)) + "\n")
    for remark in remarks(results):
        say(f"- {remark}")
    say(f"\nWritten: {folder}/methods.json, methods.png, methods.md.")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
