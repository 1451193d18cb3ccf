"""The logits that a process has of each position: all, or those of its part of a vocabulary-parallel head.

Shapes: n positions, V tokens, v of them here, K tokens that are looked up.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


@dataclass(frozen=True)
class Columns:
    """Token ids `start` to before `stop` of `vocab`; the processes of `mesh` have all of them together.

    Where the vocabulary is split, each process calls the same methods in the same order, and all get the same answer.

    Attributes:
        mesh: of one dimension; None: this process has all.
    """

    vocab: int
    start: int
    stop: int
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, weight: DTensor) -> "Columns":
        """What this process has of a head [V, H] that `is_split`; DTensor cuts as `torch.chunk` does."""
        vocab, mesh = weight.shape[0], weight.device_mesh
        start = min(mesh.get_local_rank() * -(-vocab // mesh.size()), vocab)
        return cls(vocab, start, start + weight.to_local().shape[0], mesh)

    def first(self, logits: Tensor, count: int) -> Tensor:
        """Those of the token ids before `count`."""
        return logits[:, : max(count - self.start, 0)]

    def own(self, dense: Tensor) -> Tensor:
        """The columns here of what every process has as a whole, [n, V or fewer]."""
        return dense if self.mesh is None else dense[:, self.start : self.stop]

    def logsumexp(self, logits: Tensor) -> Tensor:
        """log Σ exp over all processes, [n]."""
        here = logits.logsumexp(1)
        if self.mesh is None:
            return here
        return DTensor.from_local(here[None], self.mesh, [Shard(0)]).full_tensor().logsumexp(0)

    def sum(self, here: Tensor) -> Tensor:
        """The sum over all processes."""
        return here if self.mesh is None else DTensor.from_local(here, self.mesh, [Partial()]).full_tensor()

    def at(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logits of token ids, [n, K], from the processes that have them."""
        if self.mesh is None:
            return logits.gather(1, ids)
        if not logits.shape[1]:
            return self.sum(logits.new_zeros(ids.shape))
        places, here = self._places(logits, ids)
        return self.sum(torch.where(here, logits.gather(1, places), 0))

    def exclude(self, logits: Tensor, ids: Tensor) -> Tensor:
        """-inf at token ids, in place."""
        if self.mesh is None:
            return logits.scatter_(1, ids, -torch.inf)
        if not logits.shape[1]:
            return logits
        places, here = self._places(logits, ids)
        lowest = torch.where(here, -torch.inf, torch.inf).to(logits.dtype)
        return logits.scatter_reduce_(1, places, lowest, "amin")

    def add(self, logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """Add values, [n, K], at token ids, in place."""
        if self.mesh is None:
            return logits.scatter_add_(1, ids, values)
        if not logits.shape[1]:
            return logits
        places, here = self._places(logits, ids)
        return logits.scatter_add_(1, places, torch.where(here, values, 0))

    def whole(self, here: Tensor, dim: int) -> Tensor:
        """What all processes have, joined at the dimension that is split; a gradient goes back to each part."""
        if self.mesh is None:
            return here
        shape = torch.Size((*here.shape[:dim], self.vocab, *here.shape[dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(here.contiguous(), self.mesh, [Shard(dim)], shape=shape, stride=stride).full_tensor()

    def _places(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of token ids, any column for those of other processes; and which are here."""
        places = ids - self.start
        here = (places >= 0) & (places < logits.shape[1])
        return places.clamp(0, logits.shape[1] - 1), here


def is_split(weight: Tensor) -> TypeGuard[DTensor]:
    """Whether a head is cut into rows over the processes of a mesh of one dimension: a vocabulary-parallel one is."""
    return isinstance(weight, DTensor) and weight.placements == (Shard(0),)


def replicated(hidden: Tensor, mesh: DeviceMesh) -> DTensor:
    """Hidden states that each process of a mesh has, so that their gradients are the sums over the processes."""
    return DTensor.from_local(hidden, mesh, [Replicate()])
