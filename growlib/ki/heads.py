"""What kind of model a model is, and which label each of its positions predicts."""

from collections.abc import Mapping, Sequence
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

Head = Literal["causal", "masked", "seq2seq", "image"]


def head_of(model: PreTrainedModel) -> Head:
    """Read from transformers' own tables how a model's loss aligns labels with logits.

    Raises:
        GrowError: the model is neither a language model nor a classifier of images into one class each.
    """
    asked = f"Knowledge Inheritance with {type(model).__name__}"
    if not isinstance(model, PreTrainedModel):
        raise GrowError(asked, "it is no model of transformers", "a PreTrainedModel")
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        return "seq2seq"
    class_names = {cls.__name__ for cls in type(model).__mro__}
    one_class = (model.config.num_labels or 0) > 1
    one_class &= model.config.problem_type in (None, "single_label_classification")
    if one_class and class_names & _classes(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        return "image"
    loss = LOSS_MAPPING.get(model.loss_type or "")
    # The masked table goes first: XLM and Flaubert stand in both, and do not shift.
    if class_names & _classes(MODEL_FOR_MASKED_LM_MAPPING_NAMES) or loss is ForMaskedLMLoss:
        return "masked"
    if class_names & _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or loss is ForCausalLMLoss:
        return "causal"
    raise GrowError(
        asked,
        "its loss is neither a causal nor a masked language-modelling loss, nor that of one class per image",
        "a causal, masked or sequence-to-sequence language model, or an image classifier",
    )


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an encoder-decoder's decoder reads of a batch; empty where the model makes it of the labels by itself."""
    if "decoder_input_ids" in inputs:
        return {"decoder_input_ids": inputs["decoder_input_ids"]}
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    composite = getattr(model.config, "decoder", None) is not None  # it makes a mask of the labels, too
    return {} if make is None or composite else {"decoder_input_ids": make(inputs["labels"])}


def _classes(table: Mapping[str, str | Sequence[str]]) -> set[str]:
    """The names in one of transformers' tables, where some types have several classes."""
    return {name for names in table.values() for name in ([names] if isinstance(names, str) else names)}


def outcomes(model: PreTrainedModel) -> int:
    """How many tokens or classes a model chooses from."""
    config: Any = model.config
    return config.num_labels if head_of(model) == "image" else config.get_text_config().vocab_size


def aligned_labels(inputs: dict[str, Tensor], head: Head) -> Tensor:
    """The label that each position's logits predict, [batch, length], of images [batch]; as in `ForCausalLMLoss`."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    if "labels" not in inputs:
        given = ", ".join(inputs)
        raise GrowError(f"a teacher for a batch of {given}", "it has no labels", 'a column "labels", or a collator\'s')
    if head == "causal":
        return F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]
    return inputs["labels"]
