"""What a comparison of moments of growth leaves: a table, progressive.json, progressive.png, progressive.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from base.plots import draw_shares
from base.report import as_markdown, heading, shown, signed
from base.store import write_json, write_text

HEADER = ("training", "grows after", "compared at equal", "steps", "FLOPs", "loss at the end", "to constant")
NEVER = 1.0  # the moment of a model that never grows
KINDS = ("tokens", "flops")
NAMES = {"tokens": "tokens", "flops": "FLOPs"}


def middle(moments: Iterable[float]) -> float:
    """The one at which learning rates are tried."""
    ordered = sorted(moments)
    return ordered[len(ordered) // 2]


def grown(cells: Mapping[str, Any]) -> list[str]:
    """The moments at which a model grows."""
    return [moment for moment in cells if float(moment) < NEVER]


def best_moment(cells: Mapping[str, Any], kind: str) -> str:
    """The one after whose growth the mean loss is lowest."""
    return min(grown(cells), key=lambda moment: cells[moment][kind]["loss"]["mean"])


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the header first: constant sizes, then each way, its best moments in bold."""
    constant = results["constant"]
    rows: list[tuple[str, ...]] = [
        HEADER,
        ("constant", "", "", str(constant["steps"]), "1.00", shown(constant["loss"], "{:.3f}"), ""),
    ]
    for name, way in results["ways"].items():
        for kind in KINDS:
            for moment, cells in way["moments"].items():
                if kind not in cells:
                    continue
                cell, mark = cells[kind], "**" if moment == way["best_moment"][kind] else ""
                label = name if cell["grows_at"] else f"{name}, never grown"
                flops = f"{_flops(cell) / _flops(constant):.2f}"
                loss = f"{mark}{shown(cell['loss'], '{:.3f}')}{mark}"
                after = f"{mark}{moment}{mark}" if cell["grows_at"] else ""
                rows.append((label, after, NAMES[kind], str(cell["steps"]), flops, loss, signed(cell["difference"])))
    return rows


def _flops(cell: Mapping[str, Any]) -> float:
    """Those of any seed: they are equal."""
    return next(iter(cell["runs"].values()))["flops"]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, constant = results["setting"], results["constant"]
    wanted, first = setting["progressive"], setting["seed"]
    last = first + wanted["seeds"] - 1
    over = f"mean ± deviation over seeds {first} to {last}" if last > first else f"seed {first} alone"
    rewarm = f"warm up again for {wanted['rewarm']} steps" if wanted["rewarm"] else "follow the schedule"
    return [
        f"Held-out loss in nats per token, {over}; a seed sets the initial values, the growth and the order of the "
        "text.",
        f"Constant: {constant['steps']} steps of {setting['tokens_per_step']} tokens with the target's sizes "
        f"({constant['parameters']:,} parameters). FLOPs: as shares of its FLOPs. Bold: the best moment of a way.",
        f"Schedule: warm-up of {setting['training']['warmup_steps']} steps, stable, decay in the last "
        f"{wanted['decay']:.0%} of each training. New entries {rewarm}.",
        *(_start(name, way) for name, way in results["ways"].items()),
        _on_rates(results),
        *_on_text(results),
        *(_best(name, way) for name, way in results["ways"].items()),
    ]


def _start(name: str, way: Mapping[str, Any]) -> str:
    sizes = way["sizes"]
    return (
        f"{name}: begins with {sizes['layers']} layers × {sizes['hidden']}, FFN {sizes['ffn']} "
        f"({way['parameters']:,} parameters); the growth is {way['growth']}."
    )


def _on_rates(results: Mapping[str, Any]) -> str:
    """How the learning rates were found, and where a better one may lie outside."""
    seed, wanted = results["setting"]["seed"], results["setting"]["progressive"]
    rates = wanted["learning_rates"]
    if len(rates) == 1:
        return f"All train at a learning rate of {rates[0]:g}; others may do better at their own."
    found = {"constant": results["constant"]["learning_rate"]}
    found |= {name: way["learning_rate"] for name, way in results["ways"].items()}
    return (
        f"Learning rates, the best of {', '.join(f'{rate:g}' for rate in rates)} with seed {seed}, "
        f"ways at the moment {middle(wanted['moments']):g} with equal tokens: "
        + ", ".join(f"{name} {rate:g}" for name, rate in found.items())
        + ". A way that never grows has the same rate. The best rates may lie between these, or beyond."
    )


def _on_text(results: Mapping[str, Any]) -> list[str]:
    """Where a training saw text again."""
    setting, distinct = results["setting"], results["setting"]["text_used"]["distinct_training_tokens"]
    cells = [cell for way in results["ways"].values() for kinds in way["moments"].values() for cell in kinds.values()]
    seen = max(cell["steps"] for cell in [results["constant"], *cells]) * setting["tokens_per_step"]
    return [f"The longest training saw {seen:,} tokens, {distinct:,} of them distinct."] if seen > distinct else []


def _best(name: str, way: Mapping[str, Any]) -> str:
    """The best moments of a way, and whether it is below the model that never grew."""
    cells, best = way["moments"], way["best_moment"]
    said = [
        f"{signed(cells[best[kind]][kind]['difference'])} to constant at equal {NAMES[kind]} (moment {best[kind]})"
        for kind in KINDS
    ]
    alone = cells[f"{NEVER:g}"]["flops"]["loss"]["mean"]
    never = ""
    if alone < cells[best["flops"]]["flops"]["loss"]["mean"]:
        never = " THE SMALLER MODEL ENDS LOWER WITHOUT A GROWTH: for these FLOPs the target is too large."
    return f"{name}: {', '.join(said)}.{never}"


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write progressive.json, progressive.png and progressive.md."""
    write_json(folder / "progressive.json", results)
    lines = {
        f"{name}, equal {NAMES[kind]}": {float(m): way["moments"][m][kind]["loss"] for m in grown(way["moments"])}
        for name, way in results["ways"].items()
        for kind in KINDS
    }
    picture, loss = folder / "progressive.png", results["constant"]["loss"]
    draw_shares(picture, lines, {}, loss, across="share of the steps before the growth", baseline="constant")
    said = "\n".join(f"- {remark}" for remark in remarks(results))
    text = f"""{heading("Growth inside a run", results)}

{as_markdown(table(results))}

![held-out loss against the share of the steps before the growth](progressive.png)

{said}

All settings and all seeds are in progressive.json.
"""
    write_text(folder / "progressive.md", text)
