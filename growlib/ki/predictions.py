"""What a teacher says about N positions, in whatever form: the losses ask for rows and for targets at a temperature."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.targets import Logits, Targets


class Predictions(Protocol):
    """`Logits`, `Projection`, `Targets`, or a `Mixture` of them."""

    @property
    def vocab(self) -> int:
        """How many token ids they are over."""

    @property
    def device(self) -> torch.device:
        """Where they are computed."""

    def __len__(self) -> int:
        """N."""

    def rows(self, chosen: slice | Tensor) -> Self:
        """Some positions."""

    def targets(self, temperature: float, device: torch.device) -> Targets:
        """`Targets` at τ on a device; raises GrowError where they cannot be had at this τ."""


def as_predictions(teacher: Any, positions: int) -> Predictions:
    """What a loss was given as its teacher, at so many positions.

    Raises:
        GrowError: it is nothing that a loss can read, or the number of positions is not that of the labels.
    """
    predictions = Logits(teacher.reshape(-1, teacher.shape[-1])) if isinstance(teacher, Tensor) else teacher
    if not hasattr(predictions, "targets"):
        valid = "logits, Targets, or a Projection (hidden states and a head)"
        raise GrowError(f"a teacher that is a {type(teacher).__name__}", "a loss cannot read it", valid)
    check_positions(len(predictions), "the teacher's predictions", positions)
    return predictions


def check_positions(rows: int, whose: str, positions: int) -> None:
    """Raise GrowError where there are not as many rows as labels."""
    if rows != positions:
        raise GrowError(f"{whose} at {rows} positions", f"there are {positions} labels", "one label per position")
