"""Which task a model was made for, and which positions of a batch count in its loss.

Shapes: B batch, L length, N positions that count: those whose label is not -100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForTokenClassification,
)
from transformers.models.auto import modeling_auto as tables

from growlib.errors import GrowError

IGNORE_INDEX = -100  # transformers' losses and collators
LABELS = {"labels", "shift_labels", "start_positions", "end_positions"}
ANY = 1 << 62  # number of outcomes of a question's answer: as many as its row has positions
Task = Literal[
    "causal", "masked", "seq2seq", "image", "sequence-classification", "token-classification", "question-answering"
]


class Kind(NamedTuple):
    """What transformers has for a task: its auto class, a table of its classes, and a loss that no other task has."""

    auto_class: str
    classes: Mapping[str, str | Sequence[str]]
    loss: Any = None


# In this order: XLM and Flaubert are in the masked table and in the causal one, and do not shift their labels.
KINDS: dict[Task, Kind] = {
    "image": Kind("AutoModelForImageClassification", tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "sequence-classification": Kind(
        "AutoModelForSequenceClassification", tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "token-classification": Kind(
        "AutoModelForTokenClassification",
        tables.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ForTokenClassification,
    ),
    "question-answering": Kind(
        "AutoModelForQuestionAnswering", tables.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ForQuestionAnsweringLoss
    ),
    "masked": Kind("AutoModelForMaskedLM", tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES, ForMaskedLMLoss),
    "causal": Kind("AutoModelForCausalLM", tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ForCausalLMLoss),
}
AUTO_CLASSES: dict[str, str] = {
    task: KINDS[task].auto_class if task in KINDS else "AutoModelForSeq2SeqLM" for task in get_args(Task)
}
CLASSIFIERS = ("image", "sequence-classification", "token-classification")
WITHOUT_HEAD = (*CLASSIFIERS, "question-answering")  # their logits are few: they are computed as a whole


def task_of(model: PreTrainedModel) -> Task:
    """Read from transformers' own tables; GrowError for a loss that is no cross-entropy with one label a position."""
    asked = f"Knowledge Inheritance with {type(model).__name__}"
    if not isinstance(model, PreTrainedModel):
        raise GrowError(asked, "it is not a model of transformers", "a PreTrainedModel")
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        return "seq2seq"
    class_names = {cls.__name__ for cls in type(model).__mro__}
    loss = LOSS_MAPPING.get(model.loss_type or "")
    for task, kind in KINDS.items():
        if class_names & _names(kind.classes) or (loss is not None and loss is kind.loss):
            if task in ("image", "sequence-classification"):
                _check_one_class(asked, model.config)
            return task
    wrong = "its loss is not the cross-entropy of tokens, of one class, or of an answer's ends"
    valid = (
        "a causal, masked or sequence-to-sequence language model; a classifier of images, sequences or tokens; or a "
    )
    raise GrowError(asked, wrong, valid + "model for question answering")


def _check_one_class(asked: str, config: Any) -> None:
    """Raise GrowError where a classifier's loss is none over classes of which one is right."""
    problem, count = config.problem_type, config.num_labels or 0
    if problem is None:
        problem = "regression" if count < 2 else "single_label_classification"
    losses = {"regression": "a squared error", "multi_label_classification": "of several labels at once"}
    if problem != "single_label_classification":
        wrong = f"its loss is {losses.get(problem, 'of another kind')} (problem_type={config.problem_type!r}, "
        valid = "one class out of two or more: problem_type='single_label_classification' and num_labels to match"
        raise GrowError(asked, f"{wrong}num_labels={count})", valid)


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of an encoder-decoder's decoder; empty where the model itself makes them from the labels."""
    if "decoder_input_ids" in inputs:
        return {"decoder_input_ids": inputs["decoder_input_ids"]}
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    composite = getattr(model.config, "decoder", None) is not None  # it makes a mask from the labels, too
    return {} if make is None or composite else {"decoder_input_ids": make(inputs["labels"])}


def _names(table: Mapping[str, str | Sequence[str]]) -> set[str]:
    """The names in one of transformers' tables, where some types have several classes."""
    return {name for names in table.values() for name in ([names] if isinstance(names, str) else names)}


def outcomes(model: PreTrainedModel) -> int:
    """How many tokens or classes a model chooses from."""
    config: Any = model.config
    task = task_of(model)
    if task == "question-answering":
        return ANY
    return config.num_labels if task in CLASSIFIERS else config.get_text_config().vocab_size


def logits_in(outputs: Any, task: Task) -> Tensor | None:
    """The logits of a model's outputs: one row per label. Of an answer's two ends [B, 2, L]."""
    if not isinstance(outputs, dict):
        return None
    if task != "question-answering":
        return outputs.get("logits")
    start, end = outputs.get("start_logits"), outputs.get("end_logits")
    return None if start is None or end is None else torch.stack([start, end], 1)


@dataclass(frozen=True)
class Positions:
    """The labels of a batch, and which of them count. It is made once per batch and handed on.

    Attributes:
        aligned: [B, L], of images and sequences [B], of answers [B, 2]: the label that each position's logits predict,
            as in transformers' losses.
        mask: the same shape: whether it counts.
        labels: [N], those that count.
        shares: [N], each position's share of the loss, 1 on average; None: all count alike.
    """

    aligned: Tensor
    mask: Tensor
    labels: Tensor
    shares: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], task: Task, shifts: bool = True) -> "Positions":
        """From `shift_labels`, or `labels`, which a causal model shifts if `shifts`; GrowError where there are none."""
        if task == "question-answering":
            return cls._of_answers(batch)
        if "shift_labels" in batch and shifts:
            return cls.at(_whole(batch, "shift_labels"))
        labels = _whole(batch, "labels")
        if task in ("image", "sequence-classification"):
            labels = labels.flatten()
        return cls.at(F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if task == "causal" and shifts else labels)

    @classmethod
    def _of_answers(cls, batch: Mapping[str, Any]) -> "Positions":
        """An end outside of the row does not count, and the mean of the starts weighs as much as that of the ends."""
        row = batch.get("input_ids", batch.get("inputs_embeds"))
        if row is None:
            raise GrowError("a teacher for a batch of " + ", ".join(batch), "it has no input_ids", "tokenised text")
        length = row.shape[1]
        ends = torch.stack([_whole(batch, name).flatten() for name in ("start_positions", "end_positions")], 1)
        ends = ends.clamp(min=0)
        positions = cls.at(ends.masked_fill(ends >= length, IGNORE_INDEX))
        shares = positions.count / (2 * positions.mask.sum(0))
        return cls(positions.aligned, positions.mask, positions.labels, shares.expand(ends.shape)[positions.mask])

    @classmethod
    def at(cls, aligned: Tensor) -> "Positions":
        """From labels that are aligned."""
        mask = aligned != IGNORE_INDEX
        return cls(aligned, mask, aligned[mask])

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def flat(self) -> Tensor:
        """The mask as one dimension, which chooses among the rows of [B · L, ...]."""
        return self.mask.reshape(-1)

    def of_rows(self, rows: Tensor) -> "Positions":
        """Those of some rows of the batch."""
        return Positions.at(self.aligned[rows])


def _whole(batch: Mapping[str, Any], name: str) -> Tensor:
    """Labels of a batch; raises GrowError where they are none."""
    labels = batch.get(name)
    if labels is None:
        asked = f"a teacher for a batch of {', '.join(batch)}"
        raise GrowError(asked, f"it has no {name}", f'a column "{name}", or a collator that makes it')
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        valid = "a tensor of whole numbers: one label for each position (a regression has none)"
        raise GrowError(f"a teacher for {name} of {kind}", "they are no class or token ids", valid)
    if labels.numel() == 0:
        wrong = f"its {name} have the shape {list(labels.shape)}: there is no position in it"
        raise GrowError(f"a teacher for a batch of {', '.join(batch)}", wrong, "rows of one or more tokens")
    return labels
