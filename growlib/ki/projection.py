"""Logits that need not exist: the hidden states and the head that would give them.

Shapes: N positions, H hidden size, V tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Projection:
    """logits = softcap · tanh(scale · (hidden weightᵀ + bias) / softcap), [N, V], computed part by part.

    Attributes:
        hidden: [N, H], what the head reads.
        weight: [V, H], or a DTensor of that shape, which is gathered once.
        bias: [V], or None.
        scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V), as the logits' would be."""
        return self.hidden.shape[0], self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self.hidden.device

    def rows(self, chosen: slice | Tensor) -> "Projection":
        """Some positions."""
        return replace(self, hidden=self.hidden[chosen])

    def tokens(self, start: int, stop: int) -> "Projection":
        """The token ids from `start` to before `stop`."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    def gathered(self) -> "Projection":
        """The same with a whole weight and bias on this device."""
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        bias = self.bias.full_tensor() if isinstance(self.bias, DTensor) else self.bias
        return replace(self, weight=weight, bias=bias)

    def cast(self, dtype: torch.dtype) -> "Projection":
        """The same in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def logits(self) -> Tensor:
        """[N, V] in at least float32."""
        raw = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
