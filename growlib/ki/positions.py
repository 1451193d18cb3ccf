"""Which positions of a batch count: those whose label is not -100.

Shapes: B batch, L length, N positions that count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.tasks import Task

IGNORE_INDEX = -100  # transformers' losses and collators


@dataclass(frozen=True)
class Positions:
    """The labels of a batch, and which of them count.

    Attributes:
        aligned: [B, L], of images [B]: the label that each position's logits predict, as in `ForCausalLMLoss`.
        mask: the same shape: whether it counts.
        labels: [N], those that count.
    """

    aligned: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any], task: Task, shifts: bool = True) -> "Positions":
        """Read a batch's `shift_labels`, or its `labels`, which a causal model's loss shifts unless told otherwise.

        Raises:
            GrowError: it has neither.
        """
        if "shift_labels" not in batch and "labels" not in batch:
            asked = f"a teacher for a batch of {', '.join(batch)}"
            raise GrowError(asked, "it has no labels", 'a column "labels", or a collator that makes it')
        if "shift_labels" in batch and shifts:
            return cls.at(batch["shift_labels"])
        labels = batch["labels"]
        return cls.at(F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if task == "causal" and shifts else labels)

    @classmethod
    def at(cls, aligned: Tensor) -> "Positions":
        """From labels that are aligned already."""
        mask = aligned != IGNORE_INDEX
        return cls(aligned, mask, aligned[mask])

    @property
    def count(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def flat(self) -> Tensor:
        """The mask as one dimension, which chooses among the rows of [B · L, ...]."""
        return self.mask.reshape(-1)

    def of_rows(self, rows: Tensor) -> "Positions":
        """Those of some rows of the batch."""
        return Positions.at(self.aligned[rows])
