"""How the trainer behind the mixin computes its loss. Nothing declares it, so it is measured on the first batch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from growlib.ki.head_access import HeadAccess, NoHeadAccess, access_head
from growlib.ki.tasks import LABELS, WITHOUT_HEAD, Positions, Task, decoder_inputs

logger = logging.getLogger("growlib")

ROUTED = "output_router_logits"  # in a config and in a forward pass: with it, the auxiliary loss is in the loss


class LossForm(NamedTuple):
    """How a step computes its loss.

    Attributes:
        divides: the loss is a sum divided by `num_items_in_batch`, not a mean over the micro-batch.
        access: to the student's head; None: the loss needs whole logits.
        shifts: the labels are aligned as the task says; False: each position predicts its own (BartForCausalLM).
        auxiliary: what the auxiliary loss of a mixture of experts is multiplied by; None: not known, or there is none.
    """

    divides: bool
    access: HeadAccess | None
    shifts: bool
    auxiliary: float | None = None


def find_loss_form(
    model: nn.Module,
    student: PreTrainedModel,
    inputs: dict[str, Any],
    task: Task,
    loss_behind: Callable[[nn.Module, dict[str, Any], Tensor], Any],
    needs_logits: str | None,
) -> LossForm:
    """Run the student, which `model` wraps, on a batch, and compare its loss with the plain cross-entropy.

    Models that compute their loss inline (BERT, T5) accept `num_items_in_batch` and ignore it. A loss that is divided
    by it is half as large with twice as many items.

    Args:
        loss_behind: (model, batch, number of items) -> the loss of the trainer behind the mixin, of one process.
        needs_logits: why it needs whole logits, as far as the trainer's settings say.
    """
    positions = Positions.of(inputs, task)
    if positions.count == 0:  # its loss would be NaN
        inputs = {name: _some_label(name, x) for name, x in inputs.items()}
        positions = Positions.of(inputs, task)
    items = positions.mask.sum()
    access: HeadAccess | None = None
    shifts = True
    auxiliary = None
    with _measuring(model) as model:
        once = loss_behind(model, dict(inputs), items)
        if getattr(student.config.get_text_config(), ROUTED, False):
            alone = loss_behind(model, {**inputs, ROUTED: False}, items)
            auxiliary = _auxiliary(model, student, inputs, once - alone)
        divides = bool(once != loss_behind(model, dict(inputs), 2 * items))
        try:
            if needs_logits is not None:
                raise NoHeadAccess(needs_logits)
            if task not in WITHOUT_HEAD:
                unlabelled = without_labels(inputs, student, task)
                access = access_head(student, model, unlabelled)
                plain = once if auxiliary is None else alone
                shifts = _shifts(plain, model(**unlabelled).logits, inputs, task)
        except NoHeadAccess as reason:
            access = None
            logger.warning("The loss is computed from whole logits: %s.", reason)
    return LossForm(divides, access, shifts, auxiliary)


def _auxiliary(model: nn.Module, student: PreTrainedModel, inputs: dict[str, Any], added: Tensor) -> float | None:
    """The config's weight of the auxiliary loss, if it is what the trainer behind the mixin `added`."""
    weight = getattr(student.config.get_text_config(), "router_aux_loss_coef", None)
    value = model(**inputs).get("aux_loss")
    if value is None or not weight or abs(added - weight * value) > 1e-2 * weight * value:
        return None
    return weight


def is_plain(
    model: nn.Module,
    student: PreTrainedModel,
    inputs: dict[str, Any],
    task: Task,
    loss_behind: Callable[[nn.Module, dict[str, Any], Tensor], Any],
) -> bool:
    """Whether the loss of the trainer behind the mixin is the plain cross-entropy; as `find_loss_form`."""
    with _measuring(model) as model:
        try:
            once = loss_behind(model, dict(inputs), Positions.of(inputs, task).mask.sum())
            _shifts(once, model(**without_labels(inputs, student, task)).logits, inputs, task)
        except NoHeadAccess:
            return False
    return True


@contextmanager
def _measuring(model: nn.Module) -> Iterator[nn.Module]:
    """A model without the graph of torch.compile, for what runs once, and without dropout."""
    model = getattr(model, "_orig_mod", model)
    trains = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(trains)


def _some_label(name: str, x: Any) -> Any:
    """Labels that count, of a batch in which none does."""
    if name in ("start_positions", "end_positions"):
        return torch.zeros_like(x)
    return x.clamp(min=0) if name in LABELS else x


def without_labels(inputs: dict[str, Any], student: PreTrainedModel, task: Task) -> dict[str, Any]:
    """The batch as a forward pass without a loss takes it; raises NoHeadAccess where the student needs its labels."""
    kept = {name: value for name, value in inputs.items() if name not in LABELS}
    if task == "seq2seq":
        of_decoder = decoder_inputs(student, inputs)
        if not of_decoder:
            raise NoHeadAccess("it makes its decoder's inputs from the labels by itself")
        kept |= of_decoder
    return kept


def _shifts(loss: Tensor, logits: Tensor, inputs: dict[str, Any], task: Task) -> bool:
    """Whether a loss is the CE of the labels as the task aligns them, or (False) of each position's own label."""
    exact = logits.dtype.itemsize >= 4 and not torch.is_autocast_enabled(logits.device.type)
    for shifts in (True,) if "shift_labels" in inputs else (True, False):
        labels = Positions.of(inputs, task, shifts).aligned
        if logits.shape[:-1] != labels.shape:
            raise NoHeadAccess("its logits are not one per label")
        ce = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        if abs(loss - ce) <= (1e-4 if exact else 1e-2) * ce:
            return shifts
    raise NoHeadAccess("the student's own loss is not the plain cross-entropy")
