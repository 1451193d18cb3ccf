"""What tensors do, found by intervention: names play no part here.

One forward pass of a tiny model shows which module's output another module reads. A second one per linear map
shows what its rows are for: the batch holds the same input many times, in copy i row i of the map's output is
moved at one position, and what then changes at the input of the next linear map says what row i is:

    one channel,   at this position only        a unit of a feed-forward layer
    one channel per head, at other positions    a value
    whole heads,   at this position only        a query
    whole heads,   at other positions           a key
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from growlib.outputs import every_input, inputs_of

POSITION = 3  # where rows are moved: several tokens stand before it
WIDEST = 600  # rows that are moved in one forward pass
CHANGED = 1e-4  # of the size of what is compared


@dataclass(frozen=True)
class Norm:
    """What a normalising module does: its output does not change when its input is doubled."""

    centred: bool  # LayerNorm: nor when a constant is added
    scale: str = ""  # the name of the parameter that is its weight, where it has one
    offset: float = 0.0  # 1 where the weight w acts as 1 + w


@dataclass
class Row:
    """What one output row of a linear map moves: channels of its reader, here or elsewhere."""

    channels: Tensor  # bool [C]
    elsewhere: bool


@dataclass
class Trace:
    """One forward pass: what each module read and wrote, in order of execution."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    on_text: set[str] = field(default_factory=set)  # the modules that run without an image or a sound
    with_media: bool = False

    @property
    def on_media(self) -> set[str]:
        """The modules that run with an image or a sound only."""
        return {*self.inputs, *self.outputs} - self.on_text


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def out_features(module: nn.Module) -> int:
    weight: Any = module.weight
    return weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


@contextmanager
def hooked(model: nn.Module, hook: Callable[[str, nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Call hook(name, module, input, output) on every module."""

    def of(name: str) -> Callable[..., Any]:
        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = _tensor(args) if args else _tensor(kwargs.get("hidden_states"))
            return hook(name, module, given, output)

        return call

    handles = [m.register_forward_hook(of(name), with_kwargs=True) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(model: PreTrainedModel, inputs: Sequence[dict[str, Tensor]] | None = None) -> Trace:
    """Run on each kind of input and keep the first input and output of every module; text alone comes first."""
    seen = Trace()

    def keep(name: str, module: nn.Module, given: Tensor | None, output: Any) -> None:
        if given is not None and name not in seen.inputs:
            seen.inputs[name] = given.detach().clone()
        result = _tensor(output)
        if result is not None and name not in seen.outputs:
            seen.outputs[name] = result.detach().clone()

    for number, given in enumerate(every_input(model) if inputs is None else inputs):
        with hooked(model, keep):
            model(**given)
        if number == 0:
            seen.on_text = {*seen.inputs, *seen.outputs}
        seen.with_media |= number > 0
    return seen


@torch.no_grad()
def is_added(model: PreTrainedModel, seen: Trace, parameter: nn.Parameter) -> bool | None:
    """Whether a vector is added to what passes: a change of it moves every token alike. None where nothing sees it.

    What sees it first says so: what a module reads, or else what it writes, as wide as the vector.
    """
    found: list[bool] = []

    def look(name: str, module: nn.Module, given: Tensor | None, output: Any) -> None:
        for now, before in ((given, seen.inputs.get(name)), (_tensor(output), seen.outputs.get(name))):
            if found or now is None or before is None or now.shape != before.shape or now.shape[-1] != len(parameter):
                continue
            change = (now - before).reshape(-1, now.shape[-1])
            if change.abs().max() > CHANGED * before.std():
                found.append(bool((change - change[:1]).abs().max() < 1e-2 * change.abs().max()))

    kept = parameter.clone()
    parameter.add_(1 + kept.abs())
    try:
        for given_inputs in every_input(model):
            with hooked(model, look):
                model(**given_inputs)
    finally:
        parameter.copy_(kept)
    return found[0] if found else None


def rows(tensor: Tensor) -> set[bytes]:
    """The vectors along the last dimension, as a set: equal sets are equal tensors but for the batch's shape."""
    flat = tensor.reshape(-1, tensor.shape[-1]).contiguous()
    return {row.numpy().tobytes() for row in flat}


@torch.no_grad()
def norm_of(module: nn.Module, width: int) -> Norm | None:
    """What kind of norm a leaf module is, found by calling it; None where it is none."""
    params = list(module.parameters())
    if list(module.children()) or any(p.ndim != 1 for p in params) or len(params) > 2:
        return None
    if is_linear(module) or isinstance(module, nn.Embedding):
        return None
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))

    def call(value: Tensor) -> Tensor | None:
        try:
            return _tensor(module(value))
        except Exception:  # any class of transformers: what cannot be called like a norm is none
            return None

    y = call(x)
    if y is None or y.shape != x.shape or not _close(call(1e3 * x), call(2e3 * x)) or _close(y, x) or not y.std() > 0:
        return None
    centred = _close(call(1e3 * x + 500), call(1e3 * x))
    for name, parameter in module.named_parameters():
        kept = parameter.clone()
        for offset in (0.0, 1.0):
            parameter.fill_(-offset)
            silent = _spread(call(x)) < 1e-6
            parameter.copy_(kept)
            if silent:
                return Norm(centred, name, offset)
    return Norm(centred)


def _spread(y: Tensor | None) -> float:
    return (y - y.mean((0, 1))).abs().max().item() if y is not None else 0.0


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and bool((a - b).abs().max() <= 1e-3 * b.abs().max())


@torch.no_grad()
def moved_by(model: PreTrainedModel, site: str, width: int) -> tuple[str, list[Row]] | None:
    """Move each of `width` channels of a module's output; the first linear map that sees it, and what it sees.

    `site` may hold its channels in its last two dimensions (heads, head_dim). None where no linear map sees it.
    """
    if width > WIDEST:
        return None
    batch = width + 1  # the last copy is not moved
    seen_by: list[tuple[str, list[Row]]] = []
    started = False

    def move(name: str, module: nn.Module, given: Tensor | None, output: Any) -> Any:
        nonlocal started
        if name == site and not started:
            started = True
            return _moved(output, batch)
        if started and not seen_by and given is not None and is_linear(module):
            seen = _by_batch(given, batch)
            if seen is not None:
                change = (seen - seen[-1:]).abs()
                changed = change > CHANGED * seen[-1:].std()
                if changed[:-1].any():
                    seen_by.append((name, [_row(changed[i]) for i in range(width)]))
        return None

    inputs = [inputs_of(model, batch), *every_input(model, copies=batch)[1:]]
    with hooked(model, move):
        for given in inputs:  # the first kind of input on which the module runs
            try:
                model(**given)
            except Exception:  # a class whose forward cannot take this batch tells nothing
                return None
            if started:
                break
    return seen_by[0] if seen_by else None


def _moved(output: Any, batch: int) -> Any:
    tensor = _tensor(output)
    if tensor is None:
        return output
    copy = tensor.clone()
    if _is_time_first(copy, batch):
        view = copy.transpose(0, 1) if copy.shape[2] == batch - 1 else None
    else:
        view = copy.view(batch, -1, batch - 1) if copy.numel() % (batch * (batch - 1)) == 0 else None
    if view is None:
        return output
    each = torch.arange(batch - 1)
    view[each, min(POSITION, view.shape[1] - 1), each] += 1.0 + view.abs().mean()
    return (copy, *output[1:]) if isinstance(output, tuple) else copy


def _is_time_first(tensor: Tensor, batch: int) -> bool:
    """Whether tokens come before the batch, as in Longformer and FSMT: [tokens, batch, channels]."""
    return tensor.ndim == 3 and tensor.shape[1] == batch != tensor.shape[0]


def _by_batch(given: Tensor, batch: int) -> Tensor | None:
    """[batch, tokens, channels], or None where the tokens of a batch are not laid out so."""
    if _is_time_first(given, batch):
        given = given.transpose(0, 1)
    count = given.numel() // given.shape[-1]
    return given.reshape(batch, -1, given.shape[-1]) if count % batch == 0 else None


def _row(changed: Tensor) -> Row:
    elsewhere = changed.clone()
    elsewhere[min(POSITION, len(changed) - 1)] = False
    return Row(changed.any(0), bool(elsewhere.any()))
