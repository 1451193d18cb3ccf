"""Checkpoints: read one, describe one, make room for one, write one. Safetensors only."""

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from growlib.errors import GrowError
from growlib.growth_plan import Skeleton

logger = logging.getLogger("growlib")

Source = PreTrainedModel | str | Path

_MAPPINGS = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


def load(source: Source) -> PreTrainedModel:
    """A model as it is; a folder or a hub id in the class and the dtype that its config names.

    Raises GrowError for a folder without config or weights, for pickled, truncated or incomplete weights, and for
    a class that transformers does not have (code that comes with a checkpoint is never run).
    """
    if isinstance(source, PreTrainedModel):
        _check_model(source, loaded=True)
        return source
    asked, config = _read_config(source)
    if Path(source).is_dir():
        _check_weights(asked, Path(source))
    model_class = _model_class(asked, config)
    try:
        loaded: Any = model_class.from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise GrowError(asked, _first_line(error), "a whole safetensors checkpoint") from error
    model, report = loaded
    for keys, wrong in (("missing_keys", "lack"), ("mismatched_keys", "do not fit the config in")):
        if report[keys]:
            names = ", ".join(sorted(key if isinstance(key, str) else key[0] for key in report[keys]))
            raise GrowError(asked, f"the weights {wrong} {names}", "a whole safetensors checkpoint")
    return model.eval()


def describe(source: Source | PreTrainedConfig) -> tuple[type[PreTrainedModel], Skeleton]:
    """The class and the skeleton of a model, also one on the meta device; of a config; of a folder or a hub id.

    Weights are not read, and need not be there. Raises GrowError as `load`.
    """
    if isinstance(source, PreTrainedModel):
        _check_model(source)
        return type(source), skeleton(source)
    if isinstance(source, PreTrainedConfig):
        return class_of(source), skeleton_of(class_of(source), source)
    asked, config = _read_config(source)
    model_class = _model_class(asked, config)
    return model_class, skeleton_of(model_class, config)


def _check_model(model: PreTrainedModel, loaded: bool = False) -> None:
    odd = [n for n, p in model.named_parameters() if not p.is_floating_point() or (loaded and p.is_meta)]
    if odd:
        wrong = f"{len(odd)} of its tensors are quantised or not loaded, {odd[0]} among them"
        raise GrowError(f"growing a {type(model).__name__}", wrong, "a model with floating-point weights in memory")


def _read_config(source: str | Path) -> tuple[str, PreTrainedConfig]:
    """What was asked, in words, and the config of a folder or a hub id."""
    asked = f"reading the checkpoint {str(source)!r}"
    if not isinstance(source, str | Path):
        raise GrowError(asked, f"it is a {type(source).__name__}", "a PreTrainedModel, a folder or a hub id")
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GrowError(asked, "there is no config.json", "a folder written by save_pretrained")
    elif folder.exists() or folder.is_absolute() or len(folder.parts) > 2 or isinstance(source, Path):
        wrong = "it is a file" if folder.exists() else "there is no such folder"
        raise GrowError(asked, wrong, "a folder written by save_pretrained, or a hub id")
    try:
        return asked, AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (StrictDataclassError, OSError, ValueError, KeyError) as error:
        raise GrowError(asked, _first_line(error), "a folder or hub id with a config.json") from error


def _check_weights(asked: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        wrong = f"its weights are pickled ({', '.join(pickled)})" if pickled else "there are no weights"
        raise GrowError(asked, wrong, "weights in safetensors (save_pretrained writes them)")


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names, or transformers' first one for its model type. Raises GrowError."""
    names = list(config.architectures or [])
    for mapping in _MAPPINGS:
        entry = mapping.get(config.model_type, ())
        names += [entry] if isinstance(entry, str) else list(entry)
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if model_class is None:
        asked = f"inferring the family {config.model_type!r}"
        raise GrowError(asked, "transformers has no model class for it", "the class itself: infer(config, model_class)")
    return model_class


def _model_class(asked: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        wrong = f"config.json names the architecture {names[0]!r}" if names else "config.json names no architecture"
        raise GrowError(asked, wrong, "a class of transformers, or the loaded model itself")
    return model_class


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
    with no_init_weights():
        attention = like.config._attn_implementation
        model = (model_class or type(like))._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if like.can_generate():
        model.generation_config = like.generation_config
    return model.to(like.device).eval()


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Set a model's parameters and buffers by their names, in the dtype that the model has."""
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors:
        places[name].data = tensor.to(places[name])


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that exists as a whole or not at all: written beside its place, then renamed.

    Raises GrowError where something already stands at `path`.
    """
    path = Path(path)
    if path.exists():
        raise GrowError(f"writing {str(path)!r}", "it exists already", "a path where nothing stands")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
