"""The curves of a comparison. A name has one colour and one line in every figure."""

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="FLOPs, the teacher's included", ylabel="held-out loss, nats per token")
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
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)
