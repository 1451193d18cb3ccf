"""Logits that are not computed as a whole: hidden states and a head.

Shapes: N positions, H hidden size, V tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from growlib.ki.targets import Targets


@dataclass(frozen=True)
class Projection:
    """logits = softcap · tanh(scale · (hidden weightᵀ + bias) / softcap), [N, V], computed part by part.

    Attributes:
        hidden: [N, H], what the head reads.
        weight: [V, H]; a DTensor is gathered.
        bias: [V], or None.
        scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            if isinstance(split := getattr(self, name), DTensor):
                object.__setattr__(self, name, split.full_tensor())

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def rows(self, chosen: slice | Tensor) -> "Projection":
        return replace(self, hidden=self.hidden[chosen])

    def tokens(self, start: int, stop: int) -> "Projection":
        """The token ids from `start` to before `stop`."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    def cast(self, dtype: torch.dtype) -> "Projection":
        """In another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def raw(self) -> Tensor:
        """hidden weightᵀ + bias, [N, V]."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def logits(self) -> Tensor:
        """[N, V] in at least float32."""
        raw = self.raw()
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def targets(self, temperature: float, device: torch.device) -> Targets:
        return Targets.dense(self.logits(), temperature=temperature).to(device)
