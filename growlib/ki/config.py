"""The settings of teacher-guided training."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from growlib.errors import GrowError
from growlib.ki.predictions import are_weights
from growlib.ki.schedules import Schedule, schedule_of
from growlib.ki.sources import model_in, short
from growlib.ki.treatments import TREATMENTS, WITHOUT_DRAWS

OneTeacher = nn.Module | str | os.PathLike[str]  # a PreTrainedModel, perhaps in a wrapper


@dataclass(frozen=True)
class KIConfig:
    """Settings of Knowledge Inheritance (arXiv 2105.13880), checked at construction.

    Attributes:
        teacher: a model, a folder, or a hub id, of the student's tokenizer; or the folder of a cache that
            `growlib.cache_teacher` wrote, and no teacher is loaded. A model that is passed in is borrowed: while it
            teaches, it is frozen, in eval mode and on the training device; after its last step, or the training's, it
            is what and where it was. It may be in a wrapper of torch (compiled, DataParallel) or PEFT (LoRA). Several:
            a tuple, whose distributions are averaged, or a dict, domain -> teacher, each of which teaches the examples
            of its domain.
        schedule: how α falls: a key of `growlib.ki.SCHEDULES`, a function of your own, or a `growlib.ki.Schedule`,
            which also says how it ends. Your function gets the progress, the share of training that is done (0 at the
            first step, below 1 at the last), and returns the factor of `alpha` there, a number in [0, 1].
        stop_at: share of training (0 to 1) from which α is 0 and the teacher gone; the paper's α_T is 1 / stop_at.
            Not given: 1 for "linear" and "cosine", 0.3 for "heaviside", None for "constant" and a function of your own.
            None: α is 0 only where the schedule returns 0; "constant" and functions of your own allow it. "auto": from
            the first evaluation in which the student's held-out loss is no higher than the teacher's (by more than
            0.001 nats); until then `stop_at` counts as 1.
        temperature: τ of both softmaxes.
        alpha: what the schedule is multiplied with: α at the first step, where it starts at 1.
        teacher_dtype: what a teacher is loaded in; None: the checkpoint's. A model that is passed in is never cast.
        common_vocab: number of token ids, counted from 0, that mean the same to student and teacher. None:
            both vocabularies are equally large, or the two tokenizers prove that only their padding differs.
            The data must hold no id that the teacher's embedding lacks.
        weights: of the teachers of a tuple, summing to 1; None: equal ones.
        domain: the dataset's column that names each example's domain, with a dict of teachers.
        top_k: number of most probable tokens that an online teacher teaches; None: its whole distribution.
        tail: how the tail, all other tokens, is treated: a key of `growlib.ki.TREATMENTS`; None: "bucket" for an online
            top-K, and for a cache what it was written for.
        gate: α is 0 at positions where the teacher gives the label no more probability than the student.

    Raises:
        GrowError: a value is out of range.
    """

    teacher: OneTeacher | tuple[OneTeacher, ...] | Mapping[Any, OneTeacher]
    schedule: str | Callable[[float], float] | Schedule = "linear"
    stop_at: float | Literal["auto", "default"] | None = "default"
    temperature: float = 1.0
    alpha: float = 1.0
    teacher_dtype: torch.dtype | None = None
    common_vocab: int | None = None
    weights: tuple[float, ...] | None = None
    domain: str | None = None
    top_k: int | None = None
    tail: str | None = None
    gate: bool = False

    def __post_init__(self) -> None:
        mapped = isinstance(self.teacher, Mapping)
        dtype = self.teacher_dtype
        is_dtype = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        self._require("teacher_dtype", dtype is None or is_dtype, "a floating-point torch.dtype, or None")
        self._require("teacher", len(self.teachers) > 0, "at least one")
        for teacher in self.teachers:
            model_in(teacher, dtype)
        schedule = schedule_of(self.schedule)
        if self.stop_at == "default":
            object.__setattr__(self, "stop_at", schedule.stop_at)
        share: Any = self.stop_at
        usable = share == "auto" or (_is_number(share) and 0 < share <= 1)
        if share is not None or schedule.needs_stop_at:
            none = "this schedule needs an end" if schedule.needs_stop_at else "or None"
            self._require("stop_at", usable, f'a share in (0, 1], or "auto"; {none}')
        temperature, alpha = self.temperature, self.alpha
        self._require("temperature", _is_number(temperature) and 0 < temperature < float("inf"), "above 0")
        self._require("alpha", _is_number(alpha) and 0 <= alpha <= 1, "a weight in [0, 1]")
        for name in ("common_vocab", "top_k"):
            count = getattr(self, name)
            is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
            self._require(name, count is None or is_count, "a positive count, or None")
        self._require("tail", self.tail in (None, *TREATMENTS), "one of " + ", ".join(TREATMENTS))
        self._require("gate", isinstance(self.gate, bool), "True or False")
        if self.top_k is not None:
            self._require("tail", self.tail in (None, *WITHOUT_DRAWS), "with top_k one of " + ", ".join(WITHOUT_DRAWS))
            self._require("teacher", not isinstance(self.teacher, tuple), "with top_k one teacher, or one per domain")
        self._require("domain", (self.domain is not None) == mapped, "a dataset column, with a dict of teachers only")
        averaged = isinstance(self.teacher, tuple) and isinstance(self.weights, tuple)
        usable = self.weights is None or (averaged and are_weights(self.weights, len(self.teachers)))
        self._require("weights", usable, "one positive weight per teacher of a tuple, summing to 1")
        self.alpha_at(0.0)

    @property
    def teachers(self) -> tuple[OneTeacher, ...]:
        """All of them."""
        if isinstance(self.teacher, Mapping):
            return tuple(self.teacher.values())
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    def _require(self, name: str, valid: bool, what_is_valid: str) -> None:
        if not valid:
            raise GrowError(f"KIConfig({name}={short(getattr(self, name))})", "the value cannot be used", what_is_valid)

    def described(self) -> dict[str, Any]:
        """The settings as JSON takes them. A model, or a folder, is told by its name alone; a function by its repr."""
        return {field.name: _described(getattr(self, field.name)) for field in fields(self)}

    def alpha_at(self, progress: float) -> float:
        """α at a progress in [0, 1]; with "auto", as long as the teacher stays. GrowError as `Schedule`."""
        return self.alpha * schedule_of(self.schedule)(progress, 1.0 if isinstance(self.stop_at, str) else self.stop_at)


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _described(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_described(one) for one in value]
    if isinstance(value, str | os.PathLike):
        return Path(value).resolve().name if Path(value).is_dir() else str(value)
    return value if value is None or isinstance(value, bool | int | float) else short(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
