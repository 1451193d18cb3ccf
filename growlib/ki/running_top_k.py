"""The most probable tokens of each position and a summary of all others, from logits that are read part by part.

Shapes: N positions, V tokens, K tokens that are kept, M draws, w tokens of a tile.
"""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.treatments import product

TILE = 8192  # token ids at once


class LogitSource(Protocol):
    """Logits [N, V] that can be computed for some token ids."""

    @property
    def vocab(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def tokens(self, start: int, stop: int) -> Self: ...
    def logits(self) -> Tensor: ...


class RunningTopK:
    """The K largest logits so far. All others are the tail, from which the draws are taken.

    Attributes:
        logits, ids: [N, K], the largest so far; fewer columns while fewer ids were read, so that all are distinct.
        tail: [N], log Σ exp of all others.
        tail_mean: [N], the mean logit under the softmax of the tail; there with draws.
        draws: [N, M], ids drawn from the tail in proportion to its probabilities.
    """

    def __init__(self, like: Tensor, k: int, samples: int) -> None:
        self.k = k
        positions = len(like)
        self.logits = like.new_empty((positions, 0))
        self.ids = like.new_empty((positions, 0), dtype=torch.int64)
        self.tail = like.new_full((positions,), -torch.inf)
        self.tail_mean = like.new_zeros(positions)
        self.draws = like.new_zeros((positions, samples), dtype=torch.int64)

    @property
    def normaliser(self) -> Tensor:
        """log Σ exp of everything so far, [N, 1]."""
        return torch.logaddexp(self.tail, self.logits.logsumexp(1))[:, None]

    @property
    def entropy(self) -> Tensor:
        """Of the distribution over everything so far, [N], nats."""
        log_z = self.normaliser
        listed = product((self.logits - log_z).exp(), self.logits).sum(1)
        return log_z[:, 0] - listed - (self.tail - log_z[:, 0]).exp() * self.tail_mean

    def add(self, ids: Tensor, logits: Tensor, random: Tensor | None) -> None:
        """Add a tile: ids [w], logits [N, w]; `random` [N, 4 M] uniforms where draws are wanted."""
        best, place = logits.topk(min(self.k, len(ids)), dim=1)
        candidates, candidate_ids = torch.cat([self.logits, best], 1), torch.cat([self.ids, ids[place]], 1)
        self.logits, chosen = candidates.topk(min(self.k, candidates.shape[1]), dim=1)
        self.ids = candidate_ids.gather(1, chosen)
        never, left = (None, None) if random is None else random.chunk(2, dim=1)
        self._into_tail(ids.expand(len(logits), -1), logits.scatter(1, place, -torch.inf), never)
        self._into_tail(candidate_ids, candidates.scatter_(1, chosen, -torch.inf), left)

    def _into_tail(self, ids: Tensor, logits: Tensor, random: Tensor | None) -> None:
        """Add ids [N, w] with logits [N, w], where -inf means absent; `random` [N, 2 M]."""
        if logits.shape[1] == 0:
            return
        ceiling = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
        shifted = logits.sub_(ceiling)
        weights = shifted.exp()
        mass = ceiling[:, 0] + weights.sum(1).log()
        self.tail = torch.logaddexp(self.tail, mass)
        if random is None:
            return
        share = (mass - self.tail).exp().nan_to_num_(0.0)  # of these in the tail so far; NaN: it is empty
        mean = ceiling[:, 0] + torch.linalg.vecdot(weights, shifted.clamp_(min=-1e4)) / weights.sum(1).clamp(min=1.0)
        self.tail_mean += share * (mean - self.tail_mean)
        replaced, place = random.chunk(2, dim=1)
        cumulated = weights.cumsum(1, dtype=torch.float64)
        chosen = torch.searchsorted(cumulated, place * cumulated[:, -1:], right=True).clamp_(max=ids.shape[1] - 1)
        self.draws = torch.where(replaced < share[:, None], ids.gather(1, chosen), self.draws)


def running_top_k(
    source: LogitSource, k: int, temperature: float, tile: int, samples: int, uniforms: Callable[[int], Tensor | None]
) -> RunningTopK:
    """Read logits / τ tile by tile; raises GrowError where `k` or `tile` is out of range.

    `uniforms` gives for the number of a tile [N, 4 M] random numbers, or None.
    """
    if not (k >= 1 or (samples and k == 0)) or k > source.vocab:
        asked = f"the {k} most probable tokens of {source.vocab}"
        raise GrowError(asked, "k is out of range", f"1 to {source.vocab}")
    if tile < 1:
        raise GrowError(f"tile={tile}", "it is below 1", "1 or more")
    running = None
    with torch.no_grad():
        for number, start in enumerate(range(0, source.vocab, tile)):
            logits = source.tokens(start, min(start + tile, source.vocab)).logits().detach()
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            running = running or RunningTopK(logits, k, samples)
            ids = torch.arange(start, start + logits.shape[1], device=logits.device)
            running.add(ids, logits if temperature == 1.0 else logits / temperature, uniforms(number))
    assert running is not None
    return running
