"""The source and the grown model side by side: do they compute the same?"""

import copy
from dataclasses import dataclass
from operator import gt

import torch
from torch import Tensor
from transformers import PreTrainedModel

from growlib import checkpoint
from growlib.checkpoint import Source
from growlib.errors import GrowError
from growlib.target import is_mixture

FLOAT32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """How far the grown model's outputs are from the source's.

    `max_rel` is `max_abs` over the spread (maximum minus minimum) of the source's output. `exact` holds where it is
    at most 1e-5, or four times the rounding of the source's own dtype as measured on the same inputs.
    """

    max_abs: float
    max_rel: float
    tolerance: float

    @property
    def exact(self) -> bool:
        return self.max_rel <= self.tolerance

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "NOT exact"
        return (
            f"{verdict}: max |Δ| {self.max_abs:.3g}, {self.max_rel:.3g} of the spread (tolerance {self.tolerance:.3g})"
        )


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
    small, big = checkpoint.load(small), checkpoint.load(big)
    asked = "comparing a source with its grown model"
    if type(big) is not type(small) and not (is_mixture(big.config) and _task(small) == _task(big)):
        wrong = f"they are a {type(small).__name__} and a {type(big).__name__}"
        raise GrowError(asked, wrong, "two models of one class, or a dense one and a mixture of experts")
    shapes = {name: parameter.shape for name, parameter in big.named_parameters()}
    larger = [n for n, p in small.named_parameters() if n in shapes and any(map(gt, p.shape, shapes[n]))]
    if larger:
        wrong = f"{larger[0]} is smaller in the second"
        raise GrowError(asked, wrong, "a model at least as large as the source")
    if inputs is None:
        inputs = _token_ids(small)
    reference, grown = _outputs(small, inputs), _outputs(big, inputs)
    tolerance = FLOAT32_TOLERANCE
    if small.dtype not in (torch.float32, torch.float64):
        wide = copy.deepcopy(small).float()
        tolerance = max(tolerance, 4 * _distance(_outputs(wide, inputs), reference)[1])
    return Verification(*_distance(reference, grown), tolerance)


def _task(model: PreTrainedModel) -> str:
    """What a class's name says it is for, such as `ForCausalLM`."""
    return type(model).__name__.partition("For")[2]


def _token_ids(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = min(16, getattr(model.config, "max_position_embeddings", 16))
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    return {"input_ids": ids.to(model.device)}


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    was_training = model.training
    outputs = model.eval()(**inputs, return_dict=True)
    model.train(was_training)
    return {name: value.double() for name, value in outputs.items() if isinstance(value, Tensor) and value.ndim >= 2}


def _distance(reference: dict[str, Tensor], grown: dict[str, Tensor]) -> tuple[float, float]:
    """The largest absolute distance, and the largest in shares of its output's spread."""
    distances = []
    for name, old in reference.items():
        new = grown[name][tuple(slice(length) for length in old.shape)].to(old.device)
        largest = (new - old).abs().max()
        distances.append((largest.item(), (largest / (old.max() - old.min())).item()))
    # A NaN must not hide behind a smaller number.
    absolute, relative = torch.tensor(distances, dtype=torch.float64).amax(0).tolist()
    return absolute, relative
