"""The source and the grown model side by side: do they compute the same?"""

import copy
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import gt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.loading import Source
from growlib.checkpoint.mapped import mapped_model
from growlib.config import is_mixture
from growlib.errors import GrowError
from growlib.growth_plan import FILE, GrowthPlan
from growlib.media import media_in, wanted
from growlib.outputs import TOLERANCE, Distance, distance, every_input, outputs

LENGTH = 16  # tokens of the default inputs
CEILING = 0.03  # of the spread: above it rounding cannot be told from a change of the function


@dataclass(frozen=True)
class Verification:
    """How far the grown model's outputs are from the source's.

    `max_rel` is `max_abs` over the spread (maximum minus minimum) of the source's output. `tolerance` is 1e-5, or four
    times the rounding of the coarser of the two dtypes, as measured on the same inputs. `planned` are the reasons why
    the growth is not exact, of the plan that lies beside the grown model; None where there is no plan.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    planned: tuple[str, ...] | None = None
    dtype: str = "float32"  # the coarser one

    @property
    def verdict(self) -> Literal["exact", "NOT exact", "cannot tell"]:
        """A difference of a few per cent of the spread is never called exact, whatever rounding may explain."""
        if not self.max_rel <= self.tolerance:
            return "NOT exact"
        return "exact" if self.max_rel <= CEILING else "cannot tell"

    @property
    def exact(self) -> bool:
        return self.verdict == "exact"

    def __str__(self) -> str:
        advice = f" in {self.dtype}; verify in float32" if self.verdict == "cannot tell" else ""
        measured = (
            f"{self.verdict}{advice}: max |Δ| {self.max_abs:.3g}, {self.max_rel:.3g} of the spread "
            f"(tolerance {self.tolerance:.3g})"
        )
        if self.planned is None:
            return measured
        return f"{measured}; its plan says {'not exact: ' + '; '.join(self.planned) if self.planned else 'exact'}"


def verify(
    small: Source, big: Source, inputs: dict[str, Tensor] | None = None, *, streaming: bool = False
) -> Verification:
    """Compare the outputs of a source and its grown model, in eval mode, on the same inputs.

    Args:
        small: the source: a model, a folder or a hub id.
        big: the grown model. Old entries keep their place on every axis that a model puts out, so its output is
            compared on the source's share: the old tokens of the logits, the first channels of a hidden state.
        inputs: keyword arguments of both models' forward; by default drawn with a fixed seed: token ids [2, 16],
            images, or whatever the class takes first. A model of several parts is compared on text alone and on text
            with an image or a sound; the worst of them counts.
        streaming: read both from disk layer by layer, in the memory of a layer. Both must be folders or hub ids.

    Raises:
        GrowError: the models are not of one class nor a dense one and a mixture of experts, `big` is smaller, or one
            of them does not run on the inputs.
    """
    plan = None
    if isinstance(big, str | Path) and (Path(big) / FILE).is_file():
        plan = GrowthPlan.load(big)
    places = (small, big)
    small, big = (_mapped(place) if streaming else checkpoint.load(place) for place in places)
    asked = "comparing a source with its grown model"
    if type(big) is not type(small) and not (is_mixture(big.config) and _task(small) == _task(big)):
        wrong = f"they are a {type(small).__name__} and a {type(big).__name__}"
        raise GrowError(asked, wrong, "two models of one class, or a dense one and a mixture of experts")
    shapes: dict[str, list[torch.Size]] = defaultdict(list)  # of each row: layers of several kinds may move
    for name, parameter in big.named_parameters():
        shapes[_row(name)].append(parameter.shape)
    mine, theirs = (_rows(model) for model in (small, big))
    for name, parameter in small.named_parameters():
        lost = type(big) is type(small) and mine[_row(name)] > theirs[_row(name)]
        if lost or (shapes[_row(name)] and all(any(map(gt, parameter.shape, s)) for s in shapes[_row(name)])):
            wrong = f"{name} is {'missing' if lost else 'smaller'} in the second"
            raise GrowError(asked, wrong, "first the source, then a model at least as large")
    try:
        several = every_input(small, length=LENGTH, seed=0) if inputs is None else [inputs]
        if inputs is None and (unseen := wanted(small) - media_in(small)):
            raise ValueError(f"no {' and no '.join(sorted(unseen))} could be made on which it runs")
        measured = [_compared(small, big, places, given) for given in several]
    except Exception as error:  # whatever a class of transformers raises
        wrong = f"a {type(small).__name__} does not run on the inputs ({type(error).__name__}: {error})"
        raise GrowError(asked, wrong, "inputs=, the keyword arguments of its forward") from error
    coarser = min((small.dtype, big.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    (apart, rounding) = max(measured, key=lambda m: m[0].relative / max(TOLERANCE, 4 * m[1]))
    return Verification(
        *apart,
        max(TOLERANCE, 4 * rounding),
        None if plan is None else plan.reasons,
        str(coarser).removeprefix("torch."),
    )


def _row(name: str) -> str:
    """A tensor's name without the layer's number: layers of several kinds may move."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _rows(model: PreTrainedModel) -> Counter[str]:
    """How many layers have each tensor."""
    return Counter(_row(name) for name, _ in model.named_parameters())


def _compared(
    small: PreTrainedModel, big: PreTrainedModel, places: tuple[Source, Source], given: dict[str, Tensor]
) -> tuple[Distance, float]:
    """How far two models are apart on the same inputs, and how far rounding moves the coarser one."""
    reference, grown = outputs(small, given), outputs(big, given)
    rounding = [_rounding(small, places[0], reference, given), _rounding(big, places[1], grown, given)]
    return distance(reference, grown), max(rounding)


def _mapped(place: Source) -> PreTrainedModel:
    if not isinstance(place, str | Path):
        asked = f"comparing a {type(place).__name__} layer by layer"
        raise GrowError(asked, "it is in memory already", "a folder or a hub id, or streaming=False")
    return mapped_model(place)


def _rounding(model: PreTrainedModel, place: Source, computed: dict[str, Tensor], inputs: dict[str, Tensor]) -> float:
    """How far what a model computed is from what it computes in float32, in shares of its spread."""
    if model.dtype in (torch.float32, torch.float64):
        return 0.0
    streamed = any(parameter.is_meta for parameter in model.parameters())
    wide = mapped_model(str(place), torch.float32) if streamed else copy.deepcopy(model).float()
    return distance(outputs(wide, _in_float32(inputs)), computed).relative


def _in_float32(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def _task(model: PreTrainedModel) -> str:
    """What a class's name says it is for, such as `ForCausalLM`."""
    return type(model).__name__.partition("For")[2]
