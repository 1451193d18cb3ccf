"""Who teaches a training step: an online teacher, a cache, the average of several, or one teacher per domain.

A `TeacherProvider` gives what is known at the positions of a batch that count, in parts whose losses add up.

Shapes: B batch, N positions of the batch that count, n of a part.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from growlib.errors import GrowError
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.config import KIConfig
from growlib.ki.guard import Finding, Guard
from growlib.ki.linear import teacher_ce
from growlib.ki.predictions import Mixture, Predictions
from growlib.ki.projection import Projection
from growlib.ki.sources import name_of
from growlib.ki.targets import Logits, Targets
from growlib.ki.tasks import Positions, outcomes, task_of
from growlib.ki.teacher import Teacher, in_own_dtype, resolve_teacher

DOMAIN = "ki_domain"  # of each row of a batch, the number of its teacher, int64 [B]
CHUNK = 1024  # positions of held-out logits at once


class Part(NamedTuple):
    """What one teacher says."""

    teacher: str  # its name in an error
    rows: Tensor | None  # [n], at which of the N positions; None: at all
    predictions: Predictions  # there
    teacher_ce: Tensor | None  # [2], its summed CE and over how many positions, where the predictions do not give it


class HeldOut(NamedTuple):
    """How a teacher's loss on held-out text is known."""

    vocab: int  # number of token ids that it predicts; other labels are left out
    ce: float | None  # the mean, where it is known beforehand
    ce_of: Callable[[dict[str, Any], Positions], Tensor] | None  # the sum over a batch, where it is not


class TeacherProvider(Protocol):
    """Gives the parts of a batch. `held_out` is None where the teacher's loss on held-out text cannot be known.

    `give_back` makes models that were passed in what they were; the next batch borrows them again.
    """

    @property
    def name(self) -> str: ...
    @property
    def held_out(self) -> HeldOut | None: ...
    def parts(self, batch: dict[str, Any], positions: Positions) -> list[Part]: ...
    def give_back(self) -> None: ...


class OnlineProvider:
    """A teacher that runs beside the student."""

    def __init__(self, teacher: Teacher, config: KIConfig) -> None:
        self.teacher, self.config, self.name = teacher, config, teacher.name

    def give_back(self) -> None:
        self.teacher.give_back()

    @property
    def held_out(self) -> HeldOut:  # stored, it would keep the teacher in memory after its last step
        return HeldOut(self.teacher.common_vocab, None, self._ce_of)

    def parts(self, batch: dict[str, Any], positions: Positions) -> list[Part]:
        predictions = self.teacher.predict(batch, positions)
        with in_own_dtype(self.teacher.model, positions.labels.device):
            return [Part(self.name, None, _most_probable(predictions, self.config), None)]

    @torch.no_grad()
    def _ce_of(self, batch: dict[str, Any], positions: Positions) -> Tensor:
        predictions, labels = self.teacher.predict(batch, positions), positions.labels
        total = labels.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            targets = predictions.rows(rows).targets(1.0, labels.device)
            listen(self.teacher.guard, self.name, targets.no_numbers.any())
            total = total + teacher_ce(targets, labels[rows])[0]
        return total


def _most_probable(whole: Logits | Projection, config: KIConfig) -> Predictions:
    """As many tokens of a whole distribution as the settings ask for, or all."""
    if config.top_k is None:
        return whole
    return Targets.top_k(whole, config.top_k, tail=config.tail or "bucket", temperature=config.temperature)


class CacheProvider:
    """What a teacher has left on disk: targets, or its hidden states and its head."""

    def __init__(self, cache: TeacherCache, config: KIConfig) -> None:
        self.cache, self.config, self.name = cache, config, name_of(cache.path)
        ce = cache.header.held_out_ce
        self.held_out = None if ce is None else HeldOut(cache.header.vocab, ce, None)

    def parts(self, batch: dict[str, Any], positions: Positions) -> list[Part]:
        said, ce_2 = self.cache.read(batch, positions, positions.labels.device)
        if isinstance(said, Targets):
            predictions: Predictions = said if self.config.tail is None else said.treated(self.config.tail)
        else:
            with torch.autocast(said.device.type, enabled=False):
                predictions = _most_probable(said, self.config)
        return [Part(self.name, None, predictions, ce_2)]

    def give_back(self) -> None:
        """Nothing was borrowed."""


class AverageProvider:
    """The average of several teachers' distributions."""

    held_out = None

    def __init__(self, providers: list[TeacherProvider], weights: tuple[float, ...]) -> None:
        self.providers, self.weights = providers, weights
        self.name = " or ".join(provider.name for provider in providers)

    def give_back(self) -> None:
        for provider in self.providers:
            provider.give_back()

    def parts(self, batch: dict[str, Any], positions: Positions) -> list[Part]:
        (every,) = zip(*(provider.parts(batch, positions) for provider in self.providers), strict=True)
        return [Part(self.name, None, Mixture(tuple(part.predictions for part in every), self.weights), None)]


class DomainProvider:
    """One teacher per domain, for the rows of its domain (arXiv 2105.13880, section 4.4)."""

    held_out = None

    def __init__(self, providers: Mapping[Any, TeacherProvider]) -> None:
        self.providers = providers
        self.name = " or ".join(provider.name for provider in providers.values())

    def give_back(self) -> None:
        for provider in self.providers.values():
            provider.give_back()

    def parts(self, batch: dict[str, Any], positions: Positions) -> list[Part]:
        labels, asked = positions.aligned, "KIConfig(domain=...)"
        if DOMAIN not in batch or len(batch[DOMAIN]) != len(labels):
            wrong = "the examples of this batch have no domain, or several are packed in one row"
            raise GrowError(asked, wrong, "the column in every training example, one example per row")
        domains = batch[DOMAIN]
        if (domains < 0).any():
            wrong = "an example of this batch is of a domain that has no teacher"
            raise GrowError(asked, wrong, ", ".join(map(repr, self.providers)))
        of_position = domains.view(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)[positions.mask]
        parts = []
        for number, provider in enumerate(self.providers.values()):
            rows = (domains == number).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            places = (of_position == number).nonzero()[:, 0]
            mine = {name: _rows(name, x, rows, len(domains)) for name, x in batch.items() if name != DOMAIN}
            parts += [part._replace(rows=places) for part in provider.parts(mine, positions.of_rows(rows))]
        return parts


def _rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    """Some rows of one value of a batch."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if name == "position_ids" and value.ndim == 3:  # of several axes, [A, B, L]
        return value[:, rows]
    if value.shape[0] != count:
        wrong = f"{name} of shape {list(value.shape)} cannot be divided among {count} examples"
        raise GrowError("KIConfig(domain=...)", wrong, "batches with one row per example in every tensor")
    return value[rows]


def listen(guard: Guard, teacher: str, no_numbers: Tensor) -> None:
    """Remember whether, a scalar, a teacher said something that is no number."""
    wrong = "what it says is no numbers (NaN or infinite), at one or more positions that count"
    valid = "a teacher whose weights are finite, in a dtype that does not overflow"
    guard.add(no_numbers, Finding(f"the teacher {teacher}", wrong, valid))


def load_provider(
    config: KIConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    guard: Guard,
) -> TeacherProvider:
    """Load what `config.teacher` names; raises GrowError where it cannot teach the student."""

    def one(teacher: Any) -> TeacherProvider:
        if is_cache(teacher):
            cache = TeacherCache(teacher)
            _check_cache(cache, config, student, tokenizer)
            return CacheProvider(cache, config)
        _check_tail(config, "an online teacher")
        online = resolve_teacher(config, teacher, student, tokenizer, device, guard)
        _check_top_k(config, online.common_vocab)
        return OnlineProvider(online, config)

    providers = [one(teacher) for teacher in config.teachers]
    if isinstance(config.teacher, Mapping):
        return DomainProvider(dict(zip(config.teacher, providers, strict=True)))
    if isinstance(config.teacher, tuple):
        return AverageProvider(providers, config.weights or (1 / len(providers),) * len(providers))
    return providers[0]


def _check_tail(config: KIConfig, teacher: str) -> None:
    """Raise GrowError where a whole distribution would be treated as one with a tail."""
    if config.tail is not None and config.top_k is None:
        asked, valid = f"KIConfig(tail={config.tail!r}) with {teacher}", "a cache of probabilities, or no tail"
        raise GrowError(asked, "its whole distribution has no tail", f"top_k beside it, or {valid}")


def _check_top_k(config: KIConfig, shared: int) -> None:
    """Raise GrowError where more tokens are asked for than there are."""
    if config.top_k is not None and config.top_k > shared:
        wrong = f"teacher and student share {shared} token ids"
        raise GrowError(f"KIConfig(top_k={config.top_k})", wrong, f"at most {shared}")


def _check_cache(cache: TeacherCache, config: KIConfig, student: PreTrainedModel, tokenizer: Any) -> None:
    """Raise GrowError where a cache cannot teach the student."""
    asked = f"KIConfig(teacher={str(cache.path)!r}, temperature={config.temperature})"
    header, vocab, task = cache.header, outcomes(student), task_of(student)
    if header.task != task:
        raise GrowError(asked, f"the cache is of a {header.task} model, the student {task}", f"a {task} one")
    if header.store == "probabilities" and header.temperature != config.temperature:
        wrong = f"it has the {header.top_k} most probable tokens at temperature {header.temperature} only"
        valid = f"temperature={header.temperature}, a cache at {config.temperature}, or one with store='hidden'"
        raise GrowError(asked, wrong, valid)
    cache.check_tokenizer(tokenizer)
    has_both = tokenizer is not None and header.tokenizer is not None
    padded = has_both and max(tokenizer.get_vocab().values()) < header.vocab
    shared = config.common_vocab or (header.vocab if padded else vocab)
    if header.vocab != shared or header.vocab > vocab:
        unproven = "which no tokenizer proves to be padding"
        wrong = f"the cache is over {header.vocab} token ids and the student has {vocab}, "
        wrong += unproven if config.common_vocab is None else f"common_vocab={shared}"
        same = f"where its ids mean the same to the student, common_vocab={header.vocab}"
        raise GrowError(asked, wrong, f"a cache written with vocab={min(shared, vocab)}, or, {same}")
    if header.store == "hidden":
        _check_tail(config, "a cache of hidden states")
        _check_top_k(config, header.vocab)
        return
    if config.top_k is not None:
        raise GrowError(asked, "top_k is for whole distributions; a cache of probabilities has its own", "no top_k")
    if config.gate and header.top_k == 0:
        wrong = "the gate needs the probability of the label, which draws do not give"
        raise GrowError(asked, wrong, "a cache with a top_k")


class WithDomain:
    """A collator that keeps each example's domain beside another collator's batch: the number of its teacher, or -1."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], column: str, domains: tuple[Any, ...]) -> None:
        self.collator, self.column, self.domains = collator, column, domains

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        named = [feature.get(self.column) for feature in features]
        rest = [{name: x for name, x in feature.items() if name != self.column} for feature in features]
        batch = self.collator(rest)
        if all(domain is None for domain in named):  # held-out examples need no domain
            return batch
        numbers = [self.domains.index(domain) if domain in self.domains else -1 for domain in named]
        batch[DOMAIN] = torch.tensor(numbers)  # an example without a teacher may be evaluated
        return batch
