"""Experts that are stacked in one tensor: [experts, .., ..]."""

from torch import nn

from growlib.inference.draft import FIXED, Draft, raw_if
from growlib.layouts import Dim, Layout


def expert_count(state: Draft, name: str, module: nn.Module) -> int | None:
    """How many experts a module holds, stacked in tensors of three dimensions."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or state.is_elsewhere(name):
        return None
    stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3} - {1, state.hidden}
    return stacked.pop() if len(stacked) == 1 else None


def expert_layout(state: Draft, name: str, kind: str, shape: tuple[int, ...]) -> Layout:
    """Stacked experts: [experts, .., ..], the feed-forward maps of all of them, and [experts, ..], their biases."""
    own = kind != "weight"  # else the module is named: JetMoE's input_linear and output_linear
    said = kind if own else name.rpartition(".")[2]
    down = any(word in said for word in ("down", "output", "w2"))
    experts = Dim(((state.axis("experts", shape[0], "experts", name),),), "read" if down else "write")
    if state.hidden not in shape[1:] and (len(shape) == 3 or down):
        return (experts, *(FIXED,) * (len(shape) - 1))
    other = next((size for size in shape[1:] if size != state.hidden), state.hidden)
    if len(shape) == 2 and down:
        return (experts, Dim((("hidden",),), "write"))
    paired = "gate_up" in said or (not own and not down and _is_paired(state, name, other))
    ffn = other // 2 if paired and not down else other
    axis = state.axis("expert_ffn", ffn, "elementwise", name)
    if len(shape) == 2:
        return (experts, Dim(((axis,),) * (other // ffn), "write"))
    unit = Dim(((axis,),) * (other // ffn), "read" if down else "write")
    stream = Dim((("hidden",),), "write" if down else "read")
    stream = raw_if(state, name, stream)
    return (experts, stream, unit) if shape[1] == state.hidden else (experts, unit, stream)


def _is_paired(state: Draft, name: str, length: int) -> bool:
    """Whether stacked experts in a module beside this one have half as many units: those of gate and up, halved."""
    beside = state.model.get_submodule(name.rpartition(".")[0]).children()
    stacked = [p.shape[1:] for module in beside for p in module.parameters(recurse=False) if p.ndim == 3]
    return any(2 * size == length for shape in stacked for size in shape if size != state.hidden)
