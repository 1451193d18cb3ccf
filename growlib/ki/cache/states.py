"""A position's hidden state as bytes of a fixed width, and back: with the teacher's head, its whole distribution.

Shapes: N positions, H hidden size, R bytes of a record.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from growlib.errors import GrowError
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits
from growlib.ki.teacher import Teacher

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class StateFormat:
    """What the record of a position holds: the state that the head reads, in the head's own dtype, so bit for bit.

    Attributes:
        vocab: how many token ids the head is over.
        hidden_size: H.
        hidden_dtype: a key of `DTYPES`.
    """

    vocab: int
    hidden_size: int
    hidden_dtype: str

    def __post_init__(self) -> None:
        if self.hidden_dtype not in DTYPES:
            asked = f"a cache of hidden states in {self.hidden_dtype}"
            raise GrowError(asked, "a head in this dtype is no plain matrix", " or ".join(DTYPES))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.hidden_dtype)

    @property
    def bytes_per_position(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def record(self, said: Logits | Projection, *_: object) -> tuple[np.ndarray, Tensor]:
        """Records [N, R], and where they are no numbers, [N]. The arguments are those of `RecordFormat.record`."""
        assert isinstance(said, Projection)
        states = said.hidden.to(self.dtype).cpu().contiguous()
        return states.view(torch.uint8).numpy(), ~said.hidden.isfinite().all(1)

    def decode(self, records: np.ndarray, asked: str = "reading a teacher's hidden states") -> Tensor:
        """States [N, H], from uint8 [N, R]; GrowError where no finite teacher has them."""
        states = torch.empty(len(records), self.hidden_size, dtype=self.dtype)
        states.view(torch.uint8).copy_(torch.from_numpy(records))
        if not states.isfinite().all():
            valid = "a cache of a teacher whose states are finite, written again"
            raise GrowError(asked, "it holds hidden states that are no numbers", valid)
        return states


def state_format(teacher: Teacher, vocab: int) -> StateFormat:
    """Of a teacher's head; raises GrowError where it has none that is a plain matrix."""
    head = teacher.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise no_states(teacher, "its head is " + ("missing" if head is None else f"a {type(head).__name__}"))
    return StateFormat(vocab, head.weight.shape[1], str(head.weight.dtype).removeprefix("torch."))


def no_states(teacher: Teacher, reason: str | None) -> GrowError:
    """What to raise where a teacher's distributions are not those of its hidden states and its head."""
    wrong = f"growlib has no access to the head of the teacher {teacher.name}: {reason}"
    return GrowError("cache_teacher(store='hidden')", wrong, "store='probabilities', the default")
