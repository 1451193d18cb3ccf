"""What a teacher says about N positions, in whatever form, and several teachers as one.

Shapes: N positions, K token ids per position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.targets import Logits, Targets
from growlib.ki.treatments import TREATMENTS


class Predictions(Protocol):
    """A teacher's predictions at N positions: `Logits`, a `Projection`, `Targets`, or a `Mixture` of them.

    A loss asks for some rows, and for their `Targets` at a temperature, on a device.
    """

    @property
    def vocab(self) -> int: ...
    def __len__(self) -> int: ...
    def rows(self, chosen: slice | Tensor) -> Self: ...
    def targets(self, temperature: float, device: torch.device) -> Targets: ...


def as_predictions(teacher: Any, positions: int) -> Predictions:
    """The predictions that a loss was given, where a tensor is logits; raises GrowError where it cannot read them."""
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


@dataclass(frozen=True)
class Mixture:
    """Several predictions at the same positions: their `mixture`, which is computed for the rows that are asked for."""

    parts: tuple[Predictions, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def vocab(self) -> int:
        return self.parts[0].vocab

    def rows(self, chosen: slice | Tensor) -> "Mixture":
        return replace(self, parts=tuple(part.rows(chosen) for part in self.parts))

    def targets(self, temperature: float, device: torch.device) -> Targets:
        return mixture([part.targets(temperature, device) for part in self.parts], self.weights)


def mixture(parts: Sequence[Targets], weights: Sequence[float]) -> Targets:
    """Several teachers at the same positions as one: Σ wᵢ Pᵢ.

    Of sampled targets the entropy becomes Σ wᵢ Hᵢ. The loss's value is then Σ wᵢ KL(Pᵢ ‖ student), which is a constant
    above KL(Σ wᵢ Pᵢ ‖ student) and has the same gradient.

    Raises:
        GrowError: the parts are neither all dense nor all sampled, or differ in vocabulary or temperature; or the
            weights are not one positive number each, summing to 1.
    """
    if not are_weights(weights, len(parts)):
        asked = f"averaging {len(parts)} teachers with weights {list(weights)}"
        raise GrowError(asked, "the weights do not make an average", "one positive weight per teacher, summing to 1")
    kinds = {(part.treatment, part.vocab, part.temperature) for part in parts}
    first = parts[0]
    if len(kinds) != 1 or not (first.ids is None or TREATMENTS[first.treatment].drawn):
        which = ", ".join(f"{t} over {v} ids at temperature {tau}" for t, v, tau in sorted(kinds))
        valid = "all dense or all sampled, over the same vocabulary at the same temperature"
        raise GrowError("averaging teachers", f"their targets are {which}", valid)
    pairs = [(part, math.log(weight)) for part, weight in zip(parts, weights, strict=True)]
    if first.ids is None:
        return replace(first, logprobs=torch.stack([part.logprobs + shift for part, shift in pairs]).logsumexp(0))
    columns = [_columns(part, shift, drawn) for drawn in (False, True) for part, shift in pairs]
    return replace(
        first,
        logprobs=torch.cat([logprobs for logprobs, _ in columns], 1),
        ids=torch.cat([ids for _, ids in columns], 1),
        tail=torch.stack([part.tail + shift for part, shift in pairs if part.tail is not None]).logsumexp(0),
        entropy=torch.stack([x.entropy * math.exp(shift) for x, shift in pairs if x.entropy is not None]).sum(0),
        draws=sum(part.draws for part in parts),
    )


def are_weights(weights: Sequence[Any], count: int) -> bool:
    """Whether they are so many positive numbers, summing to 1."""
    positive = all(isinstance(weight, float | int) and weight > 0 for weight in weights)
    return positive and len(weights) == count > 0 and math.isclose(sum(weights), 1.0, abs_tol=1e-6)


def _columns(part: Targets, shift: float, drawn: bool) -> tuple[Tensor, Tensor]:
    """The exact tokens or the draws, their log-weights shifted."""
    assert part.ids is not None
    exact = part.ids.shape[1] - part.draws
    columns = slice(exact, None) if drawn else slice(exact)
    return part.logprobs[:, columns] + shift, part.ids[:, columns]
