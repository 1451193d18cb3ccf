"""What a user calls a teacher: a model in whatever wraps it, a folder, a hub id. Its own code never runs."""

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from growlib.errors import GrowError
from growlib.folders import FLOATS, check_config, folder_of, read_json, tensors_in
from growlib.ki.tasks import AUTO_CLASSES

logger = logging.getLogger("growlib")

LONGEST = 80  # characters of a name or a value in an error
MOST = 5  # names in one error
VALID = "a PreTrainedModel, a folder or a hub id"
SAFE: dict[str, Any] = {"trust_remote_code": False}
ADAPTER = "adapter_config.json"


def short(value: Any) -> str:
    """How an error shows a value: a model by its name, anything else by its repr, neither at length."""
    if isinstance(value, nn.Module):
        return name_of(value)
    if isinstance(value, tuple | list | dict) and any(isinstance(x, nn.Module) for x in _elements(value)):
        return f"{type(value).__name__} of {', '.join(map(short, _elements(value)))}"[:LONGEST]
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _elements(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def name_of(teacher: Any) -> str:
    """A teacher in an error: where it was read from, or its class."""
    if isinstance(teacher, str | os.PathLike):
        text = os.fsdecode(teacher)
    else:
        config = getattr(teacher, "config", None)
        text = getattr(config, "name_or_path", None) or ""
        if not (isinstance(text, str) and text):
            return type(teacher).__name__
    return repr(text if len(text) <= LONGEST else f"...{text[3 - LONGEST :]}")


def model_in(teacher: Any, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
    """The model in what torch and PEFT wrap around it, which says the same; None where `teacher` is a path or a hub id.

    Raises:
        GrowError: it is no model, its wrapper adds something, or it is in another dtype than `dtype`: nobody's model is
            cast but by its owner.
    """
    if isinstance(teacher, str | os.PathLike):
        return None
    model = teacher
    while not isinstance(model, PreTrainedModel):
        asked = f"a teacher that is a {type(model).__name__}"
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inside
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = _of_peft(asked, model)
        else:
            inside = isinstance(model, nn.Sequential) and len(model) and hasattr(model[0], "auto_model")
            where = "of a sentence-transformers pipeline st[0].auto_model" if inside else VALID
            split = "; of a model that is split over processes its folder" if isinstance(model, nn.Module) else ""
            raise GrowError(asked, "it is no PreTrainedModel", where + split)
    if dtype not in (None, model.dtype):
        wrong = f"it is in {model.dtype}, and a model of yours is not cast to {dtype}"
        valid = f"the model in {dtype} ({type(model).__name__}.to({dtype})), its folder or hub id, or no dtype"
        raise GrowError(f"the teacher {name_of(model)}", wrong, valid)
    return model


def _of_peft(asked: str, model: Any) -> Any:
    """The model into whose layers a PeftModel has put its adapters; GrowError where it does more than that."""
    from peft.tuners.tuners_utils import BaseTuner  # installed: the model is of it

    tuner = model.base_model
    if not isinstance(tuner, BaseTuner) or type(tuner).forward is not BaseTuner.forward:
        kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
        wrong = f"its {kind} works outside of the model's layers"
        raise GrowError(asked, wrong, "adapters inside the layers (such as LoRA), or a model without adapters")
    return model.get_base_model()


def load_teacher(teacher: Any, task: str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model, or the safetensors weights of a folder or hub id, never its code; GrowError where they do not load.

    Without a task, the class is what the config names, or a causal one where it names none.
    """
    model = model_in(teacher, dtype)
    if model is not None:
        return model
    asked = f"the teacher {name_of(teacher)}"
    if task is not None and task not in AUTO_CLASSES:
        raise GrowError(f"a teacher with task={short(task)}", "there is no such task", ", ".join(AUTO_CLASSES))
    source, folder = _located(teacher)
    base, method = _described(asked, folder)
    stored = tensors_in(asked, folder) if source == str(folder) and base is None else {}
    kind = "language" if task is None else task
    try:
        model_class = _model_class(base or source, task)
        options: dict[str, Any] = {**SAFE, "use_safetensors": True, "output_loading_info": True}
        loaded: Any = model_class.from_pretrained(
            source, dtype=dtype or "auto", ignore_mismatched_sizes=True, **options
        )
        model, report = loaded
        if dtype is not None:
            model.to(dtype=dtype)
    except Exception as error:  # whatever transformers, its optional libraries and the machine raise
        valid = "a folder or hub id with a config.json of a transformers architecture and safetensors weights"
        if method is None:
            raise GrowError(asked, f"it does not load as a {kind} model ({first_line(error)})", valid) from error
        wrong = f"it is quantised with {method}, and does not load here ({first_line(error)})"
        valid = "the dequantised model (load it where it loads, call model.dequantize(), save it), or what is missing"
        raise GrowError(asked, wrong, valid) from error
    if method is not None and getattr(model, "hf_quantizer", None) is None:
        wrong = f"it is quantised with {method}, which transformers does not know and leaves out"
        raise GrowError(asked, wrong, "the dequantised model (call model.dequantize() where it loads, and save it)")
    odd = {name for name, (_, of_file, _) in stored.items() if of_file not in FLOATS} if method is None else set()
    _check_all_used(asked, kind, model, report, odd)
    return model


def _located(teacher: str | os.PathLike[str]) -> tuple[str, Path]:
    """What transformers loads from, and the folder with its description, fetched for a hub id."""
    text = os.path.expanduser(os.fsdecode(teacher))
    try:
        folder = folder_of(text if isinstance(teacher, str) else Path(text), weights=False)
    except (OSError, ValueError) as error:
        if isinstance(error, GrowError):
            raise
        raise GrowError(f"the teacher {name_of(teacher)}", f"it cannot be read ({first_line(error)})", VALID) from error
    return (str(folder) if folder == Path(text) else text), folder


def _described(asked: str, folder: Path) -> tuple[str | None, str | None]:
    """The base model of an adapter, and what the weights are quantised with; GrowError where nothing is described."""
    if (folder / "config.json").is_file():
        quantised = read_json(asked, folder / "config.json").get("quantization_config")
        method = quantised.get("quant_method", "a method") if isinstance(quantised, dict) else quantised
        return None, short(method).strip("'") if quantised else None
    if not (folder / ADAPTER).is_file() or find_spec("peft") is None:
        check_config(asked, folder)  # which says what it is
    base = read_json(asked, folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise GrowError(asked, "it is a PEFT adapter that names no base model", "an adapter and its base, or a model")
    if list(folder.glob("adapter_model.*")) and not (folder / "adapter_model.safetensors").is_file():
        raise GrowError(asked, "the adapter's weights are pickled", "adapter_model.safetensors")
    return base, None


def _model_class(source: str, task: str | None) -> Any:
    if task is not None:
        return getattr(transformers, AUTO_CLASSES[task])
    names = AutoConfig.from_pretrained(source, **SAFE).architectures
    named = getattr(transformers, names[0], None) if isinstance(names, list) and names else None
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if known else transformers.AutoModelForCausalLM


def _check_all_used(asked: str, kind: str, model: PreTrainedModel, report: Any, odd: set[str]) -> None:
    """Raise GrowError where weights and config do not belong together."""
    if report["missing_keys"]:
        wrong = f"the checkpoint lacks {_some(report['missing_keys'])}"
        raise GrowError(asked, wrong, f"the checkpoint of a {kind} model, head included")
    if report["mismatched_keys"]:
        names = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        raise GrowError(
            asked, f"the weights do not fit the config in {_some(names)}", "weights and config of one model"
        )
    used = {name for name, _ in model.named_parameters()}
    layers = {re.sub(r"\d+", "N", name) for name in used}
    if more := [key for key in report["unexpected_keys"] if re.sub(r"\d+", "N", key) in layers]:
        raise GrowError(asked, f"the config has no place for {_some(more)}", "a config that counts all layers")
    if odd & used:
        raise GrowError(asked, f"{_some(odd & used)} are stored as no floating-point numbers", "weights in floats")


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names) if len(names) <= MOST else f"{', '.join(names[:MOST])} and {len(names) - MOST} more"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".:") if lines else ""
    if isinstance(error, ImportError | KeyError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 4 * LONGEST else f"{text[: 4 * LONGEST - 3]}..."


def tokenizer_at(folder: str) -> Any:
    """The tokenizer beside the teacher's weights, or None; raises GrowError where it is broken."""
    folder = os.path.expanduser(folder)
    if os.path.isdir(folder):
        if not any(os.path.isfile(os.path.join(folder, f"tokenizer{end}")) for end in (".json", "_config.json")):
            return None
    elif os.path.exists(folder) or os.path.isabs(folder) or not folder:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, **SAFE)
    except OSError:
        return None
    except Exception as error:  # the tokenizers library raises plain exceptions, and others what they miss
        wrong = f"its tokenizer cannot be read ({first_line(error)})"
        raise GrowError(f"the teacher {name_of(folder)}", wrong, "a tokenizer of transformers, or none") from error
