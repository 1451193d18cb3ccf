"""The chunks of the linear loss on CUDA: one Triton kernel where PyTorch needs a dozen passes over the logits.

Triton comes with PyTorch on CUDA. Without it, and for float64, `linear` computes the same in PyTorch.

Shapes: N positions (n in a chunk), V tokens, V_t of the teacher's, K tokens that sparse targets list.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from growlib.ki.loss import NO_LABEL
from growlib.ki.predictions import Mixture, Predictions
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits, Targets

SUMS = 7  # d loss / d α, loss, CE, KL, the teacher's CE, over how many positions it is known, positions of no numbers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = find_spec("triton") is not None
BLOCK = 4096  # logits that a program holds at once
CHUNK_SHARE, LARGEST_SHARE = 128, 32  # a chunk has so small a part of the device's memory


def usable(student: Projection) -> bool:
    """Whether the kernel can compute this student's loss."""
    whole = student.part is None  # the kernel does not talk to other processes
    return HAS_TRITON and whole and student.device.type == "cuda" and student.hidden.dtype in DTYPES


def chunk_size(student: Projection, teacher: Predictions) -> int:
    """How many positions' logits are computed at once.

    Small chunks are bound by launches, and each chunk reads and writes the float32 sum of the head's gradient. So
    logits take a share of the device's memory, or as much as that sum, if all positions then make one chunk or not.
    """
    memory = _memory(student.device)
    budget = max(memory // CHUNK_SHARE, min(4 * student.weight.numel(), memory // LARGEST_SHARE))
    width = student.vocab * student.hidden.dtype.itemsize
    if isinstance(teacher, Projection):
        width += teacher.vocab * teacher.hidden.dtype.itemsize
    return max(budget // width, 16)


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class Sparse(NamedTuple):
    """Sparse targets as the kernel reads them; each None: they are dense."""

    ids: Tensor | None = None  # [n, K]
    listed: Tensor | None = None  # [n, K], log-weights
    constant: Tensor | None = None  # [n]
    silent: Tensor | None = None  # [n], where they are no numbers
    tail: Tensor | None = None  # [n]; None: the tail has no term
    label_logprob: Tensor | None = None  # [n], with a gate

    def rows(self, chosen: slice) -> "Sparse":
        return Sparse(*(None if part is None else part[chosen] for part in self))


class Dense(NamedTuple):
    """Dense targets as the kernel reads them: logits at τ = 1, before scale and cap."""

    logits: Tensor | None = None  # [n, V_t]; None: they are sparse
    scale: float = 1.0
    cap: float | None = None


class Chunks(Protocol):
    """The linear loss chunk by chunk."""

    @property
    def sums(self) -> Tensor:
        """[SUMS], over the chunks whose `gradient` was asked for."""
        ...

    def gradient(self, rows: slice, wanted: bool) -> Tensor | None:
        """d loss / d logits before scale and cap, [n, V], if it is wanted."""
        ...


@dataclass
class FusedChunks:
    """`Chunks` by the kernel."""

    student: Projection
    alpha: Tensor
    labels: Tensor
    teacher: Predictions
    temperature: float
    gate: bool
    numbers_only: bool

    def __post_init__(self) -> None:
        vocab = self.student.vocab
        # A label out of bounds is an error of PyTorch's gather, which the host need not wait for.
        self.alpha.expand(vocab).gather(0, self.labels.masked_fill(self.labels == NO_LABEL, 0))
        self._sums = self.alpha.new_zeros((len(self.labels), SUMS))
        self._vocab = min(self.teacher.vocab, vocab)
        self._sparse = self._read_sparse() if _is_sparse(self.teacher) else None

    @property
    def sums(self) -> Tensor:
        return self._sums.sum(0)

    def gradient(self, rows: slice, wanted: bool) -> Tensor | None:
        student = self.student.rows(rows)
        logits = student.raw()
        dense = self._dense(rows) if self._sparse is None else Dense()
        sparse = Sparse() if self._sparse is None else self._sparse.rows(rows)
        _epilogue(
            logits, self.labels[rows], self.alpha, self._sums[rows], dense.logits, *sparse, student.scale,
            student.softcap, dense.scale, dense.cap, self.temperature, self._vocab, self.gate, self.numbers_only,
            wanted,
        )  # fmt: skip
        return logits if wanted else None

    def _read_sparse(self) -> Sparse:
        device = self.student.device
        targets = self.teacher.targets(self.temperature, device).over(self.student.vocab).to(device, torch.float32)
        terms = targets.kl_terms
        label_logprob = targets.label_logprobs(self.labels) if self.gate else None
        parts = (targets.ids, terms.listed, terms.constant, targets.no_numbers, terms.tail, label_logprob)
        return Sparse(*(None if part is None else part.contiguous() for part in parts))

    def _dense(self, rows: slice) -> Dense:
        teacher, device = self.teacher.rows(rows), self.student.device
        if isinstance(teacher, Projection):
            logits, scale, cap = teacher.raw(), teacher.scale, teacher.softcap
        elif isinstance(teacher, Logits):
            logits, scale, cap = teacher.tensor, 1.0, None
        else:  # log-probabilities at τ, times τ, are logits
            targets = teacher if isinstance(teacher, Targets) else teacher.targets(self.temperature, device)
            logits, scale, cap = targets.logprobs, targets.temperature, None
        logits = logits.to(device)
        return Dense(logits if logits.stride(1) == 1 else logits.contiguous(), scale, cap)


def _is_sparse(teacher: Predictions) -> bool:
    if isinstance(teacher, Mixture):
        return all(map(_is_sparse, teacher.parts))
    return isinstance(teacher, Targets) and teacher.ids is not None


def _next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@torch.library.custom_op("growlib::ki_epilogue", mutates_args=("logits", "sums"))
def _epilogue(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    sums: Tensor,
    teacher: Tensor | None,
    ids: Tensor | None,
    listed: Tensor | None,
    constant: Tensor | None,
    silent: Tensor | None,
    tail: Tensor | None,
    label_logprob: Tensor | None,
    scale: float,
    cap: float | None,
    teacher_scale: float,
    teacher_cap: float | None,
    temperature: float,
    vocab: int,
    gate: bool,
    numbers_only: bool,
    gradient: bool,
) -> None:
    """`epilogue` at all positions of a chunk; one operator to torch.compile."""
    from growlib.ki import epilogue  # Triton need not be there

    count, width = logits.shape
    if count == 0:
        return
    block = min(_next_power(width), BLOCK)
    always: dict[str, Any] = {
        "V": width, "V_T": vocab, "BLOCK": block, "GATE": gate, "NUMBERS_ONLY": numbers_only, "CAPPED": cap is not None,
        "TOGETHER": vocab == width and temperature == 1.0, "GRADIENT": gradient, "MARK": torch.finfo(logits.dtype).min,
        "num_warps": max(1, min(8, block // 512)),
    }  # fmt: skip
    rows, bound = (logits, labels, alpha, sums), cap or 1.0
    with torch.cuda.device_of(logits):
        if teacher is not None:
            epilogue.dense_epilogue[(count,)](
                *rows, teacher, logits.stride(0), teacher.stride(0), scale, bound, teacher_scale, teacher_cap or 1.0,
                temperature, TEACHER_CAPPED=teacher_cap is not None, TEMPERED=temperature != 1.0, **always,
            )  # fmt: skip
        else:
            assert ids is not None
            assert silent is not None
            k = ids.shape[1]
            epilogue.sparse_epilogue[(count,)](
                *rows, ids, listed, constant, silent.view(torch.uint8), alpha if tail is None else tail, label_logprob,
                logits.stride(0), scale, bound, temperature,
                K=k, K_BLOCK=_next_power(k), TAIL=tail is not None, **always,
            )  # fmt: skip


@_epilogue.register_fake
def _(*_: object) -> None:
    return None
