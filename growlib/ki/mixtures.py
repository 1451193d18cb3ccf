"""Several teachers at the same positions as one.

Shapes: N positions, K token ids per position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.predictions import Predictions
from growlib.ki.targets import Targets
from growlib.ki.treatments import TREATMENTS


def mixture(parts: Sequence[Targets], weights: Sequence[float]) -> Targets:
    """Several teachers at the same positions as one: Σ wᵢ Pᵢ.

    Of sampled targets the entropy becomes Σ wᵢ Hᵢ, so that the loss's value is Σ wᵢ KL(Pᵢ ‖ student): a
    constant above KL(Σ wᵢ Pᵢ ‖ student), with the same gradient.

    Raises:
        GrowError: the parts are neither all dense nor all sampled, or differ in vocabulary or temperature; or the
            weights are not one positive number each, summing to 1.
    """
    if len(weights) != len(parts) or not parts or min(weights) <= 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        asked = f"averaging {len(parts)} teachers with weights {list(weights)}"
        raise GrowError(asked, "that is no average", "one positive weight for each of one or more, summing to 1")
    kinds = {(part.treatment, part.vocab, part.temperature) for part in parts}
    if len(kinds) != 1 or not (parts[0].ids is None or TREATMENTS[parts[0].treatment].drawn):
        raise GrowError(
            "averaging teachers",
            "their targets are " + ", ".join(f"{t} over {v} ids at temperature {tau}" for t, v, tau in sorted(kinds)),
            "all dense or all sampled, over the same vocabulary at the same temperature",
        )
    shifts = [math.log(weight) for weight in weights]
    if parts[0].ids is None:
        shifted = torch.stack([part.logprobs + shift for part, shift in zip(parts, shifts, strict=True)])
        return replace(parts[0], logprobs=shifted.logsumexp(0))
    pairs = list(zip(parts, shifts, strict=True))
    columns = [_columns(part, shift, drawn) for drawn in (False, True) for part, shift in pairs]
    tails, entropies = [], []
    for part, shift in pairs:
        assert part.tail is not None
        assert part.entropy is not None
        tails.append(part.tail + shift)
        entropies.append(part.entropy * math.exp(shift))
    return replace(
        parts[0],
        logprobs=torch.cat([logprobs for logprobs, _ in columns], 1),
        ids=torch.cat([ids for _, ids in columns], 1),
        tail=torch.stack(tails).logsumexp(0),
        entropy=torch.stack(entropies).sum(0),
        draws=sum(part.draws for part in parts),
    )


@dataclass(frozen=True)
class Mixture:
    """Σ weightᵢ Pᵢ, each computed when it is asked for; see `mixture`."""

    parts: tuple[Predictions, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def vocab(self) -> int:
        """V, which all share."""
        return self.parts[0].vocab

    @property
    def device(self) -> torch.device:
        """Where the first is."""
        return self.parts[0].device

    def rows(self, chosen: slice | Tensor) -> "Mixture":
        """Some positions."""
        return replace(self, parts=tuple(part.rows(chosen) for part in self.parts))

    def targets(self, temperature: float, device: torch.device) -> Targets:
        """The mixed distribution at τ."""
        return mixture([part.targets(temperature, device) for part in self.parts], self.weights)


def _columns(part: Targets, shift: float, drawn: bool) -> tuple[Tensor, Tensor]:
    """The exact entries or the draws, their log-weights shifted."""
    assert part.ids is not None
    exact = part.ids.shape[1] - part.draws
    columns = slice(exact, None) if drawn else slice(exact)
    return part.logprobs[:, columns] + shift, part.ids[:, columns]
