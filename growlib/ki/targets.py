"""What a teacher says about each position: one type, dense or sparse, for every loss and every kind of teacher.

Shapes: N positions, V tokens, K token ids per position, M draws.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.counter import uniforms
from growlib.ki.projection import Projection

TREATMENTS = {
    "bucket": "the rest of the vocabulary is one more token on both sides: a KL of K+1 outcomes, never negative",
    "sampled": "draws stand for the rest: unbiased, value and gradient",
    "renorm_teacher": "the teacher's K probabilities are scaled to sum to 1, the student keeps its full softmax",
    "none": "the K terms alone: no KL, it can be negative",
}
TILE = 8192  # token ids at once


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution P(τ) at N positions, over the token ids 0 ... vocab - 1.

    Attributes:
        logprobs: [N, V] (dense) or [N, K]: log-probabilities; of a draw, the log of its weight.
        vocab: how many token ids the distribution is over.
        ids: [N, K] token ids; None: dense. Distinct in a row, save for draws.
        draws: how many of the K entries, the last ones, are draws; the others are exact.
        tail: [N] log of the probability of all that is not among the exact ids; None where dense.
        entropy: [N] of the whole distribution, in nats; there with draws.
        treatment: how a loss reads what is not listed: a key of `TREATMENTS`; "dense" where all is.
        temperature: τ, at which the probabilities were taken.
    """

    logprobs: Tensor
    vocab: int
    ids: Tensor | None = None
    tail: Tensor | None = None
    entropy: Tensor | None = None
    treatment: str = "dense"
    temperature: float = 1.0
    draws: int = 0

    @classmethod
    def dense(cls, logits: Tensor, *, temperature: float = 1.0) -> "Targets":
        """The whole distribution softmax(logits / τ), from [N, V]."""
        check_temperature("Targets.dense", temperature)
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        return cls((logits / temperature).log_softmax(-1), logits.shape[-1], temperature=temperature)

    @classmethod
    def top_k(
        cls,
        source: Tensor | Projection,
        k: int,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
        tile: int = TILE,
    ) -> "Targets":
        """The K most probable tokens of each position, exactly, and the probability of the rest.

        Args:
            source: logits [N, V], or the hidden states and the head that would give them; those are read in
                tiles of N x `tile`.
            tail: how a loss reads the rest: "bucket", "renorm_teacher" or "none".

        Raises:
            GrowError: k is not in 1 ... V, `tail` is unknown, τ or `tile` is not positive.
        """
        check_temperature("Targets.top_k", temperature)
        _check_tail(tail, ("bucket", "renorm_teacher", "none"))
        head = _Head(source, k, 0)
        for ids, logits in _tiles(source, tile, temperature):
            head.take(ids, logits, None)
        logprobs = head.logits - head.normaliser
        tail_N = head.tail - head.normaliser[:, 0]
        return cls(logprobs, source.shape[1], head.ids, tail_N, None, tail, temperature)

    @classmethod
    def sample(
        cls,
        source: Tensor | Projection,
        k: int,
        samples: int,
        *,
        seed: int = 0,
        keys: Tensor | None = None,
        temperature: float = 1.0,
        tile: int = TILE,
    ) -> "Targets":
        """The K most probable tokens exactly, and M draws with replacement from the rest, each of weight tail / M.

        The expectation of the weights is the teacher's distribution, so the KL's value and gradient are
        unbiased (Sparse Logit Sampling, arXiv 2503.16870, with an exact head). A draw depends on `seed` and
        its position's key alone, not on the batch.

        Args:
            source: as in `top_k`.
            k: 0 or more exact tokens.
            samples: M, at least 1.
            keys: [N] int64; None numbers the rows.

        Raises:
            GrowError: k is not in 0 ... V, samples or `tile` is below 1, τ is not positive, or there is not one key per
                position.
        """
        check_temperature("Targets.sample", temperature)
        if samples < 1:
            raise GrowError(f"Targets.sample(samples={samples})", "nothing is drawn", "at least 1, or Targets.top_k")
        head = _Head(source, k, samples)
        if keys is None:
            keys = torch.arange(source.shape[0], device=head.tail.device)
        if keys.shape != (source.shape[0],) or keys.dtype != torch.int64:
            asked = f"Targets.sample(keys={keys.dtype} {list(keys.shape)})"
            raise GrowError(asked, "each position is drawn by its key", f"int64 [{source.shape[0]}]")
        for number, (ids, logits) in enumerate(_tiles(source, tile, temperature)):
            head.take(ids, logits, uniforms(seed, keys, number, 4 * samples))
        log_z = head.normaliser
        tail = head.tail - log_z[:, 0]
        weights = (tail - math.log(samples))[:, None].expand(-1, samples)
        return cls(
            torch.cat([head.logits - log_z, weights], 1),
            source.shape[1],
            torch.cat([head.ids, head.draws], 1),
            tail,
            head.entropy,
            "sampled",
            temperature,
            samples,
        )

    def __len__(self) -> int:
        return self.logprobs.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Targets":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Targets":
        """On another device, the probabilities in another dtype."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return moved if dtype is None else moved._each(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def detach(self) -> "Targets":
        """Without a graph."""
        return self._each(torch.Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        return replace(
            self,
            logprobs=change(self.logprobs),
            ids=None if self.ids is None else change(self.ids),
            tail=None if self.tail is None else change(self.tail),
            entropy=None if self.entropy is None else change(self.entropy),
        )

    def treated(self, tail: str) -> "Targets":
        """The same K tokens with another reading of the rest.

        Raises:
            GrowError: `tail` is unknown, or what is here does not allow it.
        """
        if self.ids is None or tail == self.treatment:
            return self
        _check_tail(tail, tuple(TREATMENTS))
        if "sampled" in (tail, self.treatment):
            raise GrowError(
                f"reading {self.treatment} targets with tail={tail!r}",
                "draws are there or not from the start",
                f"tail={self.treatment!r}, or targets made for {tail!r}",
            )
        return replace(self, treatment=tail)

    def at(self, temperature: float) -> "Targets":
        """The targets at another τ.

        Raises:
            GrowError: they are sparse: K log-probabilities at one τ do not say what the rest of the vocabulary
                weighs at another (a top-128 that holds 97 % at τ = 1 may hold 3 % at τ = 4).
        """
        check_temperature("targets", temperature)
        if temperature == self.temperature:
            return self
        if self.ids is not None:
            raise GrowError(
                f"temperature={temperature} with sparse targets that were taken at {self.temperature}",
                "their log-probabilities do not say what the tokens that are not listed weigh at another temperature",
                f"temperature={self.temperature}, targets taken at {temperature}, or dense ones",
            )
        scaled = self.logprobs * (self.temperature / temperature)
        return replace(self, logprobs=scaled.log_softmax(-1), temperature=temperature)

    def over(self, vocab: int) -> "Targets":
        """The targets over no more than the first `vocab` token ids, renormalised there.

        Raises:
            GrowError: they are sparse and over more.
        """
        if self.vocab <= vocab:
            return self
        if self.ids is not None:
            raise GrowError(
                f"sparse targets over {self.vocab} token ids for a student with {vocab}",
                "what they say about the student's ids alone is not known",
                "targets taken over the common ids",
            )
        return replace(self, logprobs=self.logprobs[:, :vocab].log_softmax(-1), vocab=vocab)

    def label_logprobs(self, labels: Tensor) -> Tensor:
        """log P(label), [N], from labels [N]; -inf where the targets do not say."""
        if self.ids is None:
            found = self.logprobs.gather(1, labels.clamp(0, self.vocab - 1)[:, None])[:, 0]
            return found.masked_fill((labels < 0) | (labels >= self.vocab), -torch.inf)
        listed, exact = (x[:, : x.shape[1] - self.draws] for x in (self.logprobs, self.ids))
        return listed.masked_fill(exact != labels[:, None], -torch.inf).logsumexp(1)


def mixture(parts: Sequence[Targets], weights: Sequence[float]) -> Targets:
    """Several teachers at the same positions as one: Σ wᵢ Pᵢ.

    Of sampled targets the entropy becomes Σ wᵢ Hᵢ, so that the loss's value is Σ wᵢ KL(Pᵢ ‖ student): a
    constant above KL(Σ wᵢ Pᵢ ‖ student), with the same gradient.

    Raises:
        GrowError: the parts are neither all dense nor all sampled, or differ in vocabulary or temperature; or the
            weights are not one positive number each, summing to 1.
    """
    if len(weights) != len(parts) or not parts or min(weights) <= 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        asked = f"averaging {len(parts)} teachers with weights {list(weights)}"
        raise GrowError(asked, "that is no average", "one positive weight for each of one or more, summing to 1")
    kinds = {(part.treatment, part.vocab, part.temperature) for part in parts}
    if len(kinds) != 1 or parts[0].treatment not in {"dense", "sampled"}:
        raise GrowError(
            "averaging teachers",
            "their targets are " + ", ".join(f"{t} over {v} ids at temperature {tau}" for t, v, tau in sorted(kinds)),
            "all dense or all sampled, over the same vocabulary at the same temperature",
        )
    shifts = [math.log(weight) for weight in weights]
    if parts[0].ids is None:
        shifted = torch.stack([part.logprobs + shift for part, shift in zip(parts, shifts, strict=True)])
        return replace(parts[0], logprobs=shifted.logsumexp(0))
    pairs = list(zip(parts, shifts, strict=True))
    columns = [_columns(part, shift, drawn) for drawn in (False, True) for part, shift in pairs]
    tails, entropies = [], []
    for part, shift in pairs:
        assert part.tail is not None
        assert part.entropy is not None
        tails.append(part.tail + shift)
        entropies.append(part.entropy * math.exp(shift))
    return replace(
        parts[0],
        logprobs=torch.cat([logprobs for logprobs, _ in columns], 1),
        ids=torch.cat([ids for _, ids in columns], 1),
        tail=torch.stack(tails).logsumexp(0),
        entropy=torch.stack(entropies).sum(0),
        draws=sum(part.draws for part in parts),
    )


@dataclass(frozen=True)
class Blend:
    """Several teachers at the same positions, mixed part by part: Σ weightᵢ Pᵢ, see `mixture`."""

    parts: tuple["Source", ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, the vocabulary of all)."""
        first = self.parts[0]
        return (len(first), first.vocab) if isinstance(first, Targets) else (first.shape[0], first.shape[1])


Source = Tensor | Targets | Projection | Blend  # a tensor: logits


def rows_of(source: Source, rows: slice, temperature: float, device: torch.device) -> Targets:
    """Targets at τ of some positions, whatever they come from and on whatever device that is."""
    if isinstance(source, Blend):
        return mixture([rows_of(part, rows, temperature, device) for part in source.parts], source.weights)
    if isinstance(source, Targets):
        return source[rows].to(device).at(temperature)
    logits = source[rows] if isinstance(source, Tensor) else source.rows(rows).logits()
    return Targets.dense(logits, temperature=temperature).to(device)


def _columns(part: Targets, shift: float, drawn: bool) -> tuple[Tensor, Tensor]:
    """The exact entries or the draws, their log-weights shifted."""
    assert part.ids is not None
    exact = part.ids.shape[1] - part.draws
    columns = slice(exact, None) if drawn else slice(exact)
    return part.logprobs[:, columns] + shift, part.ids[:, columns]


def check_temperature(asked: str, temperature: float) -> None:
    """Raise GrowError where τ is not positive."""
    if not 0 < temperature < math.inf:
        raise GrowError(f"{asked} at temperature={temperature}", "it is not positive", "such as 1.0")


def _check_tail(tail: str, valid: Sequence[str]) -> None:
    if tail not in valid:
        raise GrowError(f"tail={tail!r}", "there is no such treatment here", ", ".join(valid))


@torch.no_grad()
def _tiles(source: Tensor | Projection, tile: int, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [w], logits / τ [N, w]) over the vocabulary."""
    if tile < 1:
        raise GrowError(f"tile={tile}", "that is no number of token ids", "1 or more")
    if isinstance(source, Projection):
        source = source.gathered()
    vocab = source.shape[1]
    for start in range(0, vocab, tile):
        stop = min(start + tile, vocab)
        part = source[:, start:stop] if isinstance(source, Tensor) else source.tokens(start, stop).logits()
        part = part.detach().to(torch.promote_types(part.dtype, torch.float32))
        yield torch.arange(start, stop, device=part.device), part if temperature == 1.0 else part / temperature


class _Head:
    """A running top-K over tiles of logits; what leaves it, or never enters, is the tail, which is drawn from.

    Attributes:
        logits, ids: [N, K], the largest so far; fewer columns while fewer ids were seen, so that all are distinct.
        tail: [N], log Σ exp of all others.
        tail_mean: [N], the mean logit under the softmax of the tail; there with draws.
        draws: [N, M], ids drawn from the tail in proportion to its probabilities.
    """

    def __init__(self, source: Tensor | Projection, k: int, samples: int) -> None:
        if len(source.shape) != 2:
            raise GrowError(f"targets of logits {tuple(source.shape)}", "positions are one dimension", "[N, V]")
        positions, vocab = source.shape
        if not (k >= 1 or (samples and k == 0)) or k > vocab:
            raise GrowError(f"the {k} most probable tokens of {vocab}", "there are not so many", f"1 to {vocab}")
        self.k = k
        like = source if isinstance(source, Tensor) else source.hidden
        floating = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.logits = torch.empty((positions, 0), **floating)  # type: ignore[call-overload]
        self.ids = torch.empty((positions, 0), dtype=torch.int64, device=like.device)
        self.tail = torch.full((positions,), -torch.inf, **floating)  # type: ignore[call-overload]
        self.tail_mean = torch.zeros((positions,), **floating)  # type: ignore[call-overload]
        self.draws = torch.zeros((positions, samples), dtype=torch.int64, device=like.device)

    @property
    def normaliser(self) -> Tensor:
        """log Σ exp of everything so far, [N, 1]."""
        return torch.logaddexp(self.tail, self.logits.logsumexp(1))[:, None]

    @property
    def entropy(self) -> Tensor:
        """Of the distribution over everything so far, [N], nats."""
        log_z = self.normaliser
        head = product((self.logits - log_z).exp(), self.logits).sum(1)
        return log_z[:, 0] - head - (self.tail - log_z[:, 0]).exp() * self.tail_mean

    @torch.no_grad()
    def take(self, ids: Tensor, logits: Tensor, random: Tensor | None) -> None:
        """Add a tile: ids [w], logits [N, w]; `random` [N, 4 M] uniforms where draws are wanted."""
        best, place = logits.topk(min(self.k, len(ids)), dim=1)
        candidates, candidate_ids = torch.cat([self.logits, best], 1), torch.cat([self.ids, ids[place]], 1)
        self.logits, chosen = candidates.topk(min(self.k, candidates.shape[1]), dim=1)
        self.ids = candidate_ids.gather(1, chosen)
        never, left = (None, None) if random is None else random.chunk(2, dim=1)
        self._into_tail(ids.expand(len(logits), -1), logits.scatter(1, place, -torch.inf), never)
        self._into_tail(candidate_ids, candidates.scatter_(1, chosen, -torch.inf), left)

    def _into_tail(self, ids: Tensor, logits: Tensor, random: Tensor | None) -> None:
        """Add ids [N, w] with logits [N, w], of which those at -inf are not there; `random` [N, 2 M]."""
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
        found = torch.searchsorted(cumulated, place * cumulated[:, -1:], right=True).clamp_(max=ids.shape[1] - 1)
        self.draws = torch.where(replaced < share[:, None], ids.gather(1, found), self.draws)


def product(weight: Tensor, log: Tensor) -> Tensor:
    """weight · log, 0 where the weight is 0 and the log infinite."""
    return weight * log.masked_fill(weight == 0, 0.0)
