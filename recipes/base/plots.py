"""The curves of a comparison, and losses against shares. A name has one colour and one line in every figure."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import growlib
from base.reference import NAME

FIXED = {  # no method has these
    "scratch": {"color": "black"},
    NAME: {"color": "grey", "linestyle": "-."},
    "weights": {"color": "tab:blue"},
    "knowledge": {"color": "tab:orange"},
    "both": {"color": "tab:green"},
}
DASHES = ("--", ":", (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
Spread = Mapping[str, float | None]  # mean and deviation over seeds


def style_of(name: str) -> dict[str, Any]:
    """The colour and the line of an arm or a method: the colour says the width, the line the depth."""
    from matplotlib import colormaps

    if name in FIXED:
        return dict(FIXED[name])
    names = [row.name for row in growlib.methods()]
    width, _, depth = name.partition("+")
    number = names.index(width) if width in names else len(names)
    style: dict[str, Any] = {"color": colormaps["turbo"](0.07 + 0.9 * number / len(names))}
    if depth:
        style["linestyle"] = DASHES[(names.index(depth) if depth in names else len(names)) % len(DASHES)]
    return style


def draw_curves(path: Path, curves: Mapping[str, Iterable[Mapping[str, Any]]], small_loss: float) -> None:
    """Held-out loss against FLOPs, a line for each name, with the small model's loss and scratch's final one."""
    figure, axes = _new("FLOPs, the teacher's included")
    finals = {}
    for name, curve in curves.items():
        points = list(curve)
        finals[name] = points[-1]["eval_loss"]
        axes.plot([p["flops"] for p in points], [p["eval_loss"] for p in points], label=name, **style_of(name))
    axes.axhline(small_loss, color="grey", linestyle=":", label="small model")
    if "scratch" in finals:
        axes.axhline(finals["scratch"], color="black", linewidth=0.8, linestyle="--", label="scratch's end")
    ends = [small_loss, *finals.values()]
    axes.set_ylim(min(ends) - 0.1, max(ends) + 1.0)
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_shares(
    path: Path,
    lines: Mapping[str, Mapping[float, Spread]],
    alone: Mapping[str, Spread],
    scratch: Spread,
    *,
    across: str = "share of the budget that trains the small model",
    baseline: str = "scratch",
) -> None:
    """Held-out loss against the share of a training, a line for each growth, with the seeds' deviation.

    Args:
        lines: share -> loss, by growth.
        alone: the loss of each growth's small model with the whole budget; a growth may be missing.
        scratch: the loss without a small model, called `baseline`.
    """
    figure, axes = _new(across)
    for number, (name, by_share) in enumerate(lines.items()):
        color = f"C{number}"
        means, spreads = zip(*((loss["mean"], loss["deviation"] or 0.0) for loss in by_share.values()), strict=True)
        axes.errorbar(list(by_share), means, spreads, label=name, color=color, marker="o", markersize=3, capsize=3)
        if name in alone:
            label = f"{name}, never grown"
            axes.plot([1.0], [alone[name]["mean"]], color=color, marker="s", linestyle="", label=label)
    mean, spread = scratch["mean"], scratch["deviation"] or 0.0
    assert mean is not None
    axes.axhline(mean, **FIXED["scratch"], linewidth=0.8, label=baseline)
    axes.axhspan(mean - spread, mean + spread, **FIXED["scratch"], alpha=0.1)
    axes.set_xlim(0.0, 1.05)
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_horizons(path: Path, lines: Mapping[str, Mapping[float, Spread]], across: str) -> None:
    """The difference of each arm's loss to scratch against the length of training, with the seeds' deviation."""
    figure, axes = _new(across, "held-out loss less that of scratch, nats per token")
    for name, differences in lines.items():
        means, spreads = zip(*((one["mean"], one["deviation"] or 0.0) for one in differences.values()), strict=True)
        axes.errorbar(
            list(differences), means, spreads, label=name, marker="o", markersize=3, capsize=3, **style_of(name)
        )
    axes.axhline(0.0, **FIXED["scratch"], linewidth=0.8, label="scratch")
    axes.set_xscale("log")
    axes.set_xticks(list(next(iter(lines.values()))), [f"{at:g}" for at in next(iter(lines.values()))])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    _save(figure, path)


def _new(across: str, up: str = "held-out loss, nats per token") -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(xlabel=across, ylabel=up)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)
