"""How a loss reads the tail of sparse targets: the tokens that they do not list.

A new treatment is a function and its row in `TREATMENTS`.

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
        needs: which fields of `Targets` it reads beside the log-probabilities.
        drawn: whether draws stand for the tail; they are made with the targets and cannot be added or left out later.
    """

    meaning: str
    terms: Callable[[Tensor, Any, Any], KLTerms]
    needs: tuple[str, ...] = ()
    drawn: bool = False


def bucket(logprobs: Tensor, tail: Tensor, _: Any) -> KLTerms:
    constant = product(logprobs.exp(), logprobs).sum(1) + product(tail.exp(), tail)
    return KLTerms(logprobs, tail, constant)


def sampled(logprobs: Tensor, _: Any, entropy: Tensor) -> KLTerms:
    return KLTerms(logprobs, None, -entropy)


def renorm_teacher(logprobs: Tensor, *_: Any) -> KLTerms:
    return none(logprobs.log_softmax(-1))


def none(logprobs: Tensor, *_: Any) -> KLTerms:
    return KLTerms(logprobs, None, product(logprobs.exp(), logprobs).sum(1))


TREATMENTS: dict[str, Treatment] = {
    "bucket": Treatment(
        "the tail is one more token on both sides: a KL of K+1 outcomes, never negative", bucket, ("tail",)
    ),
    "sampled": Treatment("draws stand for the tail: unbiased, value and gradient", sampled, ("entropy",), drawn=True),
    "renorm_teacher": Treatment(
        "the teacher's K probabilities are scaled to sum to 1, the student keeps its full softmax", renorm_teacher
    ),
    "none": Treatment("the K terms alone: no KL, it can be negative", none),
}
WITHOUT_DRAWS = tuple(name for name, treatment in TREATMENTS.items() if not treatment.drawn)


def check_treatment(tail: str, valid: tuple[str, ...] = tuple(TREATMENTS)) -> None:
    """Raise GrowError where there is no such treatment."""
    if tail not in valid:
        raise GrowError(f"the tail treatment {tail!r}", "there is no such treatment here", ", ".join(valid))


def product(weight: Tensor, log: Tensor) -> Tensor:
    """weight · log, 0 where the weight is 0 and the log infinite."""
    return weight * log.masked_fill(weight == 0, 0.0)
