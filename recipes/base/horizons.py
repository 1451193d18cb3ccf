"""What arms over several lengths of training leave: a table, tokens.json, tokens.png, tokens.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from base.flops import flops_saved
from base.plots import draw_horizons
from base.reference import NAME
from base.report import as_markdown, heading, mean_and_deviation, shown, signed
from base.store import write_json, write_text

HEADER = ("tokens per parameter", "steps", "arm", "loss at the end", "to scratch", "FLOPs saved", "small model counted")
SAVED = {"saved": "FLOPs saved", "saved_in_all": "small model counted"}


def middle(horizons: Iterable[float]) -> float:
    """The one at which learning rates are tried."""
    ordered = sorted(horizons)
    return ordered[(len(ordered) - 1) // 2]


def over_seeds(runs: Mapping[int, Mapping[str, Any]], small_flops: Mapping[int, float]) -> dict[str, Any]:
    """Each arm at one length of training: its loss, the difference to scratch of the same seed, and what it saves.

    Args:
        runs: by seed, the results of the arms and of the reference by name, scratch among them.
        small_flops: by seed, what the small model cost; every arm but scratch is charged with it.
    """
    shares = {seed: (flops_saved(of_seed), flops_saved(of_seed, small_flops[seed])) for seed, of_seed in runs.items()}
    found = {}
    for name in next(iter(runs.values())):
        losses = {seed: of_seed[name]["final_eval_loss"] for seed, of_seed in runs.items()}
        to_scratch = [loss - runs[seed]["scratch"]["final_eval_loss"] for seed, loss in losses.items()]
        saved = {kind: {seed: both[i][name] for seed, both in shares.items()} for i, kind in enumerate(SAVED)}
        found[name] = {
            "loss": mean_and_deviation(list(losses.values())),
            "to_scratch": mean_and_deviation(to_scratch),
            **{kind: _mean(by_seed) for kind, by_seed in saved.items()},
            "by_seed": {seed: {"loss": loss, **{k: saved[k][seed] for k in SAVED}} for seed, loss in losses.items()},
        }
    return found


def _mean(shares: Mapping[int, float | None]) -> dict[str, float | None] | None:
    """Of the shares, where every seed has one."""
    reached = [share for share in shares.values() if share is not None]
    return mean_and_deviation(reached) if len(reached) == len(shares) else None


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the header first."""
    rows: list[tuple[str, ...]] = [HEADER]
    for horizon, point in results["horizons"].items():
        for name, arm in point["arms"].items():
            first = name == "scratch"
            saved = ("", "") if name in ("scratch", NAME) else tuple(_share(arm[kind]) for kind in SAVED)
            to_scratch = "" if first else signed(arm["to_scratch"])
            row = (name, shown(arm["loss"], "{:.3f}"), to_scratch, *saved)
            rows.append((horizon if first else "", str(point["steps"]) if first else "", *row))
    return rows


def _share(saved: Mapping[str, float | None] | None) -> str:
    return "not reached" if saved is None else shown({k: v and 100 * v for k, v in saved.items()}, "{:.0f}") + " %"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, rates = results["setting"], results["learning_rates"]
    wanted, first = setting["tokens"], setting["seed"]
    spread = f"mean ± deviation over seeds {first} to {first + wanted['seeds'] - 1}"
    tried = ", ".join(f"{rate:g}" for rate in wanted["learning_rates"])
    return [
        f"Held-out loss in nats per token, {spread if wanted['seeds'] > 1 else f'seed {first} alone'}. To scratch: the "
        "difference to scratch with the same seed and as many tokens.",
        f"The target has {results['parameters']:,} parameters, embeddings included; the small model "
        f"{results['small']:,}, and {wanted['small_share']:g} of the arms' steps. Teachers: "
        f"{', '.join(teacher['name'] for teacher in setting['teachers'])}.",
        "FLOPs saved: 1 - (FLOPs to reach scratch's last loss) / (scratch's FLOPs), the teacher's included. Not "
        "reached: with one of the seeds at least.",
        f"Learning rates are each arm's best of {tried}, with seed {first} at "
        f"{middle(wanted['per_parameter']):g} tokens per parameter: "
        f"{', '.join(f'{name} {rate:g}' for name, rate in rates.items())}."
        if len(wanted["learning_rates"]) > 1
        else f"All train at a learning rate of {tried}; others may do better at their own.",
        f"{setting['text_used']['distinct_training_tokens']:,} distinct tokens, seen up to "
        f"{results['passes']:.1f} times. {NAME}: the small model, trained on for the FLOPs of the costliest arm.",
    ]


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write tokens.json, tokens.png and tokens.md into a folder."""
    write_json(folder / "tokens.json", results)
    points = {float(horizon): point["arms"] for horizon, point in results["horizons"].items()}
    names = [name for name in next(iter(points.values())) if name != "scratch"]
    lines = {name: {horizon: arms[name]["to_scratch"] for horizon, arms in points.items()} for name in names}
    draw_horizons(folder / "tokens.png", lines, "tokens per parameter")
    said = "\n".join(f"- {remark}" for remark in remarks(results))
    text = f"""{heading("Tokens per parameter", results)}

{as_markdown(table(results))}

![loss less that of scratch, against tokens per parameter](tokens.png)

{said}
"""
    write_text(folder / "tokens.md", text)
