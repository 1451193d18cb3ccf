"""What a comparison of arms leaves: a table, results.json, curves.png, report.md."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from base.flops import flops_saved
from base.store import write_json, write_text

HEADER = (
    "arm",
    "held-out loss",
    "FLOPs",
    "of which teacher",
    "seconds",
    "FLOPs saved",
    "small model counted",
)


def results_of(setting: Mapping[str, Any], arms: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json."""
    return {"setting": dict(setting), "arms": dict(arms), "flops_saved": flops_saved(arms)}


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the comparison as text, the header first, then the small model and one row per arm."""
    small, arms = results["setting"]["small_model"], results["arms"]
    with_small = flops_saved(arms, small["flops"]) if small["flops"] is not None else dict.fromkeys(arms)
    rows: list[tuple[str, ...]] = [
        HEADER,
        ("(small)", f"{small['eval_loss']:.3f}", *_cost(small["flops"], 0, small["seconds"]), "", ""),
    ]
    for arm, result in arms.items():
        flops = result["flops"]
        cost = _cost(flops["student"] + flops["teacher"], flops["teacher"], result["seconds"])
        saved = (
            ("", "") if arm == "scratch" else (_saved(results, arm), _share(with_small[arm], small["flops"] is None))
        )
        rows.append((arm, f"{result['final_eval_loss']:.3f}", *cost, *saved))
    return rows


def _cost(flops: float | None, teacher: float, seconds: float | None) -> tuple[str, str, str]:
    shown = "unknown" if flops is None else f"{flops:.3g}"
    return shown, f"{teacher:.2g}" if teacher else "", "unknown" if seconds is None else f"{seconds:.0f}"


def _saved(results: Mapping[str, Any], arm: str) -> str:
    return _share(results["flops_saved"][arm], unknown="scratch" not in results["arms"])


def _share(share: float | None, unknown: bool) -> str:
    if unknown:
        return "unknown"
    return "never reached" if share is None else f"{round(share, 2) + 0.0:.0%}"


def as_text(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """The same rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def mean_and_deviation(values: list[float]) -> dict[str, float | None]:
    """Over seeds; one seed has no deviation."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None}


def shown(value: Mapping[str, float | None], form: str) -> str:
    """Mean ± deviation."""
    spread = value["deviation"]
    return form.format(value["mean"]) + ("" if spread is None else " ± " + form.format(spread))


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, arms = results["setting"], results["arms"]
    small_loss = setting["small_model"]["eval_loss"]
    said = [
        "FLOPs saved: 1 - (FLOPs, the teacher's included, at which the arm first reaches scratch's final "
        "held-out loss, linear between two evaluations) / (scratch's FLOPs). The last column adds the small "
        "model's own training to the arm's.",
        f"Start of the grown arms: method {setting['method']}, {setting['growth']}.",
    ]
    if "scratch" not in arms:
        return [*said, "Arm scratch is missing, so nothing can be said about savings."]
    scratch_loss = arms["scratch"]["final_eval_loss"]
    if scratch_loss < small_loss:
        verdict = f"Scratch ends at {scratch_loss:.3f}, below the small model's {small_loss:.3f}, as it must."
    else:
        verdict = (
            f"THE COMPARISON MEANS NOTHING: scratch ends at {scratch_loss:.3f}, not below the small model's "
            f"{small_loss:.3f}. Who has the small model has no reason to train the larger one so briefly; "
            "train the arms for longer."
        )
    return [*said, verdict]


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, curves.png and report.md into a folder."""
    write_json(folder / "results.json", results)
    draw_curves(folder / "curves.png", results)
    setting = results["setting"]
    said = "\n".join(f"- {remark}" for remark in remarks(results))
    text = f"""# Growing {setting["model"]}: {", ".join(results["arms"])}

Preset {setting["preset"]}, seed {setting["seed"]}, {setting["training"]["steps"]} steps of \
{setting["tokens_per_step"]} tokens per arm, the same tokens in the same order; learning rates \
{", ".join(f"{arm} {rate:g}" for arm, rate in setting["learning_rate"].items())}.

{as_markdown(table(results))}

![held-out loss against FLOPs](curves.png)

{said}

All settings and all curves are in results.json.
"""
    write_text(folder / "report.md", text)


def draw_curves(path: Path, results: Mapping[str, Any]) -> None:
    """Held-out loss against FLOPs, with the small model's loss and scratch's final loss as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="FLOPs, the teacher's included", ylabel="held-out loss, nats per token")
    small_loss = results["setting"]["small_model"]["eval_loss"]
    for arm, result in results["arms"].items():
        points = result["curve"]
        axes.plot([p["flops"] for p in points], [p["eval_loss"] for p in points], label=arm)
    axes.axhline(small_loss, color="grey", linestyle=":", label="small model")
    finals = [result["final_eval_loss"] for result in results["arms"].values()]
    if "scratch" in results["arms"]:
        axes.axhline(results["arms"]["scratch"]["final_eval_loss"], color="grey", linestyle="--", label="scratch's end")
    axes.set_ylim(min([small_loss, *finals]) - 0.1, max([small_loss, *finals]) + 1.0)
    axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)
