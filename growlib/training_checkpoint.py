"""A checkpoint of the Hugging Face Trainer, grown with all that it holds, so that the training goes on from it."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.shards import bytes_in
from growlib.checkpoint.training_forms import Held, held_in
from growlib.config import Target
from growlib.costs import bytes_of
from growlib.errors import GrowError
from growlib.folders import folder_of
from growlib.growth import expand, settled
from growlib.growth_plan import GrowthPlan, Skeleton
from growlib.moments import Policy
from growlib.operators import Method
from growlib.optimizer_state import Groups, grown_by_name, grown_by_number
from growlib.streaming import LARGEST, write_folder, write_grown

OPTIMIZER = "optimizer.pt"
BESIDE = ("scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json", "rng_state*.pth")
OF_DEEPSPEED = ("global_step*", "zero_to_fp32.py", "zero/*")


def expand_training_checkpoint(
    src: str | Path,
    dst: str | Path,
    target_config: Target | GrowthPlan,
    method: str | Method = "lossless",
    *,
    moments: Policy = "dual",
    groups: Groups | None = None,
    config: PreTrainedConfig | str | Path | None = None,
    seed: int = 0,
    exact: bool | None = None,
    max_shard_size: int | str = LARGEST,
) -> GrowthPlan:
    """Grow a `checkpoint-N` folder of the Trainer: `trainer.train(resume_from_checkpoint=dst)` goes on at step N.

    The weights grow as in `expand_checkpoint`, the optimizer's moments with them. Schedule, random numbers and the
    Trainer's state stay as they are, so the data come in the same order and the learning rate goes on. The optimizer's
    state is in memory as a whole, of source and result; the weights are not.

    A folder of FSDP2 (SHARDED_STATE_DICT or FULL_STATE_DICT) stays one of the same form, for a Trainer with FSDP; its
    weights are written a second time, as safetensors, for `from_pretrained(dst)`. So does a folder of
    `torch.distributed.checkpoint` with a model's and an optimizer's state dict, and what else is in it stays. One
    process reads and writes them, without a process group. There weights and optimizer are in memory as a whole.

    Args:
        src: a folder that the Trainer wrote: in one process, under DDP, or with FSDP2.
        dst: a folder that does not exist, such as `out/checkpoint-500`.
        target_config, method, seed, exact, max_shard_size: as for `expand_checkpoint`.
        moments: what becomes of the optimizer's moments. "dual": they grow as gradients do, and what is free in the
            plan starts at zero. "keep-old-zero-new": old values as they are, zero on all others (SPARKLING, arXiv
            2602.02472, with `EntryRates(plan, new=Rewarm(start=N))`). "reset": none.
        groups: for an optimizer with parameter groups of its own: the names of the parameters in each of them, of a
            model. By default they are the Trainer's (with and without weight decay), all in one, or all matrices.
            FSDP's folders name the parameters of each group, so that it is needed there for a mixture alone.
        config: of the model that was trained, where the folder has no config.json (FSDP's SHARDED_STATE_DICT): a
            config, or the folder or hub id that the training began with. A plan knows it.

    Returns:
        The plan that was carried out.

    Raises:
        GrowError: as `expand_checkpoint`; for a folder that the Trainer did not write so, such as DeepSpeed's; for an
            optimizer other than Adam, AdamW (also fused), SGD, Muon and Adafactor; and where `groups` are not the
            optimizer's.
    """
    asked, folder = f"growing the training checkpoint {str(src)!r}", folder_of(src)
    if moments not in get_args(Policy):
        raise GrowError(f"moments={moments!r}", "there is no such policy", ", ".join(get_args(Policy)))
    _refuse_deepspeed(asked, folder)
    held = held_in(asked, folder)
    if held is None and not ((folder / OPTIMIZER).is_file() and (folder / "trainer_state.json").is_file()):
        valid = "a checkpoint-N folder of the Trainer, from one process, DDP or FSDP2"
        raise GrowError(asked, f"it has no {OPTIMIZER} or no trainer_state.json", valid)
    model_class, source = _described(asked, folder, held, config, target_config)
    growth = settled(model_class, source, target_config, method, seed, exact)
    if growth.mixture and moments != "reset":
        raise GrowError(asked, "no moments of experts are known", 'moments="reset"')
    big_class = checkpoint.class_like(model_class, growth.source.model_type, growth.config)
    with torch.device("meta"):
        small, big = model_class(growth.source), big_class(growth.config)
    if held:
        optimizer = grown_by_name(asked, held.optimizer, growth, small, big, groups, moments)
        model = checkpoint.filled_model(asked, model_class, source.config, held.weights)
        _write(src, dst, growth, model, optimizer, held, exact or False, bytes_in(max_shard_size))
        return growth
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    grown = grown_by_number(asked, state, growth, small, big, groups, moments)

    def finish(new: Path) -> str:
        torch.save(grown, new / OPTIMIZER)
        _copy_beside(folder, new)
        return ""

    return write_grown(folder, dst, growth, exact=exact or False, max_shard_size=max_shard_size, check=finish)


def _described(
    asked: str,
    folder: Path,
    held: Held | None,
    config: PreTrainedConfig | str | Path | None,
    target: Target | GrowthPlan,
) -> tuple[type[PreTrainedModel], Skeleton]:
    """Class and skeleton of the model that was trained."""
    if config is None and (held is None or (folder / "config.json").is_file()):
        return checkpoint.describe(folder)
    if config is None and isinstance(target, GrowthPlan):
        config = target.source
    if config is None:
        wrong = "it has no config.json: FSDP saves weights and optimizer alone"
        raise GrowError(asked, wrong, "config=, such as the folder that the training began with")
    return checkpoint.describe(config)


def _write(
    src: str | Path,
    dst: str | Path,
    growth: GrowthPlan,
    model: PreTrainedModel,
    optimizer: Mapping[str, Any],
    held: Held,
    exact: bool,
    largest: int,
) -> None:
    """The grown folder, in the form that the source has."""
    folder = folder_of(src)

    def write(new: Path) -> None:
        big = expand(model, growth, growth.method, seed=growth.seed, exact=exact)
        big.save_pretrained(new, max_shard_size=largest)
        held.write(new, big.state_dict(), optimizer)
        _copy_beside(folder, new)

    weights = bytes_of(growth, checkpoint.dtype_of(growth.dtype) or model.dtype)
    moments = sum(t.nbytes for one in optimizer["state"].values() for t in one.values() if isinstance(t, Tensor))
    write_folder(src, dst, growth, write, room=2 * weights + moments)


def _copy_beside(folder: Path, new: Path) -> None:
    """What does not depend on the model's size."""
    for file in _beside(folder):
        shutil.copyfile(file, new / file.name)


def _beside(folder: Path) -> Iterator[Path]:
    for pattern in BESIDE:
        yield from folder.glob(pattern)


def _refuse_deepspeed(asked: str, folder: Path) -> None:
    found = sorted(path.name for pattern in OF_DEEPSPEED for path in folder.glob(pattern))
    if found and not (folder / OPTIMIZER).is_file():
        wrong = (
            f"its optimizer is in DeepSpeed's format ({found[0]}): flat pieces, one for each process, "
            "which only DeepSpeed puts together"
        )
        valid = (
            "its weights alone: `python zero_to_fp32.py . whole --safe_serialization` in this folder, its config.json "
            "copied into whole, then `growlib expand whole`, and a training from there with a warm-up. DeepSpeed's "
            "universal checkpoint (ds_to_universal.py) serves another number of processes, not another model. To keep "
            "the moments, train with FSDP2 or DDP"
        )
        raise GrowError(asked, wrong, valid)
