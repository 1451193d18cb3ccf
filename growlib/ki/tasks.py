"""Which task a model was made for, and which positions of a batch count in its loss.

Shapes: B batch, L length, N positions that count: those whose label is not -100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from growlib.errors import GrowError

IGNORE_INDEX = -100  # transformers' losses and collators
Task = Literal["causal", "masked", "seq2seq", "image"]


def task_of(model: PreTrainedModel) -> Task:
    """Read from transformers' own tables; GrowError where it is no language model and no classifier into one class."""
    asked = f"Knowledge Inheritance with {type(model).__name__}"
    if not isinstance(model, PreTrainedModel):
        raise GrowError(asked, "it is not a model of transformers", "a PreTrainedModel")
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        return "seq2seq"
    class_names = {cls.__name__ for cls in type(model).__mro__}
    one_class = (model.config.num_labels or 0) > 1
    one_class &= model.config.problem_type in (None, "single_label_classification")
    if one_class and class_names & _classes(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        return "image"
    loss = LOSS_MAPPING.get(model.loss_type or "")
    # The masked table goes first: XLM and Flaubert are in both, and do not shift.
    if class_names & _classes(MODEL_FOR_MASKED_LM_MAPPING_NAMES) or loss is ForMaskedLMLoss:
        return "masked"
    if class_names & _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or loss is ForCausalLMLoss:
        return "causal"
    wrong = "its loss is neither a causal nor a masked language-modelling loss, nor that of one class per image"
    raise GrowError(asked, wrong, "a causal, masked or sequence-to-sequence language model, or an image classifier")


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of an encoder-decoder's decoder; empty where the model itself makes them from the labels."""
    if "decoder_input_ids" in inputs:
        return {"decoder_input_ids": inputs["decoder_input_ids"]}
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    composite = getattr(model.config, "decoder", None) is not None  # it makes a mask from the labels, too
    return {} if make is None or composite else {"decoder_input_ids": make(inputs["labels"])}


def _classes(table: Mapping[str, str | Sequence[str]]) -> set[str]:
    """The names in one of transformers' tables, where some types have several classes."""
    return {name for names in table.values() for name in ([names] if isinstance(names, str) else names)}


def outcomes(model: PreTrainedModel) -> int:
    """How many tokens or classes a model chooses from."""
    config: Any = model.config
    return config.num_labels if task_of(model) == "image" else config.get_text_config().vocab_size


@dataclass(frozen=True)
class Positions:
    """The labels of a batch, and which of them count. It is made once per batch and handed on.

    Attributes:
        aligned: [B, L], of images [B]: the label that each position's logits predict, as in `ForCausalLMLoss`.
        mask: the same shape: whether it counts.
        labels: [N], those that count.
    """

    aligned: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any], task: Task, shifts: bool = True) -> "Positions":
        """From `shift_labels`, or `labels`, which a causal model shifts if `shifts`; GrowError where there are none."""
        if "shift_labels" not in batch and "labels" not in batch:
            asked = f"a teacher for a batch of {', '.join(batch)}"
            raise GrowError(asked, "it has no labels", 'a column "labels", or a collator that makes it')
        if "shift_labels" in batch and shifts:
            return cls.at(batch["shift_labels"])
        labels = batch["labels"]
        return cls.at(F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if task == "causal" and shifts else labels)

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
