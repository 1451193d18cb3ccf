"""A position's targets as bytes of a fixed width, and back.

    top_k    uint32 each      token id in the high bits, the log-probability in those that are left (14 at 2^18 ids)
    samples  uint16 each      low bits of a draw's id
             uint8 each       its high bits, where the vocabulary has more than 2^16 ids
    tail     float16          log-probability of all but the top K
    entropy  float16          where there are draws

Shapes: N positions, R bytes of a record.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from growlib.errors import GrowError
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits, Targets

LOWEST = -24.0  # nats; a listed token's log-probability is stored in even steps from here to 0
MAX_ID_BITS = 22  # 10 bits are left for the log-probability then: steps of 0.023


@dataclass(frozen=True)
class RecordFormat:
    """What the record of a position holds.

    Attributes:
        vocab: how many token ids the teacher's distribution is over.
        top_k: exact tokens per position.
        samples: draws per position.
        temperature: τ of the stored probabilities.
    """

    vocab: int
    top_k: int
    samples: int
    temperature: float

    def __post_init__(self) -> None:
        asked = f"a cache of top_k={self.top_k}, samples={self.samples}, temperature={self.temperature}"
        if not (0 <= self.top_k <= self.vocab and self.samples >= 0 and self.top_k + self.samples > 0):
            raise GrowError(asked, f"the vocabulary has {self.vocab} ids", f"top_k in 0 to {self.vocab}, or draws")
        if not 0 < self.temperature < math.inf:
            raise GrowError(asked, "the temperature is not positive", "such as 1.0")
        if self.id_bits > MAX_ID_BITS:
            raise GrowError(asked, f"the vocabulary has {self.vocab} ids", f"at most {1 << MAX_ID_BITS} ids")

    @property
    def id_bits(self) -> int:
        return max((self.vocab - 1).bit_length(), 1)

    @property
    def steps(self) -> int:
        """How many values a stored log-probability can have, less one."""
        return (1 << 32 - self.id_bits) - 1

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Bytes of each part, in the order of the record."""
        high = self.samples if self.id_bits > 16 else 0
        return 4 * self.top_k, 2 * self.samples, high, 2, 2 * bool(self.samples)

    @property
    def bytes_per_position(self) -> int:
        return sum(self.widths)

    def record(self, _: Logits | Projection, logits: Tensor, keys: Tensor, seed: int) -> tuple[np.ndarray, Tensor]:
        """Records [N, R] of the distributions of logits [N, V], and where these are no numbers, [N].

        `keys`, [N], and `seed` are those of `Targets.sample`.
        """
        if self.samples:
            keys = keys.to(logits.device)
            targets = Targets.sample(
                logits, self.top_k, self.samples, seed=seed, keys=keys, temperature=self.temperature
            )
        else:
            targets = Targets.top_k(logits, self.top_k, temperature=self.temperature)
        with np.errstate(invalid="ignore"):  # of NaN, which is refused
            return self.encode(targets), targets.no_numbers

    def encode(self, targets: Targets) -> np.ndarray:
        """Records, uint8 [N, R]."""
        assert targets.ids is not None
        assert targets.tail is not None
        ids = targets.ids.cpu().numpy()
        drawn = ids[:, self.top_k :]
        logprobs = targets.logprobs[:, : self.top_k].cpu().double().numpy()  # float32 rounds 2^25 - 1 up: another id
        level = np.rint(np.clip(logprobs / LOWEST, 0.0, 1.0) * self.steps).astype(np.uint32)
        exact = ids[:, : self.top_k].astype(np.uint32) << np.uint32(32 - self.id_bits) | level
        parts = [exact.astype("<u4"), drawn.astype("<u2")]
        if self.id_bits > 16:
            parts.append((drawn >> 16).astype("u1"))
        parts.append(_half(targets.tail)[:, None])
        if self.samples:
            assert targets.entropy is not None
            parts.append(_half(targets.entropy)[:, None])
        raw = [
            np.frombuffer(part.tobytes(), np.uint8).reshape(len(ids), part.itemsize * part.shape[1]) for part in parts
        ]
        return np.concatenate(raw, 1)

    def decode(self, records: np.ndarray, asked: str = "reading a teacher's records") -> Targets:
        """Targets of N positions, from uint8 [N, R]; GrowError where no finite teacher says what they hold."""
        ends = np.cumsum(self.widths)
        raw = [np.ascontiguousarray(part) for part in np.split(records, ends[:-1], axis=1)]
        positions = len(records)
        ids = np.empty((positions, self.top_k + self.samples), np.int64)
        logprobs = np.empty((positions, self.top_k + self.samples), np.float32)
        tail = raw[3].view("<f2")[:, 0].astype(np.float32)
        exact = raw[0].view("<u4")
        np.right_shift(exact, np.uint32(32 - self.id_bits), out=ids[:, : self.top_k], casting="unsafe")
        np.multiply(exact & np.uint32(self.steps), LOWEST / self.steps, out=logprobs[:, : self.top_k], casting="unsafe")
        entropy = None
        if self.samples:
            ids[:, self.top_k :] = raw[1].view("<u2")
            if self.id_bits > 16:
                ids[:, self.top_k :] |= raw[2].astype(np.int64) << 16
            logprobs[:, self.top_k :] = tail[:, None] - np.float32(math.log(self.samples))
            entropy = torch.from_numpy(raw[4].view("<f2")[:, 0].astype(np.float32))
        self._check(asked, exact, ids[:, self.top_k :], [tail] if entropy is None else [tail, entropy.numpy()])
        kept = (torch.from_numpy(logprobs), self.vocab, torch.from_numpy(ids), torch.from_numpy(tail), entropy)
        return Targets(*kept, "sampled" if self.samples else "bucket", self.temperature, self.samples)

    def _check(self, asked: str, exact: np.ndarray, drawn: np.ndarray, numbers: list[np.ndarray]) -> None:
        """Raise GrowError for what no finite teacher says; -inf is the log of an empty tail."""
        most = [int(exact.max()) >> 32 - self.id_bits] if exact.size else []
        most += [int(drawn.max())] if drawn.size else []
        infinite = any(np.isnan(part).any() or (part == np.inf).any() for part in numbers)
        if infinite or max(most, default=0) >= self.vocab:
            wrong = "it holds probabilities that are no numbers, or token ids that the teacher has not"
            raise GrowError(asked, wrong, "a cache of a teacher whose logits are finite, written again")


def _half(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy().astype("<f2")
