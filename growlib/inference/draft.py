"""What one forward pass of a tiny model says: which module reads which, what each norm stands before and behind."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor, nn
from transformers import PreTrainedModel

from growlib.architectures.schema import Stack, without_numbers
from growlib.checkpoint.loading import skeleton
from growlib.errors import GrowError
from growlib.growth_plan import Skeleton
from growlib.inference import probe
from growlib.inference.probe import Norm, Trace
from growlib.inference.rows import Unresolved
from growlib.inference.sizes import Build
from growlib.layouts import Dim, Layout
from growlib.parts import part_in, text_part

FIXED = Dim((("fixed",),), "write")  # a length that never grows
HINTS = {"heads": "head", "kv_heads": "k", "query": "head_dim", "key": "head_dim", "value": "head_dim"}


@dataclass
class Draft:
    """What is known so far. Rows are base-model tensor names with `*` for the layer's number."""

    model: PreTrainedModel
    hidden: int
    stacks: list[Stack]
    seen: Trace
    norms: dict[str, Norm]  # by module name
    rows: dict[str, Layout] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)
    normed: dict[str, bool] = field(default_factory=dict)  # axes of queries and keys: whether a norm reads each head
    outputs: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = field(default_factory=dict)  # module -> parts, by
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)  # module -> axes
    part: str = ""  # of the config, whose axes are looked for; "": the text and the top level
    known: tuple[Stack, ...] = ()  # stacks of which it is known what makes a block the identity
    streams: dict[int, str] = field(default_factory=dict)  # width -> axis, of norms over neither hidden nor heads

    def __post_init__(self) -> None:
        self.prefix = skeleton(self.model).prefix

    def row_of(self, name: str) -> str:
        """The row of a base-model tensor name."""
        for stack in self.stacks:
            layer = stack.layer_of(name)
            if layer is not None:
                return stack.row_of(name, layer)
        return name

    def grows(self, module: str) -> bool:
        """Whether a module belongs to the part: to the text what runs without an image, to a tower what does not."""
        return module in self.seen.on_text if not self.part else module in self.seen.on_media

    def is_elsewhere(self, name: str) -> bool:
        """Whether a module belongs to another part: nothing in it runs on text alone; for a tower, it does."""
        if not self.seen.with_media:
            return False
        if self.part:
            return name in self.seen.on_text or not name
        return not any(ran == name or ran.startswith(name + ".") for ran in self.seen.on_text)

    def key(self, module: str) -> str:
        """A module's name with `*` for the layer's number."""
        return self.row_of(module.removeprefix(self.prefix) + ".")

    def stack_of(self, module: str) -> Stack | None:
        name = module.removeprefix(self.prefix) + "."
        return next((stack for stack in self.stacks if stack.layer_of(name) is not None), None)

    def axis(self, name: str, size: int, role: str, module: str, normed: bool = False) -> str:
        """An axis of this size for a module: one of its own in each stack, for each size, and behind a norm."""
        stack = self.stack_of(module)
        first = self.stacks[0] if self.stacks else None
        scope = "" if stack in (None, first) else re.split(r"\W", stack.block)[0] + "_" if stack else ""
        for number in range(1, 9):
            full = scope + name + (f"_{number}" if number > 1 else "")
            if self.sizes.setdefault(full, size) == size and self.normed.setdefault(full, normed) == normed:
                self.roles.setdefault(full, role)
                self.hints.setdefault(full, HINTS.get(name, name))
                scoped = stack or first
                word = re.split(r"\W", scoped.block)[0] if scoped else ""
                if len(self.stacks) > 1 or word in ("encoder", "decoder"):
                    self.hints[full] = f"{word} {self.hints[full]}"
                return full
        raise Unresolved


def stacks_of(base: Skeleton, others: list[Build]) -> list[Stack]:
    """The lists of modules that get longer with a config field."""
    lists: dict[str, str] = {}
    for build in others:
        for prefix, count in _lengths(build.skeleton).items():
            if count > _lengths(base).get(prefix, count):
                lists.setdefault(prefix, build.field)
    text = text_part(base.config)
    order = sorted(lists.items(), key=lambda item: part_in(item[1]) != text)
    return [Stack(layers, f"{prefix}*.", ()) for prefix, layers in order]


def _lengths(model: Skeleton) -> dict[str, int]:
    layers: dict[str, set[str]] = {}
    for name in model.shapes:
        if match := re.match(r"(.*?\.|)(\d+)\.", model.base(name)):
            layers.setdefault(match.group(1), set()).add(match.group(2))
    return {prefix: len(numbers) for prefix, numbers in layers.items()}


def width_of(model: PreTrainedModel, stacks: list[Stack], prefix: str, seen: Trace) -> int:
    for stack in stacks:
        block = prefix + stack.block.replace("*.", "0")
        if block in seen.outputs:
            return seen.outputs[block].shape[-1]
    widths = Counter(p.shape[0] for p in model.parameters() if p.ndim == 1)
    return widths.most_common(1)[0][0]


def norm_after(state: Draft, name: str) -> str | None:
    """The norm that reads a module's output as it is; None where there is none, or no such module."""
    if name not in state.seen.outputs:
        return None
    written = probe.rows(state.seen.outputs[name])
    for norm in state.norms:
        if probe.rows(state.seen.inputs[norm]) == written:
            return norm
    return None


def norm_before(state: Draft, given: set[bytes]) -> str | None:
    """The norm with a weight whose output is read here."""
    for norm, facts in state.norms.items():
        if facts.scale and given <= probe.rows(state.seen.outputs[norm]):
            return norm
    return None


def is_post_norm(state: Draft) -> bool:
    return any(stack.last_norm for stack in state.stacks)


def is_hidden(state: Draft, norm: str) -> bool:
    return state.grows(norm) and state.seen.inputs[norm].shape[-1] == state.hidden and not writes_unit(state, norm)


def writer_of(state: Draft, norm: str) -> str | None:
    """The linear map whose output the norm reads as it is: its rows, or whole heads of them.

    Heads that are rotated before the norm are as they are at the first position.
    """
    given = state.seen.inputs[norm]
    rows = probe.rows(given)
    for name, module in state.model.named_modules():
        if not probe.is_linear(module) or name not in state.seen.outputs:
            continue
        written = state.seen.outputs[name]
        if written.shape[-1] % given.shape[-1] == 0:
            heads = probe.rows(written.reshape(*written.shape[:-1], -1, given.shape[-1]))
            if rows <= heads or (given.shape[-1] != state.hidden and rows & heads):
                return name
    return None


def writes_unit(state: Draft, norm: str) -> bool:
    """The norm reads a linear map whose rows are known: queries, keys, units."""
    writer = writer_of(state, norm)
    return writer is not None and state.key(writer) in state.outputs


def parts_read(state: Draft, norm: str) -> list[tuple[str, ...]]:
    """The parts of a linear map's output, such as its queries, whose heads the norm reads as they are."""
    writer = writer_of(state, norm) or ""
    parts, by = state.outputs[state.key(writer)]
    given, written = state.seen.inputs[norm], state.seen.outputs[writer]
    turns = state.sizes[by] if by else 1
    counts = [prod(state.sizes[axis] for axis in part) // turns for part in parts]
    if len(parts) < 2 or turns * sum(counts) != written.shape[-1]:
        return list(parts)
    chunks = written.reshape(*written.shape[:-1], turns, -1).split(counts, dim=-1)
    width = given.shape[-1]
    heads = [probe.rows(chunk.reshape(-1, width)) if chunk.shape[-1] % width == 0 else set() for chunk in chunks]
    return [part for part, rows in zip(parts, heads, strict=True) if probe.rows(given) & rows]


def is_branch(state: Draft, norm: str) -> bool:
    """A norm between a block's last linear map and the residual sum."""
    return writer_of(state, norm) is not None


def feeds(state: Draft, norm: str) -> bool:
    """The norm's output is read by maps, and does not go to the residual stream."""
    written = probe.rows(state.seen.outputs[norm])
    order = [name for name in state.seen.outputs if state.grows(name)]
    blocks = [order.index(n) for n in order if any(is_block(state, n, stack) for stack in state.stacks)]
    if blocks and norm in order and order.index(norm) > max(blocks):
        return True
    for name, given in state.seen.inputs.items():
        stack_parts = [state.prefix + stack.block.partition("*")[0] for stack in state.stacks]
        holds_blocks = any(part.startswith(name + ".") or part.rstrip(".") == name for part in stack_parts)
        if name in state.norms or holds_blocks or any(is_block(state, name, stack) for stack in state.stacks):
            continue
        if given.shape[-1] == state.seen.outputs[norm].shape[-1] and probe.rows(given) <= written:
            return True
    return False


def is_block(state: Draft, name: str, stack: Stack) -> bool:
    pattern = re.escape(state.prefix + stack.block.rstrip(".")).replace(r"\*", r"\d+")
    return re.fullmatch(pattern, name) is not None


def head_norm_of(state: Draft) -> str:
    """The last norm over what the head reads."""
    head = state.model.get_output_embeddings()
    width = head.in_features if isinstance(head, nn.Linear) else state.hidden
    ran = [name for name in state.seen.outputs if state.grows(name)]
    over = [
        n for n in state.norms if n in ran and state.seen.inputs[n].shape[-1] == width and not writes_unit(state, n)
    ]
    return max((norm for norm in over if state.norms[norm].scale), key=ran.index, default="")


def refuse_unseen(state: Draft) -> None:
    """Raise GrowError where a part has no layers, or layers that do not run on what growlib shows the model."""
    asked = f"inferring the table of the {state.part} of {type(state.model).__name__}"
    if not state.stacks:
        raise GrowError(asked, "no number in it says how many layers there are", "the growth of another part")
    for stack in state.stacks:
        if state.prefix + stack.block.replace("*.", "0") not in state.seen.outputs:
            name = stack.block.removesuffix(".*.")
            wrong = f"{name} does not run on the images or sounds that growlib can make"
            raise GrowError(asked, wrong, "the growth of another part")


def merged(state: Draft, size: int) -> str:
    """In a tower, the axis of how many vectors of its width stand side by side in a dimension; "" where none do."""
    times, rest = divmod(size, state.hidden)
    return "" if not state.part or rest or times < 2 else state.axis("merged", times, "", "")


def side_by_side(state: Draft, name: str, dim: Dim) -> Dim:
    """The dimension that a module reads: patches one after the other, or channels where the model has them so."""
    given = state.seen.inputs.get(name)
    if len(dim.parts[0]) < 2 or given is None or dim.parts[0][1] != "hidden":
        return dim
    turned = replace(dim, parts=(dim.parts[0][::-1],))
    written = set().union(*(probe.rows(out) for out in state.seen.outputs.values() if out.shape[-1] == state.hidden))
    here, there = (len(vectors(given, each, state.hidden) & written) for each in (dim, turned))
    return turned if there > here else dim


def vectors(given: Tensor, dim: Dim, width: int) -> set[bytes]:
    """The vectors that stand side by side in what is read."""
    if dim.parts[0][-1] == "hidden":
        return probe.rows(given.reshape(*given.shape[:-1], -1, width))
    return probe.rows(given.reshape(*given.shape[:-1], width, -1).transpose(-1, -2))


def raw_if(state: Draft, name: str, dim: Dim) -> Dim:
    """The axis `raw` where a map reads the residual stream without a norm's weight before it."""
    if dim.side != "read" or not {"hidden"} <= set(dim.parts[0]) or is_post_norm(state):
        return dim
    if state.model.get_output_embeddings() is state.model.get_submodule(name) and head_norm_of(state):
        return dim  # what the class does between its last norm and its head is a candidate of its own
    while name and name not in state.seen.inputs:
        name = name.rpartition(".")[0]
    given = state.seen.inputs.get(name)
    if given is None or given.shape[-1] % state.hidden or given.shape[-1] != _length(state, dim):
        return dim
    if norm_before(state, probe.rows(given)) or norm_before(state, vectors(given, dim, state.hidden)):
        return dim
    return Dim((tuple("raw" if axis == "hidden" else axis for axis in dim.parts[0]),), "read")


def _length(state: Draft, dim: Dim) -> int:
    return prod(state.sizes[axis] for axis in dim.parts[0])


def as_their_like(state: Draft) -> None:
    """Maps of which nothing was seen, such as those of an expert that no token was sent to, are what their like are."""
    keys = dict.fromkeys(state.key(n) for n, module in state.model.named_modules() if probe.is_linear(module))
    known = {key for key in keys if key in state.outputs or key in state.inputs}
    likes = {without_numbers(key): key for key in known}
    for key in keys:
        like = likes.get(without_numbers(key))
        for kind in ("weight", "bias"):
            if like and key not in known and f"{key}{kind}" in state.rows and f"{like}{kind}" in state.rows:
                state.rows[f"{key}{kind}"] = state.rows[f"{like}{kind}"]
