"""What a teacher says about each position, as losses read it: one type, dense or sparse.

Shapes: N positions, V tokens, K token ids per position, M draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.counter import uniforms
from growlib.ki.running_top_k import TILE, LogitSource, running_top_k
from growlib.ki.treatments import TREATMENTS, WITHOUT_DRAWS, KLTerms, check_treatment


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution P(τ) at N positions, over the token ids 0 ... vocab - 1.

    Attributes:
        logprobs: [N, V] (dense) or [N, K]: log-probabilities; of a draw, the log of its weight.
        vocab: how many token ids the distribution is over.
        ids: [N, K] token ids; None: dense. Distinct in a row, save for draws.
        draws: how many of the K tokens, the last ones, are draws; the others are exact.
        tail: [N], log of the probability of all tokens that are not among the exact ids; None where dense.
        entropy: [N] of the whole distribution, in nats; there with draws.
        treatment: how a loss reads the tail: a key of `TREATMENTS`; "dense" where there is none.
        temperature: τ, at which the probabilities were taken.

    Raises:
        GrowError: there is no such treatment, or what it reads is not there.
    """

    logprobs: Tensor
    vocab: int
    ids: Tensor | None = None
    tail: Tensor | None = None
    entropy: Tensor | None = None
    treatment: str = "dense"
    temperature: float = 1.0
    draws: int = 0

    def __post_init__(self) -> None:
        if self.ids is None:
            check_treatment(self.treatment, ("dense",))
            return
        check_treatment(self.treatment)
        missing = [name for name in TREATMENTS[self.treatment].needs if getattr(self, name) is None]
        if missing:
            asked = f"sparse targets with treatment={self.treatment!r}"
            raise GrowError(asked, f"they have no {' and no '.join(missing)}", "Targets.top_k or Targets.sample")

    @classmethod
    def dense(cls, logits: Tensor, *, temperature: float = 1.0) -> "Targets":
        """The whole distribution softmax(logits / τ), from [N, V]."""
        check_temperature("Targets.dense", temperature)
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        return cls((logits / temperature).log_softmax(-1), logits.shape[-1], temperature=temperature)

    @classmethod
    def top_k(
        cls,
        logits: Tensor | LogitSource,
        k: int,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
        tile: int = TILE,
    ) -> "Targets":
        """The K most probable tokens of each position, exactly, and the probability of the tail.

        Args:
            logits: [N, V], or a `Projection`, which is computed in tiles of N x `tile`.
            tail: how a loss reads the tail: a key of `TREATMENTS` that needs no draws.

        Raises:
            GrowError: k is not in 1 ... V, `tail` is unknown, τ or `tile` is not positive.
        """
        check_temperature("Targets.top_k", temperature)
        check_treatment(tail, WITHOUT_DRAWS)
        source = as_logits(logits)
        top = running_top_k(source, k, temperature, tile, 0, lambda _: None)
        log_z = top.normaliser
        return cls(top.logits - log_z, source.vocab, top.ids, top.tail - log_z[:, 0], None, tail, temperature)

    @classmethod
    def sample(
        cls,
        logits: Tensor | LogitSource,
        k: int,
        samples: int,
        *,
        seed: int = 0,
        keys: Tensor | None = None,
        temperature: float = 1.0,
        tile: int = TILE,
    ) -> "Targets":
        """The K most probable tokens exactly, and M draws with replacement from the tail, each of weight tail / M.

        The expectation of the weights is the teacher's distribution, so the KL's value and gradient are unbiased
        (Sparse Logit Sampling, arXiv 2503.16870, beside an exact top K). A draw depends on `seed` and its position's
        key alone, not on the batch.

        Args:
            logits, tile: as in `top_k`.
            k: 0 or more exact tokens.
            samples: M, at least 1.
            keys: [N] int64; None: the number of the row.

        Raises:
            GrowError: k is not in 0 ... V, samples or `tile` is below 1, τ is not positive, or there is not one key per
                position.
        """
        check_temperature("Targets.sample", temperature)
        if samples < 1:
            raise GrowError(f"Targets.sample(samples={samples})", "there are no draws", "at least 1, or Targets.top_k")
        source = as_logits(logits)
        keys_N = torch.arange(len(source), device=source.device) if keys is None else keys
        if keys_N.shape != (len(source),) or keys_N.dtype != torch.int64:
            asked = f"Targets.sample(keys={keys_N.dtype} {list(keys_N.shape)})"
            raise GrowError(asked, "each position needs a key", f"int64 [{len(source)}]")
        top = running_top_k(
            source, k, temperature, tile, samples, lambda number: uniforms(seed, keys_N, number, 4 * samples)
        )
        log_z = top.normaliser
        tail = top.tail - log_z[:, 0]
        weights = (tail - math.log(samples))[:, None].expand(-1, samples)
        logprobs, ids = torch.cat([top.logits - log_z, weights], 1), torch.cat([top.ids, top.draws], 1)
        return cls(logprobs, source.vocab, ids, tail, top.entropy, "sampled", temperature, samples)

    def __len__(self) -> int:
        return self.logprobs.shape[0]

    def rows(self, chosen: slice | Tensor) -> "Targets":
        """Some positions."""
        return self._each(lambda tensor: tensor[chosen])

    __getitem__ = rows

    def targets(self, temperature: float, device: torch.device) -> "Targets":
        """The same at τ on a device; raises GrowError as `at`."""
        return self.to(device).at(temperature)

    @property
    def no_numbers(self) -> Tensor:
        """[N], whether a position's probabilities are NaN, or infinite; -inf as the log of none is a number."""
        if self.ids is None:
            return self.logprobs[:, 0].isnan()  # log_softmax spreads a NaN or an inf over its whole row
        bad = self.logprobs.isnan().any(1)
        for part in (self.tail, self.entropy):
            if part is not None:
                bad = bad | part.isnan() | (part == torch.inf)
        return bad

    def without(self, left_out: Tensor) -> "Targets":
        """Some positions, [N], with other numbers, which mean nothing but are finite in any KL's gradient."""
        return replace(
            self,
            logprobs=self.logprobs.masked_fill(left_out[:, None], 0.0),
            tail=None if self.tail is None else self.tail.masked_fill(left_out, -torch.inf),
            entropy=None if self.entropy is None else self.entropy.masked_fill(left_out, 0.0),
        )

    @property
    def kl_terms(self) -> KLTerms:
        """The terms of a KL from sparse targets, by their treatment."""
        return TREATMENTS[self.treatment].terms(self.logprobs, self.tail, self.entropy)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Targets":
        """On another device, and the probabilities in another dtype."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return moved if dtype is None else moved._each(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        return replace(
            self,
            logprobs=change(self.logprobs),
            ids=None if self.ids is None else change(self.ids),
            tail=None if self.tail is None else change(self.tail),
            entropy=None if self.entropy is None else change(self.entropy),
        )

    def treated(self, tail: str) -> "Targets":
        """The same K tokens with another treatment of the tail.

        Raises:
            GrowError: `tail` is unknown, or only one of the two treatments needs draws.
        """
        if self.ids is None or tail == self.treatment:
            return self
        check_treatment(tail)
        if TREATMENTS[tail].drawn or TREATMENTS[self.treatment].drawn:
            asked, valid = f"reading {self.treatment} targets with tail={tail!r}", f"targets made for {tail!r}"
            raise GrowError(asked, "draws are made with the targets, or never", f"tail={self.treatment!r}, or {valid}")
        return replace(self, treatment=tail)

    def at(self, temperature: float) -> "Targets":
        """The targets at another τ.

        Raises:
            GrowError: they are sparse: K log-probabilities at one τ do not give the probability of the tail at another
                (a top-128 that holds 97 % at τ = 1 may hold 3 % at τ = 4).
        """
        check_temperature("targets", temperature)
        if temperature == self.temperature:
            return self
        if self.ids is not None:
            asked = f"temperature={temperature} with sparse targets that were taken at {self.temperature}"
            wrong = "their log-probabilities do not give the probability of unlisted tokens at another temperature"
            raise GrowError(asked, wrong, f"temperature={self.temperature}, targets at {temperature}, or dense ones")
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
            asked = f"sparse targets over {self.vocab} token ids for a student with {vocab}"
            wrong = "the probability of the student's ids alone is not known"
            raise GrowError(asked, wrong, "targets over the common ids")
        return replace(self, logprobs=self.logprobs[:, :vocab].log_softmax(-1), vocab=vocab)

    def label_logprobs(self, labels: Tensor) -> Tensor:
        """log P(label), [N], of labels [N]; -inf where it is not known."""
        if self.ids is None:
            logprobs = self.logprobs.gather(1, labels.clamp(0, self.vocab - 1)[:, None])[:, 0]
            return logprobs.masked_fill((labels < 0) | (labels >= self.vocab), -torch.inf)
        listed, exact = (x[:, : x.shape[1] - self.draws] for x in (self.logprobs, self.ids))
        return listed.masked_fill(exact != labels[:, None], -torch.inf).logsumexp(1)


def check_temperature(asked: str, temperature: float) -> None:
    """Raise GrowError where τ is not positive."""
    if not 0 < temperature < math.inf:
        raise GrowError(f"{asked} at temperature={temperature}", "it is not positive", "such as 1.0")


@dataclass(frozen=True)
class Logits:
    """Logits as they are, [N, V]: see `Predictions`."""

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def vocab(self) -> int:
        return self.tensor.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def rows(self, chosen: slice | Tensor) -> "Logits":
        return Logits(self.tensor[chosen])

    def tokens(self, start: int, stop: int) -> "Logits":
        return Logits(self.tensor[:, start:stop])

    def logits(self) -> Tensor:
        return self.tensor

    def targets(self, temperature: float, device: torch.device) -> Targets:
        return Targets.dense(self.tensor, temperature=temperature).to(device)


def as_logits(logits: Tensor | LogitSource) -> LogitSource:
    """A tensor is wrapped; raises GrowError where it is not [N, V]."""
    if not isinstance(logits, Tensor):
        return logits
    if logits.ndim != 2:
        raise GrowError(f"targets of logits {tuple(logits.shape)}", "they do not have two dimensions", "[N, V]")
    return Logits(logits)
