"""Does a grown checkpoint hold what its plan says? Some tensors are made again, and compared bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import torch

from growlib.checkpoint.conversions import Stored, Unstreamable, stored_in
from growlib.errors import GrowError
from growlib.folders import folder_of
from growlib.growth_plan import FILE, GrowthPlan
from growlib.streaming import Grown


@dataclass(frozen=True)
class TensorCheck:
    """Which tensors were made again, and which of them are not what lies on disk; of how many there are."""

    looked_at: tuple[str, ...]
    different: tuple[str, ...]
    of: int

    @property
    def same(self) -> bool:
        return not self.different

    def __str__(self) -> str:
        many = f"{len(self.looked_at)} of {self.of} tensors made again"
        if self.same:
            return f"{many}: the same bit for bit"
        first = self.different[0]
        return f"{many}: {len(self.different)} differ (damaged, trained, or grown from another source), such as {first}"


def verify_tensors(small: str | Path, big: str | Path, tensors: int = 16, seed: int = 0) -> TensorCheck:
    """Make some tensors of a grown checkpoint again from its source and its plan, and compare them with the files.

    For checkpoints of any size: it takes the memory of a tensor, and no model runs. It says that the files are what
    `expand_checkpoint` writes; whether the growth preserves the function, the plan and `verify` say.

    Args:
        small: the source, a folder or a hub id.
        big: what `expand_checkpoint` or `growlib expand` made of it, with its growlib.json.
        tensors: how many, chosen at random; all where there are fewer.
        seed: of the choice.

    Raises:
        GrowError: there is no plan beside `big`, or one of the checkpoints cannot be read tensor by tensor.
    """
    asked = f"comparing tensors of {str(big)!r} with its plan"
    if tensors < 1:
        raise GrowError(asked, f"{tensors} of them is none", "1 or more")
    folder = folder_of(big)
    if not (folder / FILE).is_file():
        raise GrowError(
            asked, f"there is no {FILE} beside it", "a checkpoint that growlib has grown, or growlib.verify"
        )
    plan = GrowthPlan.load(folder)
    source, written = (_stored(asked, place) for place in (folder_of(small), folder))
    grown = Grown(plan, source, finite=False)
    names = sorted(set(grown) & set(written))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:tensors]
    chosen = sorted(names[i] for i in order.tolist())
    different = [name for name in chosen if not _same(asked, grown, written, name)]
    return TensorCheck(tuple(chosen), tuple(different), len(names))


def _stored(asked: str, folder: Path) -> Stored:
    try:
        return stored_in(asked, folder)
    except Unstreamable as reason:
        raise GrowError(asked, f"{folder}: {reason}", "growlib.verify, with the models in memory") from reason


def _same(asked: str, grown: Grown, written: Stored, name: str) -> bool:
    there = written[name]
    try:
        made = grown[name]
    except (KeyError, RuntimeError, ValueError) as error:
        wrong = f"the source has no fitting tensor for {name}"
        raise GrowError(asked, wrong, "the source that it was grown from") from error
    return made.shape == there.shape and torch.equal(_bits(made.to(there.dtype)), _bits(there))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
