"""Checkpoints: read one, describe one, make room for one, fill it. Safetensors only."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from growlib.errors import GrowError
from growlib.folders import FLOATS, check_config, folder_of, tensors_in
from growlib.growth_plan import Skeleton
from growlib.parts import parts_of

logger = logging.getLogger("growlib")

Source = PreTrainedModel | str | Path
MOST = 5  # names in one error

_MAPPINGS = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


# Before the others where a config has parts: a causal language model of such a config is its text alone.
_OF_PARTS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def load(source: Source) -> PreTrainedModel:
    """A model without what torch wraps around it; a folder or a hub id in the class and dtype that its config names.

    Raises GrowError for a folder without config or weights, for pickled, truncated, incomplete or quantised weights,
    for tensors that the config has no place for, for adapters, and for a class that transformers does not have (code
    that comes with a checkpoint is never run).
    """
    if not isinstance(source, str | Path):
        return _model_in(source, loaded=True)
    asked = f"reading the checkpoint {str(source)!r}"
    folder = folder_of(source)
    model_class = _model_class(asked, config_in(asked, folder))
    stored = tensors_in(asked, folder)
    try:
        loaded: Any = model_class.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever transformers raises
        raise GrowError(asked, _first_line(error), "a whole safetensors checkpoint") from error
    model, report = loaded
    _check_all_used(asked, model, report, {name for name, (_, dtype, _) in stored.items() if dtype not in FLOATS})
    return model.eval()


def _check_all_used(asked: str, model: PreTrainedModel, report: Mapping[str, Any], no_floats: set[str]) -> None:
    """Raise GrowError where a stored tensor has no place in the model, or the other way round."""
    whole = "a whole safetensors checkpoint"
    for keys, wrong, valid in (
        ("missing_keys", "the weights lack", whole),
        ("mismatched_keys", "the weights do not fit the config in", whole),
        ("unexpected_keys", "the config has no place for", "a config for all of them, or the loaded model itself"),
    ):
        if report[keys]:
            names = sorted(key if isinstance(key, str) else key[0] for key in report[keys])
            raise GrowError(asked, f"{wrong} {_some(names)}", valid)
    if odd := sorted(no_floats & {name for name, _ in model.named_parameters()}):
        raise GrowError(asked, f"{_some(odd)} are stored as no floating-point numbers", "weights in floating point")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST else f"{', '.join(names[:MOST])} and {len(names) - MOST} more"


def describe(source: Source | PreTrainedConfig) -> tuple[type[PreTrainedModel], Skeleton]:
    """The class and the skeleton of a model, also one on the meta device; of a config; of a folder or a hub id.

    Weights are not read, and need not be there. Raises GrowError as `load`.
    """
    if isinstance(source, PreTrainedConfig):
        return class_of(source), skeleton_of(class_of(source), source)
    if not isinstance(source, str | Path):
        model = _model_in(source)
        return type(model), skeleton(model)
    asked = f"reading the checkpoint {str(source)!r}"
    config = config_in(asked, folder_of(source, weights=False))
    model_class = _model_class(asked, config)
    return model_class, skeleton_of(model_class, config)


def _model_in(source: Any, loaded: bool = False) -> PreTrainedModel:
    """The model in what torch wraps around it. Raises GrowError for what is none, and says where one is."""
    while isinstance(wrapped := getattr(source, "_orig_mod", None) or getattr(source, "module", None), nn.Module):
        source = wrapped  # torch.compile; DataParallel and DistributedDataParallel
    asked = f"growing a {type(source).__name__}"
    merged = "the merged model: merge_and_unload() of the PeftModel"
    if hasattr(source, "peft_config") or getattr(source, "_hf_peft_config_loaded", False):
        raise GrowError(asked, "it is a model with an adapter beside its weights", merged)
    if not isinstance(source, PreTrainedModel):
        inside = isinstance(source, nn.Sequential) and len(source) and hasattr(source[0], "auto_model")
        valid = "its transformer: st[0].auto_model" if inside else "a PreTrainedModel, a folder or a hub id"
        raise GrowError(asked, "it is no PreTrainedModel", valid)
    if any("lora_" in name for name, _ in source.named_parameters()):
        raise GrowError(asked, "LoRA adapters were put into its layers", merged)
    odd = [n for n, p in source.named_parameters() if not p.is_floating_point() or (loaded and p.is_meta)]
    if odd or getattr(source, "is_quantized", False):
        wrong = f"its tensors are quantised or not loaded: {_some(odd) or 'all of them'}"
        raise GrowError(asked, wrong, "a model with floating-point weights in memory, such as model.dequantize()")
    return source


def config_in(asked: str, folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint. Raises GrowError where transformers alone cannot read it."""
    content = check_config(asked, folder)
    if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING:
        wrong = "its code comes with the checkpoint, and such code is never run here"
        raise GrowError(asked, wrong, "the model itself, which you loaded with trust_remote_code=True")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises
        raise GrowError(asked, _first_line(error), "a config.json that transformers reads") from error


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names, or transformers' first one for its model type. Raises GrowError."""
    names = list(config.architectures) if isinstance(config.architectures, list) else []
    for mapping in (*(_OF_PARTS if parts_of(config) else ()), *_MAPPINGS):
        entry = mapping.get(config.model_type, ())
        names += [entry] if isinstance(entry, str) else list(entry)
    model_class = next((known for name in names if (known := _class_named(name))), None)
    if model_class is None:
        asked = f"finding the class of {config.model_type!r}"
        raise GrowError(asked, "transformers has no model class for it", "the class itself: infer(config, model_class)")
    return model_class


def _model_class(asked: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures if isinstance(config.architectures, list) else []
    model_class = _class_named(names[0]) if names else None
    if model_class is None:
        wrong = f"config.json names the architecture {names[0]!r}" if names else "config.json names no architecture"
        raise GrowError(asked, wrong, "a class of transformers, or the loaded model itself")
    return model_class


def _class_named(name: Any) -> type[PreTrainedModel] | None:
    """A class of transformers; None where it has none that this machine can import."""
    try:
        model_class = getattr(transformers, name, None)
        return model_class if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel) else None
    except (ImportError, TypeError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def skeleton(model: PreTrainedModel) -> Skeleton:
    """Names and shapes of a model's tensors, tied ones once."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers() if n in model.state_dict()}
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    aliases = frozenset(name.removeprefix(prefix) for name in model.state_dict() if name not in shapes)
    return Skeleton(type(model).__name__, model.config, shapes, aliases, prefix)


def skeleton_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Skeleton:
    """The same for a class and a config, without memory for the values. Raises GrowError for impossible sizes."""
    try:
        with torch.device("meta"):
            return skeleton(model_class(config))
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        asked = f"building a {model_class.__name__} of the target's sizes"
        raise GrowError(asked, _first_line(error), "sizes that the class can be built with") from error


def class_like(model_class: type[PreTrainedModel], model_type: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class for the same task that goes with another config. Raises GrowError where transformers has none."""
    if config.model_type == model_type:
        return model_class
    tasks = [mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    named = [mapping.get(config.model_type) for mapping in tasks if mapping.get(model_type) == model_class.__name__]
    name = next((name for name in named if isinstance(name, str)), None)
    if name is None:
        asked = f"growing a {model_class.__name__} into a {config.model_type} model"
        raise GrowError(asked, "transformers has no such class for its task", "the causal language models of both")
    return getattr(transformers, name)


def empty_model(
    like: PreTrainedModel,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """A model of another size, by default of the same class, its parameters not yet set, its buffers computed."""
    config = copy.deepcopy(config)  # the Trainer writes into a model's config; the plan that holds it is frozen
    with no_init_weights():
        attention = like.config._attn_implementation
        model = (model_class or type(like))._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if like.can_generate():
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()


def filled_model(
    asked: str, model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model of given values, which are not copied. Raises GrowError where they are not all of its."""
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    with no_init_weights():
        model = model_class._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    shapes, places = skeleton(model).shapes, model.state_dict()
    valid = "the config of the model that was trained"
    if lost := sorted(shapes.keys() - tensors.keys()) + sorted(tensors.keys() - places.keys()):
        wrong = f"a {model_class.__name__} and the weights do not have the same tensors: {_some(lost)}"
        raise GrowError(asked, wrong, valid)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise GrowError(asked, f"{name} is {tuple(tensors[name].shape)}, by its config {shape}", valid)
    fill(model, ((name, tensors[name]) for name in shapes))
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Set a model's parameters and buffers by their names, in the dtype that the model has."""
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors:
        places[name].data = tensor.to(places[name])


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by its name or as it is. Raises GrowError for anything else."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise GrowError(f"a result of dtype {dtype!r}", "it is no floating-point dtype", "such as torch.bfloat16")
    return wanted
