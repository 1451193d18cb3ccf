"""How the trainer behind the mixin computes its loss. Nothing declares it, so it is measured on the first batch."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from growlib.ki.head_access import HeadAccess, NoHeadAccess, access_head
from growlib.ki.tasks import Positions, Task, decoder_inputs

logger = logging.getLogger("growlib")


class LossForm(NamedTuple):
    """How a step computes its loss.

    Attributes:
        divides: the loss is a sum divided by `num_items_in_batch`, not a mean over the micro-batch.
        access: to the student's head; None: the loss needs whole logits.
        shifts: the labels are aligned as the task says; False: each position predicts its own (BartForCausalLM).
    """

    divides: bool
    access: HeadAccess | None
    shifts: bool


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
        inputs = {name: x.clamp(min=0) if name in ("labels", "shift_labels") else x for name, x in inputs.items()}
        positions = Positions.of(inputs, task)
    items = positions.mask.sum()
    model = getattr(model, "_orig_mod", model)  # no graph of torch.compile for what runs once
    trains = model.training
    model.eval()  # no dropout differs
    access: HeadAccess | None = None
    shifts = True
    with torch.no_grad():
        once = loss_behind(model, dict(inputs), items)
        divides = bool(once != loss_behind(model, dict(inputs), 2 * items))
        try:
            if needs_logits is not None:
                raise NoHeadAccess(needs_logits)
            unlabelled = without_labels(inputs, student, task)
            access = access_head(student, model, unlabelled)
            shifts = _shifts(once, model(**unlabelled).logits, inputs, task)
        except NoHeadAccess as reason:
            access = None
            logger.warning("The loss is computed from whole logits: %s.", reason)
    model.train(trains)
    return LossForm(divides, access, shifts)


def without_labels(inputs: dict[str, Any], student: PreTrainedModel, task: Task) -> dict[str, Any]:
    """The batch as a forward pass without a loss takes it; raises NoHeadAccess where the student needs its labels."""
    kept = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
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
