"""Entries of one dimension, chosen by their numbers; and the means over those that are copies of each other."""

import numpy as np
import torch
from torch import Tensor

from growlib.layouts import along
from growlib.maps import copy_numbers

PIECES = 16  # up to which a choice is made of slices, which is several times as fast


class Choice:
    """`index_select` for one index and many tensors. The result may be a view, of which no two entries are one."""

    def __init__(self, index: np.ndarray) -> None:
        self._index = torch.from_numpy(np.ascontiguousarray(index))
        self._pieces = _pieces(index)

    def __call__(self, values: Tensor, dim: int) -> Tensor:
        if not self._pieces:
            return values.index_select(dim, self._index.to(values.device))
        slices = [
            values.narrow(dim, first, count)
            if rising
            else values.narrow(dim, first, 1).expand([count if d == dim else n for d, n in enumerate(values.shape)])
            for first, count, rising in self._pieces
        ]
        return slices[0] if self._pieces[0][2] and len(slices) == 1 else torch.cat(slices, dim)


def _pieces(index: np.ndarray) -> list[tuple[int, int, bool]]:
    """(first, count, whether it rises by ones or stays the same) of each piece; empty where there are too many."""
    steps, pieces, start = np.diff(index), [], 0
    ends = [np.append(np.flatnonzero(steps != step), len(steps)) + 1 for step in (0, 1)]
    while start < len(index):
        same, rising = (int(where[np.searchsorted(where, start, side="right")]) for where in ends)
        pieces.append((int(index[start]), max(same, rising) - start, rising >= same))
        start = max(same, rising)
        if len(pieces) > PIECES:
            return []
    return pieces


class Copies:
    """Which of some entries are copies of each other: those with the same `source`; -1 is a copy of none."""

    def __init__(self, source: np.ndarray) -> None:
        self._old = source >= 0
        self._counts = np.unique(source[self._old], return_counts=True)
        numbers, entries = copy_numbers(source), self._counts[0]
        self._rounds = []  # the first copy of each entry, the second one, ..
        for number in range(int(numbers.max(initial=0)) + 1):
            members = np.flatnonzero(self._old & (numbers == number))
            members = members[np.argsort(source[members])]
            self._rounds.append((Choice(members), np.searchsorted(entries, source[members])))
        self._place = Choice(np.searchsorted(entries, source.clip(entries.min(initial=0))))

    def centred(self, drawn: Tensor, dim: int) -> Tensor:
        """The values less their mean over the copies of an entry; those of new entries as they are."""
        entries, counts = self._counts
        if not len(entries):
            return drawn
        total = drawn.new_zeros([len(entries) if d == dim else length for d, length in enumerate(drawn.shape)])
        for members, rows in self._rounds:
            if len(rows) == rows[-1] - rows[0] + 1:
                total.narrow(dim, int(rows[0]), len(rows)).add_(members(drawn, dim))
            else:
                total.index_add_(dim, torch.from_numpy(rows).to(drawn.device), members(drawn, dim))
        mean = self._place(total.div_(along(torch.from_numpy(counts).to(drawn), dim, drawn)), dim)
        if self._old.all():
            return drawn.sub_(mean)
        return torch.where(along(torch.from_numpy(self._old), dim, drawn), drawn - mean, drawn)
