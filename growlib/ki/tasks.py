"""Which task a model was made for, which decides how labels meet logits."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from growlib.errors import GrowError

Task = Literal["causal", "masked", "seq2seq", "image"]


def task_of(model: PreTrainedModel) -> Task:
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
