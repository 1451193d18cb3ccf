"""How a loss reads the tail of sparse targets: the tokens that they do not list.

A new treatment is one row in `TREATMENTS`.

Shapes: N positions, K listed tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from growlib.errors import GrowError


class KLTerms(NamedTuple):
    """KL = constant - Σ exp(listed) log q(listed) - exp(tail) log q(tail), where q is the student.

    Attributes:
        listed: [N, K], log-weights of the listed tokens.
        tail: [N], log-weight of all other tokens as one outcome; None: they have no term.
        constant: [N], what no student changes.
    """

    listed: Tensor
    tail: Tensor | None
    constant: Tensor


@dataclass(frozen=True)
class Treatment:
    """One way to read the tail.

    Attributes:
        meaning: in words.
        terms: (logprobs [N, K], tail [N], entropy [N]) of `Targets` -> `KLTerms`.
        needs: which of tail and entropy it reads.
        drawn: draws stand for the tail. They are made with the targets, and cannot be added or left out later.
    """

    meaning: str
    terms: Callable[[Tensor, Any, Any], KLTerms]
    needs: tuple[str, ...] = ()
    drawn: bool = False


def product(weight: Tensor, log: Tensor) -> Tensor:
    """weight · log, 0 where the weight is 0 and the log infinite."""
    return weight * log.masked_fill(weight == 0, 0.0)


def _listed(log_w: Tensor) -> KLTerms:
    return KLTerms(log_w, None, product(log_w.exp(), log_w).sum(1))


TREATMENTS: dict[str, Treatment] = {
    "bucket": Treatment(
        "the tail is one more token on both sides: a KL of K+1 outcomes, never negative",
        lambda log_p, tail, _: KLTerms(log_p, tail, _listed(log_p).constant + product(tail.exp(), tail)),
        needs=("tail",),
    ),
    "sampled": Treatment(
        "draws stand for the tail: unbiased, value and gradient",
        lambda log_p, _, entropy: KLTerms(log_p, None, -entropy),
        needs=("entropy",),
        drawn=True,
    ),
    "renorm_teacher": Treatment(
        "the teacher's K probabilities are scaled to sum to 1, the student keeps its full softmax",
        lambda log_p, *_: _listed(log_p.log_softmax(-1)),
    ),
    "none": Treatment("the K terms alone: no KL, it can be negative", lambda log_p, *_: _listed(log_p)),
}
WITHOUT_DRAWS = tuple(name for name, treatment in TREATMENTS.items() if not treatment.drawn)


def check_treatment(tail: str, valid: tuple[str, ...] = tuple(TREATMENTS)) -> None:
    """Raise GrowError where there is no such treatment."""
    if tail not in valid:
        raise GrowError(f"the tail treatment {tail!r}", "there is no such treatment here", ", ".join(valid))
