"""What a comparison of methods leaves: summaries over seeds, a ranked table, methods.json, methods.png, methods.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import numpy as np

from base.flops import flops_saved
from base.library import method_named
from base.plots import draw_curves
from base.reference import NAME, against_the_better
from base.report import (
    AGAINST_THE_BETTER,
    as_markdown,
    mean_and_deviation,
    remarks_on_text,
    shown,
    verdict_on_reference,
    verdict_on_small,
)
from base.store import write_json, write_text

SCRATCH = "scratch"
MOMENTS = ("start", "lag", "end")
HEADER = ("method", "learning rate", "loss at the start", "after the lag", "at the end", "FLOPs saved", "growth")
LEAST = 5  # methods of a rank correlation: of fewer it says nothing
BySeed = Mapping[int, Mapping[str, Any]]


def summary(runs: BySeed, scratch: BySeed, reference: BySeed, lag: int) -> dict[str, Any]:
    """The runs of one method, by seed, and their mean and deviation over seeds.

    Args:
        reference: by seed; empty where it was not trained.
    """
    losses: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    for run in runs.values():
        curve = {point["step"]: point["eval_loss"] for point in run["curve"]}
        for moment, step in zip(MOMENTS, (0, lag, max(curve)), strict=True):
            losses[moment].append(curve[step])
    saved = {seed: flops_saved({SCRATCH: scratch[seed], "this": run})["this"] for seed, run in runs.items()}
    better = {
        seed: against_the_better({SCRATCH: scratch[seed], "this": runs[seed]}, found)["flops_saved"]["this"]
        for seed, found in reference.items()
    }
    return {
        "loss": {moment: mean_and_deviation(values) for moment, values in losses.items()},
        **_over_seeds("flops_saved", saved),
        **(_over_seeds("flops_saved_against_the_better", better) if reference else {}),
        "runs": dict(runs),
    }


def _over_seeds(name: str, shares: Mapping[int, float | None]) -> dict[str, Any]:
    """The mean, where every seed has a share, and each seed's."""
    reached = [share for share in shares.values() if share is not None]
    mean = mean_and_deviation(reached) if len(reached) == len(shares) else None
    return {name: mean, f"{name}_by_seed": dict(shares)}


def rank_correlation(summaries: Mapping[str, Any], moment: str) -> float | None:
    """Spearman's, over the methods (scratch left out), of the mean loss at a moment with that at the end."""
    of_methods = [entry["loss"] for name, entry in summaries.items() if name != SCRATCH]
    if len(of_methods) < LEAST:
        return None
    at, end = (np.argsort(np.argsort([loss[m]["mean"] for loss in of_methods])) for m in (moment, "end"))
    return correlation(at.tolist(), end.tolist())


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the best after the lag first, the reference last."""
    reference = results["reference"]
    rows: list[tuple[str, ...]] = [(*HEADER, AGAINST_THE_BETTER) if reference else HEADER]
    for name, entry in results["methods"].items():
        losses = [shown(entry["loss"][moment], "{:.3f}") for moment in MOMENTS]
        growth = entry.get("growth", "").partition(":")[0]
        saved = "" if name == SCRATCH else _share(entry, "flops_saved")
        better = ("" if name == SCRATCH else _share(entry, "flops_saved_against_the_better"),) if reference else ()
        rows.append((name, f"{entry['learning_rate']:g}", *losses, saved, growth, *better))
    if reference:
        small = f"{results['setting']['small_model']['eval_loss']:.3f}"
        rows.append(
            (NAME, f"{reference['learning_rate']:g}", small, "", shown(reference["loss"], "{:.3f}"), "", "", "")
        )
    return rows


def _share(entry: Mapping[str, Any], name: str) -> str:
    by_seed = entry[f"{name}_by_seed"]
    missed = sum(share is None for share in by_seed.values())
    if 0 < missed < len(by_seed):
        return f"not reached with {missed} of {len(by_seed)} seeds"
    return "never reached" if missed else shown(entry[name], "{:.0%}")


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, entries, reference = results["setting"], results["methods"], results["reference"]
    compare, scratch_loss = setting["compare"], entries[SCRATCH]["loss"]["end"]["mean"]
    count, first = compare["seeds"], setting["seed"]
    seeds = f"mean ± deviation over {count} seeds" if count > 1 else f"seed {first} alone"
    said = [
        f"Held-out loss, {seeds}; ranked after a lag of {compare['lag']} of {setting['training']['steps']} steps.",
        *_on_rates(results),
        "FLOPs saved: 1 - (FLOPs, those of learned maps included, to scratch's final loss of the same seed) / "
        "(scratch's FLOPs). The small model's own training is not counted.",
        *remarks_on_text(setting),
    ]
    if count == 1:
        said.append("One seed: differences of a few hundredths of a nat mean nothing.")
    for moment, value in results["rank_correlation_with_the_end"].items():
        if value is not None:
            said.append(f"Rank correlation over the methods of the loss at the {moment} with the end's: {value:.2f}.")
    said.append(verdict_on_small(scratch_loss, setting["small_model"]["eval_loss"]))
    if reference:
        said.append(verdict_on_reference(scratch_loss, reference["loss"]["mean"]))
    return said


def _on_rates(results: Mapping[str, Any]) -> Iterable[str]:
    """How the learning rates were found, and where a better one may lie outside."""
    rates, entries = sorted(results["setting"]["compare"]["learning_rates"]), results["methods"]
    if len(rates) == 1:
        return [f"All train at a learning rate of {rates[0]:g}; others may do better at their own."]
    tried = ", ".join(f"{rate:g}" for rate in rates)
    seed = results["setting"]["seed"]
    said = [f"Each trains at its own best learning rate of {tried}: the lowest loss at the end with seed {seed}."]
    for edge, word in ((rates[0], "lowest"), (rates[-1], "highest")):
        names = [name for name, entry in entries.items() if entry["learning_rate"] == edge]
        if names:
            said.append(f"The {word} rate is the best of {', '.join(names)}: a better one may lie beyond.")
    return said


def mean_curves(results: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The curve of each method, and of the reference, averaged over seeds."""
    named = results["methods"] | ({NAME: results["reference"]} if results["reference"] else {})
    curves = {}
    for name, entry in named.items():
        by_seed = [run["curve"] for run in entry["runs"].values()]
        curves[name] = [
            {"flops": points[0]["flops"], "eval_loss": fmean(p["eval_loss"] for p in points)}
            for points in zip(*by_seed, strict=True)
        ]
    return curves


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write methods.json, methods.png and methods.md."""
    write_json(folder / "methods.json", results)
    setting, said = results["setting"], "\n".join(f"- {remark}" for remark in remarks(results))
    draw_curves(folder / "methods.png", mean_curves(results), setting["small_model"]["eval_loss"])
    of_methods = {name: entry for name, entry in results["methods"].items() if name != SCRATCH}
    inexact = [f"- {name}: {entry['growth']}" for name, entry in of_methods.items() if ":" in entry["growth"]]
    sources = [f"- {name}: {method_named(name).source}" for name in of_methods]
    text = f"""# Methods of growth: {setting["model"]}, preset {setting["preset"]}

{as_markdown(table(results))}

![held-out loss against FLOPs, mean over seeds](methods.png)

{said}

{chr(10).join(inexact)}

Sources:

{chr(10).join(sources)}

All settings and all curves are in methods.json.
"""
    write_text(folder / "methods.md", text)
