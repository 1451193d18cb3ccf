"""What makes a block the identity, found by setting its parameters to zero and one and calling it."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from growlib.architectures.schema import Stack
from growlib.inference.probe import Norm
from growlib.outputs import every_input

SAME = 1e-4  # of the size of what is compared: a norm of a norm differs by its eps


@dataclass
class Call:
    """One call of a block: what it was given, among it the stream."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def stream(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @torch.no_grad()
    def __call__(self, stream: Tensor) -> Tensor:
        """The stream behind the block."""
        kwargs = self.kwargs if self.args else {**self.kwargs, "hidden_states": stream}
        return tensor_in(self.block(*((stream, *self.args[1:]) if self.args else ()), **kwargs))


def tensor_in(value: Any) -> Tensor:
    """The stream in what a block returns: the first tensor."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if hasattr(value, "values") else value))
    return value


def with_identity(model: PreTrainedModel, prefix: str, stack: Stack, norms: dict[str, Norm]) -> Stack | None:
    """The stack with what makes each kind of its blocks the identity; None where no zeros and ones do.

    Writers are as few and as late as can be, so that a new block learns. In a post-norm block the norms on the way are
    found too, and which of them is the last.
    """
    calls = _calls(model, prefix, stack)
    fresh = _initial(model)
    found: list[Stack] = []
    for name, call in calls.items():
        own = {n.removeprefix(name + "."): norm for n, norm in norms.items() if n.startswith(name + ".")}
        values = {n.removeprefix(name + "."): v for n, v in fresh.items() if n.startswith(name + ".")}
        try:
            facts = _Block(call, own, values).facts()
        except Exception:  # whatever a class of transformers raises: a block that cannot be called again
            return None
        if facts is None:
            return None
        found.append(replace(stack, **facts))
    if not found or any(each.last_norm != found[0].last_norm for each in found):
        return None
    return replace(
        found[0],
        writers=tuple(dict.fromkeys(name for each in found for name in each.writers)),
        inner_norms=tuple(dict.fromkeys(name for each in found for name in each.inner_norms)),
    )


def pruned(model: PreTrainedModel, prefix: str, stack: Stack) -> Stack:
    """The stack without writers that write into other writers alone: a path of zeros learns nothing.

    A writer stays if a block of any kind needs it, or none of those that were called has it.
    """
    needed: set[str] = set()
    seen: set[str] = set()
    for call in _calls(model, prefix, stack).values():
        block = _Block(call, {}, {})
        seen |= {w for w in stack.writers if any(w in (n, _owner(n)) for n in block.parameters)}
        try:
            needed |= set(block.pruned(stack.writers))
        except Exception:  # whatever a class of transformers raises: a block that cannot be called again
            return stack
    return replace(stack, writers=tuple(w for w in stack.writers if w in needed or w not in seen))


@torch.no_grad()
def _calls(model: PreTrainedModel, prefix: str, stack: Stack) -> dict[str, Call]:
    """A call of the first block of each kind, by its name: kinds have other parameters."""
    start, _, end = (prefix + stack.block.rstrip(".")).partition("*")
    kinds: dict[frozenset[str], str] = {}
    for name, module in model.named_modules():
        if name.startswith(start) and name.endswith(end) and name[len(start) : len(name) - len(end)].isdigit():
            kinds.setdefault(frozenset(n for n, _ in module.named_parameters()), name)
    calls: dict[str, Call] = {}

    def noting(name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, Call(module, args, kwargs))
            return forward(*args, **kwargs)

        return noted

    blocks = {name: model.get_submodule(name) for name in kinds.values()}
    for name, block in blocks.items():
        block.forward = noting(name, block)  # some classes call it without hooks
    try:
        for given in every_input(model):  # a tower runs with an image only
            model(**given)
    finally:
        for block in blocks.values():
            del block.forward
    return calls


def _initial(model: PreTrainedModel) -> dict[str, float | None]:
    """What the class sets each vector to at first, where it is the same zero or one everywhere."""
    torch.manual_seed(0)
    fresh = type(model)._from_config(model.config, attn_implementation="eager")
    values = {
        n: p.flatten()[:1].item() if p.numel() and bool((p == p.flatten()[0]).all()) else None
        for n, p in fresh.named_parameters()
    }
    return {n: value if value in (0.0, 1.0) else None for n, value in values.items()}


class _Block:
    """A block under trial: its parameters by name, each with the constant that it is set to."""

    def __init__(self, call: Call, norms: dict[str, Norm], initial: dict[str, float | None]) -> None:
        self.call, self.initial = call, initial
        self.parameters = dict(call.block.named_parameters())
        self.norms = {**self._like_norms(), **norms}
        self.known = norms
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.order = _order_of_use(call)

    @property
    def matrices(self) -> dict[str, float]:
        """All that is no norm: matrices and their biases at zero, vectors of their own at their first value."""
        made = {}
        for name, p in self.parameters.items():
            owner = name.rpartition(".")[0]
            if owner in self.norms:
                continue
            beside_a_matrix = p.ndim > 1 or any(q.ndim > 1 for n, q in self.parameters.items() if _owner(n) == owner)
            first = self.initial.get(name)
            if beside_a_matrix or first is not None:
                made[name] = first if first is not None and p.ndim == 1 and not _is_bias(name) else 0.0
        return made

    @property
    def norm_values(self) -> dict[str, float]:
        """The norms at (1, 0)."""
        scales = {f"{owner}.{norm.scale}": 1.0 - norm.offset for owner, norm in self.norms.items()}
        return {n: scales.get(n, 0.0) for n in self.parameters if _owner(n) in self.norms}

    def facts(self) -> dict[str, Any] | None:
        """What makes it the identity, as fields of a stack, as little as can be; None where nothing does.

        Either it puts out what it is given, or a norm of that: the same for what is normed already.
        """
        unknown = {n: v for n, v in self.norm_values.items() if _owner(n) not in self.known}
        for made, holds in (
            (self.matrices, self._is_identity),
            ({**self.matrices, **unknown}, self._is_identity),
            ({**self.matrices, **self.norm_values}, self._is_norm),
        ):
            if (fewest := self._fewest(made, holds)) is not None and self._always(fewest, holds):
                last = self._last_norm(fewest) if holds == self._is_norm else ""
                zero = [n for n, value in fewest.items() if value == 0.0 and _owner(n) not in self.norms]
                one = _modules([n for n in fewest if n not in zero], self.parameters)
                inner = tuple(module for module in one if module != last)
                return {"writers": _modules(zero, self.parameters), "inner_norms": inner, "last_norm": last}
        return None

    def _always(self, made: dict[str, float], holds: Callable[[], bool]) -> bool:
        """Whether it holds under other buffers too, such as the bias that balances experts, which training moves."""
        buffers = [b for b in self.call.block.buffers() if b.ndim == 1 and b.is_floating_point()]
        kept = [buffer.clone() for buffer in buffers]
        generator = torch.Generator().manual_seed(0)
        try:
            for buffer in buffers:
                buffer += torch.randn(buffer.shape, generator=generator)
            with self._set(made):
                return holds()
        finally:
            for buffer, values in zip(buffers, kept, strict=True):
                buffer.copy_(values)

    def pruned(self, writers: Sequence[str]) -> list[str]:
        """Those writers that make the block the identity by themselves: what writes into another one learns."""
        made = {n: 0.0 for n in self.parameters if n in writers or _owner(n) in writers}
        fewest = self._fewest(made, self._is_identity)
        return list(writers) if fewest is None else [w for w in writers if any(w in (n, _owner(n)) for n in fewest)]

    def _like_norms(self) -> dict[str, Norm]:
        """Modules of a weight that is one at first, and a bias of zero."""
        owners: dict[str, list[str]] = defaultdict(list)
        for name in self.parameters:
            owners[_owner(name)].append(name)
        found = {}
        for owner, names in owners.items():
            values = [None if self.parameters[n].ndim > 1 else self.initial.get(n) for n in names]
            first = sorted(-1.0 if value is None else value for value in values)
            if owner and first in ([1.0], [0.0, 1.0]):
                scale = next(n for n in names if self.initial[n] == 1.0)
                found[owner] = Norm(centred=len(names) > 1, scale=scale.rpartition(".")[2])
        return found

    def _fewest(self, made: dict[str, float], holds: Callable[[], bool]) -> dict[str, float] | None:
        with self._set(made):
            if not holds():
                return None
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(made, key=lambda name: self.order.get(_owner(name), -1)):
            owner = _owner(name) if _owner(name) in self.norms else name
            groups[re.sub(r"\d+", "#", owner)].append(name)
        for names in groups.values():
            fewer = {n: value for n, value in made.items() if n not in names}
            with self._set(fewer):
                made = fewer if holds() else made
        return made

    def _is_identity(self) -> bool:
        return _close(self.call(self.call.stream), self.call.stream)

    def _is_norm(self) -> bool:
        """Twice is once, and every token goes on as itself."""
        given = self.call.stream
        once = self.call(given)
        together = torch.stack([given.flatten(), once.flatten()])
        return _close(self.call(once), once) and bool(torch.corrcoef(together)[0, 1] > 0.5)

    def _last_norm(self, made: dict[str, float]) -> str:
        """The norm whose output is the block's, and is read by nothing in it."""
        owners = {_owner(name) for name in made if _owner(name) in self.norms}
        plain = self.call(self.call.stream)
        for owner in owners:
            names = [n for n in self.parameters if _owner(n) == owner]
            offset = self.norms[owner].offset
            twice = {
                n: 2 * (self.kept[n] + offset) - offset
                if n == f"{owner}.{self.norms[owner].scale}"
                else 2 * self.kept[n]
                for n in names
            }
            with self._set(twice):
                if _close(self.call(self.call.stream), 2 * plain):
                    return owner
        return ""

    @contextmanager
    @torch.no_grad()
    def _set(self, values: dict[str, Any]) -> Iterator[None]:
        try:
            for name, value in values.items():
                self.parameters[name].copy_(torch.as_tensor(value).expand_as(self.parameters[name]))
            yield
        finally:
            for name in values:
                self.parameters[name].copy_(self.kept[name])


def _order_of_use(call: Call) -> dict[str, int]:
    """When each module of a block has run."""
    order: dict[str, int] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    handles = [module.register_forward_hook(noted(name)) for name, module in call.block.named_modules() if name]
    try:
        call(call.stream)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _modules(names: Iterable[str], parameters: Iterable[str]) -> tuple[str, ...]:
    """The names, those of all parameters of a module as the module."""
    found: set[str] = set(names)
    whole: dict[str, None] = {}
    for name in names:
        owner = _owner(name)
        all_of_it = owner and {n for n in parameters if _owner(n) == owner} <= found
        whole[owner if all_of_it else name] = None
    return tuple(whole)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= SAME * b.abs().max())
