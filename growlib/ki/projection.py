"""Logits that are not computed as a whole: hidden states and a head.

Shapes: N positions, H hidden size, V tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from growlib.errors import GrowError
from growlib.ki.columns import Columns, is_split
from growlib.ki.targets import Targets


@dataclass(frozen=True)
class Projection:
    """logits = softcap · tanh(scale · (hidden weightᵀ + bias) / softcap), [N, V], computed part by part.

    Attributes:
        hidden: [N, H], what the head reads. A DTensor is replicated.
        weight: [V, H]; a DTensor is gathered. Beside hidden states that are a DTensor of its mesh, a weight whose rows
            are split (a vocabulary-parallel head) stays so: it is then this process's part, as `bias` is.
        bias: [V], or None.
        scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`), or None.
        part: which token ids the weight here has; None: all.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    part: Columns | None = None

    def __post_init__(self) -> None:
        if isinstance(self.hidden, DTensor):
            self._take_parts(self.hidden)
        for name in ("weight", "bias"):
            if isinstance(split := getattr(self, name), DTensor):
                object.__setattr__(self, name, split.full_tensor())

    def __len__(self) -> int:
        return len(self.hidden)

    def _take_parts(self, hidden: DTensor) -> None:
        """Plain tensors of this process, from a DTensor of hidden states."""
        if any(placement != Replicate() for placement in hidden.placements):
            valid = "hidden states that each process has as a whole"
            raise GrowError("logits of hidden states that are a DTensor", f"it is placed {hidden.placements}", valid)
        weight, bias = self.weight, self.bias
        if not (is_split(weight) and weight.device_mesh == hidden.device_mesh):
            object.__setattr__(self, "hidden", hidden.to_local())
            return
        object.__setattr__(self, "part", Columns.of(weight))
        object.__setattr__(self, "weight", weight.to_local())
        if bias is not None and is_split(bias):
            object.__setattr__(self, "bias", bias.to_local())
        elif bias is not None:
            raise GrowError("a vocabulary-parallel head", "its bias is not split as its weight is", "a DTensor, too")
        # Each process has the gradient from its own logits.
        object.__setattr__(self, "hidden", hidden.to_local(grad_placements=[Partial()]))

    @property
    def columns(self) -> Columns:
        """The logits that this process has."""
        return Columns(self.weight.shape[0], 0, self.weight.shape[0]) if self.part is None else self.part

    @property
    def vocab(self) -> int:
        return self.columns.vocab

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def rows(self, chosen: slice | Tensor) -> "Projection":
        return replace(self, hidden=self.hidden[chosen])

    def tokens(self, start: int, stop: int) -> "Projection":
        """The token ids from `start` to before `stop`."""
        bias = None if self.bias is None else self.columns.whole(self.bias, 0)[start:stop]
        return replace(self, weight=self.columns.whole(self.weight, 0)[start:stop], bias=bias, part=None)

    def cast(self, dtype: torch.dtype) -> "Projection":
        """In another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def raw(self) -> Tensor:
        """hidden weightᵀ + bias, [N, V]."""
        return self.columns.whole(self._own_raw(), 1)

    def logits(self) -> Tensor:
        """[N, V] in at least float32."""
        return self._bounded(self.raw())

    def own_logits(self) -> Tensor:
        """Those of `columns` alone."""
        return self._bounded(self._own_raw())

    def _own_raw(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def _bounded(self, raw: Tensor) -> Tensor:
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def targets(self, temperature: float, device: torch.device) -> Targets:
        return Targets.dense(self.logits(), temperature=temperature).to(device)
