"""What guides a training step: an online teacher, a cache, several of them weighted, or one for each domain.

Each guide answers the same question, what is known at the counted positions of a batch, with parts whose losses add up.

Shapes: B batch, N counted positions of the batch, n of a part.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.config import KIConfig
from growlib.ki.heads import IGNORE_INDEX, Head, aligned_labels, outcomes
from growlib.ki.mixtures import Mixture
from growlib.ki.predictions import Predictions
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher, resolve_teacher

DOMAIN = "ki_domain"  # of each row of a batch, the number of its teacher, int64 [B]


class Part(NamedTuple):
    """What one teacher says.

    Attributes:
        rows: [n], which of the N positions; None: all.
        predictions: at these positions.
        teacher_ce: [2], the teacher's summed CE and over how many positions, where the predictions do not say.
    """

    rows: Tensor | None
    predictions: Predictions
    teacher_ce: Tensor | None


class Guide(Protocol):
    """Something to learn from."""

    def parts(self, batch: dict[str, Any]) -> list[Part]:
        """What is known at the positions of a batch whose label counts."""


class Online:
    """A teacher that runs beside the student."""

    def __init__(self, teacher: Teacher, config: KIConfig) -> None:
        self.teacher, self.config = teacher, config

    def parts(self, batch: dict[str, Any]) -> list[Part]:
        predictions, _ = self.teacher.at_labels(batch)
        if self.config.top_k is None:
            return [Part(None, predictions, None)]
        tail, temperature = self.config.tail or "bucket", self.config.temperature
        return [Part(None, Targets.top_k(predictions, self.config.top_k, tail=tail, temperature=temperature), None)]


class Cached:
    """Targets that a teacher has left on disk."""

    def __init__(self, cache: TeacherCache, config: KIConfig) -> None:
        self.cache, self.config = cache, config

    def parts(self, batch: dict[str, Any]) -> list[Part]:
        targets, known = self.cache.read(batch)
        if self.config.tail is not None:
            targets = targets.treated(self.config.tail)
        device = batch["input_ids"].device
        return [Part(None, targets.to(device), known.to(device))]


class Weighted:
    """The average of several teachers' distributions."""

    def __init__(self, guides: list[Guide], weights: tuple[float, ...]) -> None:
        self.guides, self.weights = guides, weights

    def parts(self, batch: dict[str, Any]) -> list[Part]:
        (every,) = zip(*(guide.parts(batch) for guide in self.guides), strict=True)
        return [Part(None, Mixture(tuple(part.predictions for part in every), self.weights), None)]


class ByDomain:
    """One teacher per domain: it teaches the rows of its domain (arXiv 2105.13880, section 4.4)."""

    def __init__(self, guides: list[Guide], head: Head, names: tuple[Any, ...]) -> None:
        self.guides, self.head, self.names = guides, head, names

    def parts(self, batch: dict[str, Any]) -> list[Part]:
        labels = aligned_labels(batch, self.head)
        if DOMAIN not in batch or len(batch[DOMAIN]) != len(labels):
            raise GrowError(
                "KIConfig(domain=...)",
                "the examples of this batch have no domain, or are packed into fewer rows",
                "the column in every training example, one example per row",
            )
        domains = batch[DOMAIN]
        if (domains < 0).any():
            wrong = "an example of this batch is of a domain that has no teacher"
            raise GrowError("KIConfig(domain=...)", wrong, ", ".join(map(repr, self.names)))
        of_position = domains.view(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)[labels != IGNORE_INDEX]
        parts = []
        for number, guide in enumerate(self.guides):
            rows = (domains == number).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            positions = (of_position == number).nonzero()[:, 0]
            mine = {name: _rows(name, x, rows, len(domains)) for name, x in batch.items() if name != DOMAIN}
            parts += [part._replace(rows=positions) for part in guide.parts(mine)]
        return parts


def _rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    """Some examples' part of a batch's entry."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if name == "position_ids" and value.ndim == 3:  # of several axes, [A, B, L]
        return value[:, rows]
    if value.shape[0] != count:
        wrong = f"{name} of shape {list(value.shape)} does not say which part belongs to which of {count} examples"
        raise GrowError("KIConfig(domain=...)", wrong, "batches with one row per example in every tensor")
    return value[rows]


def resolve_guide(
    config: KIConfig,
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase | None,
    head: Head,
    device: torch.device,
) -> Guide:
    """Load whatever `config.teacher` names, and check that it can teach the student.

    Raises:
        GrowError: as `resolve_teacher`; or a cache is of another tokenizer, temperature or kind of model.
    """

    def one(teacher: Any) -> Guide:
        if is_cache(teacher):
            return _cached(TeacherCache(teacher), config, student, student_tokenizer, head)
        if config.tail is not None and config.top_k is None:
            asked = f"KIConfig(tail={config.tail!r}) with an online teacher"
            raise GrowError(asked, "its whole distribution has no tail", "top_k beside it, or a cache, or no tail")
        online = Online(resolve_teacher(config, teacher, student, student_tokenizer, device), config)
        if config.top_k is not None and config.top_k > online.teacher.common_vocab:
            wrong = f"teacher and student share {online.teacher.common_vocab} token ids"
            raise GrowError(f"KIConfig(top_k={config.top_k})", wrong, "at most so many")
        return online

    if isinstance(config.teacher, Mapping):
        return ByDomain([one(teacher) for teacher in config.teacher.values()], head, tuple(config.teacher))
    if isinstance(config.teacher, tuple):
        guides = [one(teacher) for teacher in config.teacher]
        return Weighted(guides, config.weights or (1 / len(guides),) * len(guides))
    return one(config.teacher)


def _cached(cache: TeacherCache, config: KIConfig, student: PreTrainedModel, tokenizer: Any, head: Head) -> Cached:
    asked = f"KIConfig(teacher={str(cache.path)!r}, temperature={config.temperature})"
    header, vocab = cache.header, outcomes(student)
    if header.head != head:
        raise GrowError(asked, f"the cache is of a {header.head} model, the student {head}", f"a {head} one")
    if header.temperature != config.temperature:
        raise GrowError(
            asked,
            f"the cache holds probabilities at temperature {header.temperature}, and {header.top_k} of them do not say "
            "what the others weigh at another",
            f"temperature={header.temperature}, or a cache written at {config.temperature}",
        )
    cache.check_tokenizer(tokenizer)
    has_both = tokenizer is not None and header.tokenizer is not None
    padded = has_both and max(tokenizer.get_vocab().values()) < header.vocab
    shared = config.common_vocab or (header.vocab if padded else vocab)
    if header.vocab != shared or header.vocab > vocab:
        raise GrowError(
            asked,
            f"the cache is over {header.vocab} token ids and the student has {vocab}, "
            + ("which no tokenizer proves to be padding" if config.common_vocab is None else f"common_vocab={shared}"),
            f"a cache written with vocab={min(shared, vocab)}, or, where its ids mean the same to the student, "
            f"common_vocab={header.vocab}",
        )
    if config.top_k is not None:
        raise GrowError(asked, "top_k is of online teachers; the cache has its own", "no top_k")
    if config.gate and header.top_k == 0:
        raise GrowError(asked, "draws do not tell the gate how probable the label is", "a cache with a top_k")
    return Cached(cache, config)


class WithDomain:
    """A collator that carries each example's domain past any other collator, as the number of its teacher or -1."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], column: str, domains: tuple[Any, ...]) -> None:
        self.collator, self.column, self.domains = collator, column, domains

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        found = [feature.get(self.column) for feature in features]
        rest = [{name: x for name, x in feature.items() if name != self.column} for feature in features]
        batch = self.collator(rest)
        if all(domain is None for domain in found):  # held-out examples need none
            return batch
        numbers = [self.domains.index(domain) if domain in self.domains else -1 for domain in found]
        batch[DOMAIN] = torch.tensor(numbers)  # one without a teacher may be evaluated
        return batch
