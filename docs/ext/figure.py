"""docs/figures/growth.svg: four matrices of a tiny Llama before and after a growth, as blocks of what each entry holds.

    python docs/ext/figure.py docs/figures/growth.svg

The blocks are read off the plan of the growth.
"""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import growlib
from cards import WIDER, sources
from growlib.growth_plan import GrowthPlan, TensorPlan
from growlib.layouts import along, by_axes, grow_layout
from growlib.maps import Side

ZERO, NEW, SHARED, COPIED = range(4)
CLASSES = ("zero", "new", "shared", "copied")
LEGEND = ("zero", "new, without effect at first", "shared among copies", "copied")
DRAWN = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
UNIT, GAP, ARROW, MARGIN = 0.82, 26, 22, 16  # pixels: of a matrix entry, between matrices, for an arrow, around
TOP, BOTTOM = 72, 44  # above the matrices, and below
STYLE = """
  .back { fill: #ffffff } text { fill: #24292f; font: 14px sans-serif } .size { font-size: 12px; fill: #57606a }
  .copied { fill: #0b5fa5 } .shared { fill: #8ec1ec } .new { fill: #f0a830 } .zero { fill: #ffffff }
  .edge { fill: none; stroke: #57606a }
  @media (prefers-color-scheme: dark) {
    .back { fill: #1b1f27 } text { fill: #e6edf3 } .size { fill: #9da7b3 } .edge { stroke: #9da7b3 }
    .copied { fill: #4aa3f0 } .shared { fill: #23588a } .new { fill: #d9951f } .zero { fill: #1b1f27 }
  }
"""


def growth() -> GrowthPlan:
    """A growth by half in every width."""
    return growlib.plan(sources()["llama"][1], WIDER["llama"][1])


def kinds(made: TensorPlan, plan: GrowthPlan) -> Tensor:
    """What each entry of a grown matrix holds: uint8 [rows, columns]."""

    def mark_shared(part: Tensor, dim: int, axis: str, side: Side) -> Tensor:
        axis_map = plan.maps[axis]
        source = torch.from_numpy(axis_map.source).clip(0)
        several = torch.from_numpy(axis_map.copies())[source] > 1
        return part.index_select(dim, source) | (along(several, dim, part) & (side == "read"))

    grow_part = by_axes(plan, mark_shared)
    shared = grow_layout(torch.zeros(made.old_shape, dtype=torch.bool), made.layout, plan, grow_part)
    origin = plan.new_parameters()[made.name]
    held = torch.where(shared, SHARED, COPIED)
    held = torch.where(origin == growlib.Origin.FREE, NEW, held)
    return torch.where(origin == growlib.Origin.NEW, ZERO, held).to(torch.uint8)


def blocks(held: Tensor) -> Iterator[tuple[int, int, int, int, int]]:
    """Rectangles of equal entries: (x, y, width, height, kind)."""
    y = 0
    for row, equal in groupby(held.tolist()):
        height, x = len(list(equal)), 0
        for kind, run in groupby(row):
            width = len(list(run))
            yield x, y, width, height, kind
            x += width
        y += height


def matrix(held: Tensor, left: float, middle: float) -> Iterator[str]:
    """One matrix, its blocks and its edge."""
    height, width = (size * UNIT for size in held.shape)
    top = middle - height / 2
    for x, y, w, h, kind in blocks(held):
        at = f'x="{left + x * UNIT:.2f}" y="{top + y * UNIT:.2f}" width="{w * UNIT:.2f}" height="{h * UNIT:.2f}"'
        yield f'<rect class="{CLASSES[kind]}" {at}/>'
    yield f'<rect class="edge" x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}"/>'


def drawing(plan: GrowthPlan) -> str:
    """The figure."""
    made = [t for name in DRAWN for t in plan.tensors if t.name == f"model.layers.0.{name}.weight"]
    tallest = max(size for t in made for size in t.new_shape) * UNIT
    middle, left, lines = TOP + tallest / 2, float(MARGIN), []
    for tensor in made:
        old, new = (width * UNIT for width in (tensor.old_shape[1], tensor.new_shape[1]))
        shapes = " → ".join("×".join(map(str, shape)) for shape in (tensor.old_shape, tensor.new_shape))
        lines.append(f'<text x="{left:.2f}" y="44">{tensor.name.split(".")[-2]}</text>')
        lines.append(f'<text class="size" x="{left:.2f}" y="61">{shapes}</text>')
        lines += matrix(torch.full(tensor.old_shape, COPIED), left, middle)
        lines.append(f'<text x="{left + old + 4:.2f}" y="{middle + 5:.2f}">→</text>')
        lines += matrix(kinds(tensor, plan), left + old + ARROW, middle)
        left += old + ARROW + new + GAP
    width, height = left - GAP + MARGIN, TOP + tallest + BOTTOM
    x = float(MARGIN)
    there = {int(kind) for tensor in made for kind in kinds(tensor, plan).unique()}
    for number, (kind, words) in reversed(list(enumerate(zip(CLASSES, LEGEND, strict=True)))):
        if number not in there:
            continue
        at = f'x="{x:.2f}" y="{height - 26:.2f}" width="14" height="14"'
        lines.append(f'<rect class="{kind}" {at}/><rect class="edge" {at}/>')
        lines.append(f'<text x="{x + 20:.2f}" y="{height - 14:.2f}">{words}</text>')
        x += 54 + 6.6 * len(words)
    sizes = ", ".join(f"{n} {plan.old_sizes[n]} → {plan.new_sizes[n]}" for n in ("hidden", "heads", "ffn"))
    title = f"W → W′: a tiny Llama grows ({sizes.replace('ffn', 'FFN')}) and computes the same"
    lines.insert(0, f'<text x="{MARGIN}" y="20">{title}</text>')
    frame = f'width="{width:.0f}" height="{height:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {frame} viewBox="0 0 {width:.0f} {height:.0f}">'
    return "\n".join([opening, f"<title>{title}</title>", f"<style>{STYLE}</style>",
                      f'<rect class="back" {frame} rx="6"/>', *lines, "</svg>", ""])  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawing(growth()), encoding="utf-8")
