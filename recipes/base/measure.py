"""Time and memory of a piece of work, as ratios within one run."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback

from growlib.ki import fused

Row = dict[str, float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Allocated(TorchDispatchMode):
    """The bytes of the tensors that were made while this lasts, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, 0), (args, kwargs))
        made = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, tensor.untyped_storage().nbytes()), made)
        return made

    def _meet(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, storage._cdata, size)

    def _leave(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that a piece of work took beside what was there before."""
    gc.collect()
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as allocated:
        work()
    return allocated.peak


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, Row]:
    """Median seconds of each form, and the median over rounds of its ratio to the first."""
    base = next(iter(seconds.values()))
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(time / first for time, first in zip(times, base, strict=True)),
        }
        for name, times in seconds.items()
    }


class StepTimes(TrainerCallback):
    """Seconds from the end of a step to the end of the next, the first two left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.ends.append(time.perf_counter())

    @property
    def median(self) -> float:
        return statistics.median(np.diff(self.ends)[1:])


def without_triton(form: Callable[[], Tensor]) -> Tensor:
    """A loss by the kernel's twin in PyTorch; its backward pass has no kernel of growlib's in any case."""
    fused.HAS_TRITON = False
    try:
        return form()
    finally:
        fused.HAS_TRITON = True
