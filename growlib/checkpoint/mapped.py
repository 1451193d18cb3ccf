"""A model that reads each layer from disk when it runs, and forgets it afterwards: for one look at a large model."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from growlib.checkpoint.conversions import Stored, Unstreamable, stored_in
from growlib.errors import GrowError
from growlib.folders import folder_of


def mapped_model(source: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A checkpoint as a model whose parameters are in memory only while their module runs.

    Args:
        dtype: of the parameters while their module runs; by default the stored one.

    Raises:
        GrowError: as `checkpoint.load`, and where only a whole model can be read.
    """
    asked = f"reading the checkpoint {str(source)!r} layer by layer"
    try:
        stored = stored_in(asked, folder_of(source))
    except Unstreamable as reason:
        raise GrowError(asked, str(reason), "the whole model in memory: no streaming") from reason
    like = stored.model
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = type(like)._from_config(like.config, dtype=dtype or like.dtype)
    buffers = dict(model.named_buffers())
    for name in stored:
        if name in buffers:
            buffers[name].data = stored[name].to(buffers[name].dtype)
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(path, recurse=False)]
        if names:
            _read_when_it_runs(module, names, stored, dtype)
    return model.eval()


def _read_when_it_runs(module: nn.Module, names: list[str], stored: Stored, dtype: torch.dtype | None) -> None:
    empty = {name: getattr(module, name.rpartition(".")[2]) for name in names}

    def read(module: nn.Module, arguments: Any) -> None:
        for name in names:
            values = stored[name]
            parameter = nn.Parameter(values.to(dtype or values.dtype), requires_grad=False)
            setattr(module, name.rpartition(".")[2], parameter)

    def forget(module: nn.Module, arguments: Any, output: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name.rpartition(".")[2], parameter)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget, always_call=True)
