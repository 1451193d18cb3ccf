"""Memory for large tensors that live one after another: what one leaves, the next one takes.

New pages cost the system more time than the arithmetic that fills them.
"""

import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: below, the allocator itself takes again what was left
KEPT = 1 << 28  # bytes that may wait for a tensor


class Recycled:
    """Memory for tensors on the CPU. It comes back when the last view of a tensor is gone."""

    def __init__(self) -> None:
        self._left: list[Tensor] = []  # uint8 [bytes], the oldest first
        self._lock = threading.Lock()  # of what is taken; what comes back is only appended

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`, but a large tensor cannot be resized."""
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST or device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        memory = self._taken(size)
        view = memory[:size].numpy()
        weakref.finalize(view, self._left.append, memory)
        return torch.from_numpy(view).view(dtype).view(shape)

    def _taken(self, size: int) -> Tensor:
        with self._lock:
            fitting = [i for i, memory in enumerate(self._left) if size <= len(memory) <= 2 * size]
            if fitting:
                return self._left.pop(min(fitting, key=lambda i: len(self._left[i])))
            while self._left and sum(map(len, self._left)) + size > KEPT:
                self._left.pop(0)
        return torch.empty(size, dtype=torch.uint8)
