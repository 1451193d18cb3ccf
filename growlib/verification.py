"""The source and the grown model side by side: do they compute the same?"""

import copy
from dataclasses import dataclass
from operator import gt
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from growlib import checkpoint
from growlib.checkpoint import Source
from growlib.config import is_mixture
from growlib.errors import GrowError
from growlib.growth_plan import FILE, GrowthPlan
from growlib.outputs import TOLERANCE, distance, inputs_of, outputs

LENGTH = 16  # tokens of the default inputs


@dataclass(frozen=True)
class Verification:
    """How far the grown model's outputs are from the source's.

    `max_rel` is `max_abs` over the spread (maximum minus minimum) of the source's output. `exact` holds where it is
    at most 1e-5, or four times the rounding of the source's own dtype as measured on the same inputs. `planned` are
    the reasons why the growth is not exact, of the plan that lies beside the grown model; None where there is no plan.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    planned: tuple[str, ...] | None = None

    @property
    def exact(self) -> bool:
        return self.max_rel <= self.tolerance

    def __str__(self) -> str:
        measured = (
            f"{'exact' if self.exact else 'NOT exact'}: max |Δ| {self.max_abs:.3g}, {self.max_rel:.3g} of the spread "
            f"(tolerance {self.tolerance:.3g})"
        )
        if self.planned is None:
            return measured
        return f"{measured}; its plan says {'not exact: ' + '; '.join(self.planned) if self.planned else 'exact'}"


def verify(small: Source, big: Source, inputs: dict[str, Tensor] | None = None) -> Verification:
    """Compare the outputs of a source and its grown model, in eval mode, on the same inputs.

    Args:
        small: the source: a model, a folder or a hub id.
        big: the grown model. Old entries keep their place on every axis that a model puts out, so its output is
            compared on the source's share: the old tokens of the logits, the first channels of a hidden state.
        inputs: keyword arguments of both models' forward; by default token ids [2, 16] drawn with a fixed seed.

    Raises:
        GrowError: the models are not of one class nor a dense one and a mixture of experts, or `big` is smaller.
    """
    plan = None
    if isinstance(big, str | Path) and (Path(big) / FILE).is_file():
        plan = GrowthPlan.load(big)
    small, big = checkpoint.load(small), checkpoint.load(big)
    asked = "comparing a source with its grown model"
    if type(big) is not type(small) and not (is_mixture(big.config) and _task(small) == _task(big)):
        wrong = f"they are a {type(small).__name__} and a {type(big).__name__}"
        raise GrowError(asked, wrong, "two models of one class, or a dense one and a mixture of experts")
    shapes = {name: parameter.shape for name, parameter in big.named_parameters()}
    larger = [n for n, p in small.named_parameters() if n in shapes and any(map(gt, p.shape, shapes[n]))]
    if larger:
        raise GrowError(asked, f"{larger[0]} is smaller in the second", "a model at least as large as the source")
    if inputs is None:
        inputs = inputs_of(small, length=LENGTH, seed=0)
    reference, tolerance = outputs(small, inputs), TOLERANCE
    apart = distance(reference, outputs(big, inputs))
    if small.dtype not in (torch.float32, torch.float64):
        wide = copy.deepcopy(small).float()
        tolerance = max(tolerance, 4 * distance(outputs(wide, inputs), reference).relative)
    return Verification(*apart, tolerance, None if plan is None else plan.reasons)


def _task(model: PreTrainedModel) -> str:
    """What a class's name says it is for, such as `ForCausalLM`."""
    return type(model).__name__.partition("For")[2]
