"""A language model's head, found and proven, so that its logits need not be computed as a whole.

Nothing here knows an architecture: what a model does to the output of its head is guessed from its config's fields
and believed only after its own forward pass has shown the same logits.

Shapes: B batch, L length, H hidden size, V tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.ki.projection import Projection

# Config fields of what is done to the logits after the head: the logits are multiplied, divided, or soft-capped.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class Reach:
    """The linear layer that ends a model, and what the model does to its output.

    Attributes:
        head: [V, H].
        scale, softcap: see `Projection`.
    """

    head: nn.Linear
    scale: float
    softcap: float | None

    def projection(self, hidden: Tensor) -> Projection:
        """The logits of hidden states, not yet computed; from [..., H] to N positions."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return Projection(hidden, self.head.weight, self.head.bias, self.scale, self.softcap)

    @contextmanager
    def replaced(self, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this lasts, the head computes something else from its hidden states."""
        self.head.forward = compute  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del self.head.forward


class Unreachable(Exception):
    """Why a model's head cannot be reached."""


def final_logits(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that a config names."""
    config = config.get_text_config(decoder=True)
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    caps = [cap for name in SOFTCAPS if (cap := getattr(config, name, None))]
    return scale, caps[0] if caps else None


@torch.no_grad()
def reach(bare: PreTrainedModel, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Reach:
    """Find a model's head and check, on a real batch without labels, that the logits are what it is thought to give.

    Args:
        bare: the model itself.
        call: the model in whatever wraps it.
        inputs: what the model takes, without labels.

    Raises:
        Unreachable: with the reason.
    """
    head = bare.get_output_embeddings()
    # A wrapper may subclass Linear (FSDP2 does); quantised and adapted layers have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = "missing" if head is None else f"a {type(head).__name__}"
        raise Unreachable(f"its head is {kind}, not a plain Linear")
    if "forward" in vars(head) or head.weight.is_meta:
        raise Unreachable("its head is offloaded or wrapped")
    found = Reach(head, *final_logits(bare.config))
    seen: list[Tensor] = []
    projected: list[Tensor] = []
    dtypes: list[torch.dtype] = []  # of the head's own output, half under autocast whatever becomes of it

    def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        # Here the weight is whole, wherever a wrapper keeps it split.
        projected.append(found.projection(args[0]).logits())

    handles = [
        head.register_forward_pre_hook(watch),
        head.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype)),
    ]
    try:
        outputs = call(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(outputs, dict):
        raise Unreachable("it returns a tuple")
    logits = outputs["logits"]
    if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
        raise Unreachable(f"its head runs {len(seen)} times, or not at every position")
    if projected[0].numel() != logits.numel():
        raise Unreachable("it adds or drops token ids after its head")
    tolerance = 1e-4 if dtypes[0].itemsize >= 4 else 3e-2
    if not logits.isfinite().all():
        raise Unreachable("its logits are not finite")
    difference = (projected[0].view_as(logits) - logits).abs().max()
    if not difference <= tolerance * logits.float().abs().max():
        raise Unreachable("it changes its logits after the head in a way that its config does not name")
    try:
        with found.replaced(stand_in):
            shape = call(**inputs).logits.shape
    except Exception as error:
        raise Unreachable(f"it works on its logits after the head ({type(error).__name__})") from error
    if shape != (*logits.shape[:-1], 1):
        raise Unreachable("it adds to its logits after the head")
    return found


def stand_in(hidden: Tensor) -> Tensor:
    """Logits of one token that is always 0, [..., 1]."""
    return hidden.new_zeros((*hidden.shape[:-1], 1), dtype=torch.float32)


def without_logits(found: Reach, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Projection:
    """A forward pass up to the head, of a model that nothing wraps: the logits, not yet computed.

    The states are in the head's own dtype; autocast gives others.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden.to(found.head.weight.dtype))
        return stand_in(hidden)

    with found.replaced(keep):
        call(**inputs)
    return found.projection(seen[0])
