"""Masked language modelling whose masks are known beforehand, so that a teacher's targets can be cached.

Shapes: L length.
"""

from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from growlib.errors import GrowError
from growlib.ki.counter import uniforms
from growlib.ki.tasks import IGNORE_INDEX


class MaskedExamples(Dataset):
    """A dataset of token ids with BERT's masking (arXiv 1810.04805, section 3.1), decided by (seed, epoch, example).

    Of the chosen positions 80 % become the mask token, 10 % a random one, 10 % stay. `KITrainer` calls `set_epoch`
    (accelerate does not, with several processes). Epoch e has the masks of epoch e mod `masks`, so a cache of
    `all_masks()` is enough for any number of epochs.

    Args:
        examples: a dataset with a length and an index; `input_ids` is read, other columns are kept.
        mask_token: id of the mask token.
        vocab: number of token ids that a random one is drawn from.
        masks: number of distinct masks of each example.
        seed: of the masks.
        share: of the positions that are chosen; at least one is.
        special: token ids that are never chosen.

    Raises:
        GrowError: a value is out of range.
    """

    def __init__(
        self,
        examples: Any,
        mask_token: int,
        vocab: int,
        *,
        masks: int = 10,
        seed: int = 0,
        share: float = 0.15,
        special: tuple[int, ...] = (),
    ) -> None:
        if masks < 1:
            raise GrowError(f"MaskedExamples(masks={masks})", "there are no masks", "at least 1")
        if not 0 < share < 1:
            raise GrowError(f"MaskedExamples(share={share})", "it is not between 0 and 1", "such as 0.15")
        self.examples, self.mask_token, self.vocab = examples, mask_token, vocab
        self.masks, self.seed, self.share, self.special = masks, seed, share, special
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with a loader's workers, which may persist

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def epoch(self) -> int:
        """The epoch whose masks are used."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch."""
        self._epoch.fill_(epoch)

    def all_masks(self) -> Dataset:
        """Every example under each of its masks, for `cache_teacher`."""
        return ConcatDataset([_OneEpoch(self, epoch) for epoch in range(self.masks)])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.masked(number, self.epoch)

    def masked(self, number: int, epoch: int) -> dict[str, Any]:
        """An example with the masks of an epoch: `input_ids` and `labels`, int64 [L]."""
        example = dict(self.examples[number])
        ids = torch.as_tensor(example["input_ids"]).long()
        place, kind, other = uniforms(self.seed, torch.tensor([number]), epoch % self.masks, 3 * len(ids))[0].chunk(3)
        open_to = ~torch.isin(ids, torch.tensor(self.special, dtype=torch.int64))
        chosen = (place < self.share) & open_to
        if open_to.any() and not chosen.any():
            chosen[place.masked_fill(~open_to, 2.0).argmin()] = True
        replaced = torch.where(kind < 0.8, self.mask_token, torch.where(kind < 0.9, (other * self.vocab).long(), ids))
        example["input_ids"] = torch.where(chosen, replaced, ids)
        example["labels"] = ids.masked_fill(~chosen, IGNORE_INDEX)
        return example


class _OneEpoch(Dataset):
    """The examples with the masks of one epoch."""

    def __init__(self, masked: MaskedExamples, epoch: int) -> None:
        self.whole, self.epoch = masked, epoch

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.whole.masked(number, self.epoch)
