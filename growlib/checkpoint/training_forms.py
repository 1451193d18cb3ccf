"""In which forms a training leaves weights and an optimizer's state, both by the names of the parameters.

    FULL_STATE_DICT     pytorch_model_fsdp.bin, optimizer.bin      FSDP, as accelerate writes it: two whole files
    SHARDED_STATE_DICT  pytorch_model_fsdp_0/, optimizer_0/        the same: two folders of torch.distributed.checkpoint
    of one's own        .metadata, __0_0.distcp, ...               one such folder: dcp.save({"model": .., "optim": ..})

Sources: accelerate/utils/fsdp_utils.py (save_fsdp_model, load_fsdp_model, and the same of optimizers), version 1.15;
torch.distributed.checkpoint.state_dict (get_state_dict), version 2.13.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growlib.checkpoint.distributed import read_tree, write_tree
from growlib.errors import GrowError
from growlib.folders import METADATA

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp", "optimizer"
OF_OPTIMIZER = {"state", "param_groups"}

State = Mapping[str, Any]  # of an optimizer: `state` by the names of parameters, `param_groups`
Write = Callable[[Path, Mapping[str, Tensor], State], None]


class Held(NamedTuple):
    """What a folder holds, and how the same is written again."""

    weights: Mapping[str, Tensor]
    optimizer: State
    write: Write


def held_in(asked: str, folder: Path) -> Held | None:
    """The weights and the optimizer's state of such a folder; None for a folder in no such form.

    Raises:
        GrowError: something in it is missing or broken, or its parts lie in files of which none says what it is.
    """
    if (folder / METADATA).is_file():
        return _of_ones_own(asked, folder)
    if (folder / f"{WEIGHTS}_0").is_dir():
        read = {name: read_tree(asked, _part(asked, folder, f"{name}_0")) for name in (WEIGHTS, OPTIMIZER)}
        return _checked(asked, read[WEIGHTS].get("model"), read[OPTIMIZER].get("optimizer"), _write_sharded)
    if (folder / f"{WEIGHTS}.bin").is_file():
        weights, optimizer = (_whole_file(asked, _part(asked, folder, f"{name}.bin")) for name in (WEIGHTS, OPTIMIZER))
        return _checked(asked, weights, optimizer, _write_full)
    if parts := sorted(file.name for file in folder.glob(f"{WEIGHTS}*_rank*.bin")):
        wrong = f"its parts are in files of the processes ({parts[0]}), which do not say what part each one is"
        raise GrowError(asked, wrong, "state_dict_type SHARDED_STATE_DICT (use_dcp) or FULL_STATE_DICT")
    return None


def _part(asked: str, folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise GrowError(asked, f"it has no {name}", "weights and optimizer, as the Trainer saves them with FSDP")
    return folder / name


def _whole_file(asked: str, file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        lines = str(error).strip().splitlines()
        wrong = f"{file.name} is no whole file of tensors ({lines[0] if lines else type(error).__name__})"
        raise GrowError(asked, wrong, "the file that accelerate wrote") from error


def _checked(asked: str, weights: Any, optimizer: Any, write: Write) -> Held:
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise GrowError(asked, "its weights are no tensors by their names", "a state dict of one model")
    if not _is_optimizer(optimizer):
        raise GrowError(asked, "it holds no state dict of one optimizer", "`state` by names, and `param_groups`")
    return Held(weights, {"state": {}, **optimizer}, write)  # no state is not stored


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and "param_groups" in state


def _write_sharded(folder: Path, weights: Mapping[str, Tensor], optimizer: State) -> None:
    write_tree(folder / f"{WEIGHTS}_0", {"model": weights})
    write_tree(folder / f"{OPTIMIZER}_0", {"optimizer": optimizer})


def _write_full(folder: Path, weights: Mapping[str, Tensor], optimizer: State) -> None:
    torch.save(dict(weights), folder / f"{WEIGHTS}.bin")
    torch.save(dict(optimizer), folder / f"{OPTIMIZER}.bin")


def _of_ones_own(asked: str, folder: Path) -> Held:
    """One folder with both, and with what else a script saved. That stays as it is."""
    tree = read_tree(asked, folder)
    levels = [tree, *(value for value in tree.values() if isinstance(value, dict))]  # {"app": {"model": .., ..}} too
    inner = next((level for level in levels if any(map(_is_optimizer, level.values()))), tree)
    parts = {name: value for name, value in inner.items() if isinstance(value, Mapping)}
    optimizers = [name for name, value in parts.items() if _is_optimizer(value)]
    models = [name for name, value in parts.items() if value and all(isinstance(v, Tensor) for v in value.values())]
    if len(optimizers) != 1 or len(models) != 1:
        wrong = f"it holds {len(models)} state dicts of models and {len(optimizers)} of optimizers ({', '.join(inner)})"
        valid = 'dcp.save({"model": .., "optim": ..}) of what get_state_dict returns, not flattened'
        raise GrowError(asked, wrong, valid)

    def write(new: Path, weights: Mapping[str, Tensor], optimizer: State) -> None:
        inner[models[0]], inner[optimizers[0]] = weights, optimizer
        write_tree(new, tree)

    return _checked(asked, inner[models[0]], inner[optimizers[0]], write)
