"""Access to a model's LM head, so that its logits need not be computed as a whole.

Nothing here knows an architecture. What a model does to the output of its head is guessed from its config's fields, and
believed only after its own forward pass has given the same logits.

Shapes: H hidden size, V tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.ki.columns import is_split, replicated
from growlib.ki.projection import Projection

# Config fields of what is done to the logits after the head: the logits are multiplied, divided, or soft-capped.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class HeadAccess:
    """The linear layer that ends a model, of weight [V, H], and what the model does to its output: see `Projection`.

    `mesh` has the processes of a vocabulary-parallel head, of which each reads the same hidden states; None: one reads.
    """

    head: nn.Linear
    scale: float
    softcap: float | None
    mesh: DeviceMesh | None = None

    def projection(self, hidden: Tensor) -> Projection:
        """The logits of hidden states, not yet computed; from [..., H] to N positions."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.mesh is not None:
            hidden = replicated(hidden, self.mesh)
        return Projection(hidden, self.head.weight, self.head.bias, self.scale, self.softcap)

    @contextmanager
    def replaced(self, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this lasts, the head computes something else from its hidden states."""
        before = vars(self.head).get("forward")  # of a vocabulary-parallel head
        vars(self.head)["forward"] = compute
        try:
            yield
        finally:
            del self.head.forward
            if before is not None:
                vars(self.head)["forward"] = before

    def run(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Projection:
        """A forward pass up to the head, of a model without a wrapper: its logits, not yet computed."""
        states: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            states.append(hidden.to(self.head.weight.dtype))  # autocast gives another dtype
            return stand_in(hidden)

        with self.replaced(keep):
            model(**inputs)
        return self.projection(states[0])


class NoHeadAccess(Exception):
    """Why the logits of a model can only be had as a whole."""


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


def tensor_parallel(model: PreTrainedModel) -> int:
    """Over how many processes transformers has split each of a model's matrices."""
    return getattr(model, "tp_size", None) or 1


@torch.no_grad()
def access_head(bare: PreTrainedModel, model: Callable[..., Any], inputs: Mapping[str, Any]) -> HeadAccess:
    """Check, on a real batch without labels, that a model's logits are what its head and its config make of them.

    `bare` is the model itself, `model` the same in its wrappers. Raises NoHeadAccess with the reason.
    """
    head = bare.get_output_embeddings()
    # A wrapper may subclass Linear (FSDP2 does); quantised and adapted layers have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = "missing" if head is None else f"a {type(head).__name__}"
        raise NoHeadAccess(f"its head is {kind}, not a plain Linear")
    if head.weight.is_meta or ("forward" in vars(head) and tensor_parallel(bare) == 1):
        raise NoHeadAccess("its head is offloaded or wrapped")
    access = HeadAccess(head, *final_logits(bare.config))
    projected: list[Tensor] = []
    dtypes: list[torch.dtype] = []  # of the head's own output, half under autocast whatever becomes of it

    def project(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Here the weight is whole, wherever a wrapper keeps it split, or it is vocabulary-parallel.
        nonlocal access
        if is_split(head.weight):
            access = replace(access, mesh=head.weight.device_mesh)
        projected.append(access.projection(args[0]).logits().unflatten(0, args[0].shape[:-1]))

    handles = [
        head.register_forward_pre_hook(project),
        head.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype)),
    ]
    try:
        outputs = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(outputs, dict):
        raise NoHeadAccess("it returns a tuple")
    logits = outputs["logits"]
    if len(projected) != 1 or projected[0].shape[:-1] != logits.shape[:-1]:
        raise NoHeadAccess(f"its head runs {len(projected)} times, or not at every position")
    if projected[0].shape != logits.shape:
        raise NoHeadAccess("it adds or drops token ids after its head")
    tolerance = 1e-4 if dtypes[0].itemsize >= 4 else 3e-2
    if not logits.isfinite().all():
        raise NoHeadAccess("its logits are not finite")
    if not (projected[0] - logits).abs().max() <= tolerance * logits.float().abs().max():
        raise NoHeadAccess("it changes its logits after the head in a way that its config does not name")
    try:
        with access.replaced(stand_in):
            shape = model(**inputs).logits.shape
    except Exception as error:
        raise NoHeadAccess(f"it works on its logits after the head ({type(error).__name__})") from error
    if shape != (*logits.shape[:-1], 1):
        raise NoHeadAccess("it adds to its logits after the head")
    return access


def stand_in(hidden: Tensor) -> Tensor:
    """Logits of one token that is always 0, [..., 1]."""
    return hidden.new_zeros((*hidden.shape[:-1], 1), dtype=torch.float32)
