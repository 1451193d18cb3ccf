"""What a comparison of shares of a budget leaves: a table, when.json, when.png, when.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from base.command import counted
from base.plots import draw_shares
from base.report import as_markdown, heading, shown, signed
from base.store import write_json, write_text

HEADER = ("growth", "share", "steps, small", "steps, grown", "small model's loss", "loss at the end", "to scratch")
NEVER = 1.0  # the share of a small model that gets the whole budget and never grows


def grown_shares(shares: Iterable[float]) -> list[float]:
    """Those that leave something for the target, in order."""
    return sorted(share for share in shares if share < NEVER)


def middle_share(shares: Iterable[float]) -> float:
    """The one at which learning rates are tried."""
    grown = grown_shares(shares)
    return grown[len(grown) // 2]


def best_share(cells: Mapping[str, Any]) -> str:
    """The share after whose growth the mean loss is lowest."""
    return min((share for share in cells if float(share) < NEVER), key=lambda share: cells[share]["loss"]["mean"])


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the header first: scratch, then each growth with each share, its best one in bold."""
    setting, scratch = results["setting"], results["scratch"]
    steps = str(setting["training"]["steps"])
    rows: list[tuple[str, ...]] = [HEADER, ("scratch", "0", "", steps, "", shown(scratch["loss"], "{:.3f}"), "")]
    for factor, growth in results["growths"].items():
        for share, cell in growth["shares"].items():
            grown, mark = cell["steps"]["grown"], "**" if share == growth["best_share"] else ""
            end = f"{mark}{shown(cell['loss'], '{:.3f}')}{mark}"
            before = shown(cell["small_loss"], "{:.3f}") if grown else ""
            name = factor if grown else f"{factor}, never grown"
            counts = (str(cell["steps"]["small"]), str(grown or ""))
            rows.append((name, f"{mark}{share}{mark}", *counts, before, end, signed(cell["difference"])))
    return rows


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, budget, growths = results["setting"], results["budget"], results["growths"]
    count, first, steps = setting["when"]["seeds"], setting["seed"], setting["training"]["steps"]
    spread = f"mean ± deviation over seeds {first} to {first + count - 1}" if count > 1 else f"seed {first} alone"
    said = [
        f"Held-out loss in nats per token, {spread}; a seed sets the initial values, the growth and the order of the "
        "text. To scratch: the difference to scratch with the same seed.",
        f"The budget: {budget['flops']:.3g} FLOPs, what {steps} steps of {setting['tokens_per_step']} tokens of the "
        f"target cost ({budget['parameters']:,} parameters). Each row spends it to within a step of the target.",
        f"Growth: the target's parameters, embeddings included, over the small model's: {_sizes(growths)}.",
        "Bold: the best share of a growth. With a share of 1 the small model gets the whole budget and never grows.",
        *(f"Start after {factor}: method {setting['method']}, {one['start']}." for factor, one in growths.items()),
        *_on_rates(results),
        *_on_text(results),
        *(_best(factor, one) for factor, one in growths.items()),
    ]
    if count == 1:
        said.append("One seed: differences of a few hundredths of a nat mean nothing.")
    return said


def _sizes(growths: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{factor} from {counted(one['sizes']['layers'], 'layer', 'layers')} × {one['sizes']['hidden']}, FFN "
        f"{one['sizes']['ffn']} ({one['parameters']:,})"
        for factor, one in growths.items()
    )


def _on_rates(results: Mapping[str, Any]) -> list[str]:
    """How the learning rates were found, and where a better one may lie outside."""
    setting, rates = results["setting"], results["setting"]["when"]["learning_rates"]
    if len(rates) == 1:
        return [f"All train at a learning rate of {rates[0]:g}; others may do better at their own."]
    found = {"scratch": results["scratch"]["learning_rate"]}
    for factor, one in results["growths"].items():
        found |= {f"the small model of {factor}": one["learning_rate"]["small"]}
        found |= {f"what is grown {factor}": one["learning_rate"]["grown"]}
    edges = [name for name, rate in found.items() if rate in (min(rates), max(rates))]
    said = [
        f"Each trains at its own best learning rate of {', '.join(f'{rate:g}' for rate in rates)}: the lowest loss at "
        f"the end with seed {setting['seed']}, with small and grown models at a share of "
        f"{middle_share(setting['when']['shares']):g}. " + ", ".join(f"{n} {rate:g}" for n, rate in found.items()) + "."
    ]
    if edges:
        said.append(f"At the edge of the rates, so that a better one may lie beyond: {', '.join(edges)}.")
    return said


def _on_text(results: Mapping[str, Any]) -> list[str]:
    """Where a training saw text again."""
    setting, distinct = results["setting"], results["setting"]["text_used"]["distinct_training_tokens"]
    cells = [cell for one in results["growths"].values() for cell in one["shares"].values()]
    most = max(setting["training"]["steps"], *(max(cell["steps"].values()) for cell in cells))
    seen = most * setting["tokens_per_step"]
    return [f"The longest training saw {seen:,} tokens, {distinct:,} of them distinct."] if seen > distinct else []


def _best(factor: str, growth: Mapping[str, Any]) -> str:
    """The best share of a growth, and whether it is below scratch and below the small model that never grew."""
    share, cells = growth["best_share"], growth["shares"]
    said = f"{factor}: best with a share of {share}, {signed(cells[share]['difference'])} to scratch."
    alone = cells.get(f"{NEVER:g}")
    if alone and alone["loss"]["mean"] < cells[share]["loss"]["mean"]:
        said += " THE SMALL MODEL ENDS LOWER WITHOUT A GROWTH: for this budget the target is too large."
    return said


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write when.json, when.png and when.md."""
    write_json(folder / "when.json", results)
    growths = results["growths"]
    lines = {
        factor: {float(s): cell["loss"] for s, cell in one["shares"].items() if float(s) < NEVER}
        for factor, one in growths.items()
    }
    never = f"{NEVER:g}"
    alone = {factor: one["shares"][never]["loss"] for factor, one in growths.items() if never in one["shares"]}
    draw_shares(folder / "when.png", lines, alone, results["scratch"]["loss"])
    said = "\n".join(f"- {remark}" for remark in remarks(results))
    text = f"""{heading("When to grow", results)}

{as_markdown(table(results))}

![held-out loss against the share of the budget that trains the small model](when.png)

{said}

All settings and all seeds are in when.json.
"""
    write_text(folder / "when.md", text)
