"""The settings of teacher-guided training."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from growlib.errors import GrowError
from growlib.ki.schedules import SCHEDULES
from growlib.ki.targets import TREATMENTS

OneTeacher = PreTrainedModel | str | os.PathLike[str]


@dataclass(frozen=True)
class KIConfig:
    """Settings of Knowledge Inheritance (arXiv 2105.13880), checked at construction.

    Attributes:
        teacher: a model, a folder, or a hub id, of the student's tokenizer; or the folder of a cache that
            `growlib.cache_teacher` wrote, and no teacher is loaded. A model that is passed in is used as it is:
            frozen, put in eval mode, and moved to the training device. Several: a tuple, whose distributions are
            averaged, or a dict, domain -> teacher, each of which teaches the examples of its domain.
        schedule: how α falls: one of `growlib.ki.SCHEDULES`.
        stop_at: share of training (0 to 1) from which α is 0 and the teacher gone; the paper's α_T is 1 /
            stop_at. None, with `schedule="constant"` only: never. "auto": from the first evaluation in which the
            student's held-out loss is no higher than the teacher's; until then α falls as if `stop_at` were 1.
        temperature: τ of both softmaxes.
        alpha: α at the first step, which the schedule scales down.
        teacher_dtype: what the teacher is cast to, once; None keeps the checkpoint's.
        common_vocab: number of token ids, counted from 0, that mean the same to student and teacher. None:
            both vocabularies are equally large, or the two tokenizers prove that only their padding differs.
            The data must hold no id that the teacher's embedding lacks.
        weights: of the teachers of a tuple, summing to 1; None: equal ones.
        domain: the dataset's column that names each example's domain, with a dict of teachers.
        top_k: an online teacher's most probable tokens alone are taught; None: its whole distribution.
        tail: how the rest is treated: a key of `growlib.ki.TREATMENTS`; None: "bucket" for an online top-K, and for
            a cache what it was written for.
        gate: α counts as 0 at positions where the teacher gives the label no more probability than the student.

    Raises:
        GrowError: a value is out of range.
    """

    teacher: OneTeacher | tuple[OneTeacher, ...] | Mapping[Any, OneTeacher]
    schedule: str = "linear"
    stop_at: float | Literal["auto"] | None = 0.3
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
        several = isinstance(self.teacher, tuple | Mapping)
        teachers = self.teacher.values() if isinstance(self.teacher, Mapping) else self.teacher if several else ()
        for teacher in teachers if several else (self.teacher,):  # type: ignore[union-attr]
            if not isinstance(teacher, PreTrainedModel | str | os.PathLike):
                raise GrowError(
                    f"KIConfig(teacher={type(teacher).__name__} object)",
                    "this is not a model",
                    "a PreTrainedModel, a folder, or a hub id; a tuple or a dict of them",
                )
        self._require("teacher", not several or len(self.teacher) > 0, "at least one")  # type: ignore[arg-type]
        self._require("schedule", self.schedule in tuple(SCHEDULES), "one of " + ", ".join(SCHEDULES))
        if self.stop_at == "auto":
            pass
        elif self.stop_at is None:
            self._require("stop_at", self.schedule == "constant", "a share in (0, 1]; None with constant only")
        else:
            share = self.stop_at
            self._require("stop_at", _is_number(share) and 0 < share <= 1, 'a share in (0, 1], or "auto"')
        temperature, alpha = self.temperature, self.alpha
        self._require("temperature", _is_number(temperature) and 0 < temperature < float("inf"), "above 0")
        self._require("alpha", _is_number(alpha) and 0 <= alpha <= 1, "a weight in [0, 1]")
        dtype = self.teacher_dtype
        is_dtype = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        self._require("teacher_dtype", dtype is None or is_dtype, "a floating-point torch.dtype, or None")
        for name in ("common_vocab", "top_k"):
            count = getattr(self, name)
            is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
            self._require(name, count is None or is_count, "a positive count, or None")
        self._require("tail", self.tail in (None, *TREATMENTS), "one of " + ", ".join(TREATMENTS))
        self._require("gate", isinstance(self.gate, bool), "True or False")
        if self.top_k is not None:
            self._require("tail", self.tail != "sampled", "with an online top_k bucket, renorm_teacher or none")
            self._require("teacher", not isinstance(self.teacher, tuple), "with top_k one teacher, or one per domain")
        self._require(
            "domain",
            (self.domain is not None) == isinstance(self.teacher, Mapping),
            "a dataset column, with a dict of teachers and only then",
        )
        self._require(
            "weights",
            self.weights is None
            or (
                isinstance(self.teacher, tuple)
                and isinstance(self.weights, tuple)
                and len(self.weights) == len(self.teacher)
                and all(_is_number(weight) and weight > 0 for weight in self.weights)
                and math.isclose(sum(self.weights), 1.0, abs_tol=1e-6)
            ),
            "one positive weight per teacher of a tuple, summing to 1",
        )

    def _require(self, name: str, valid: bool, what_is_valid: str) -> None:
        if not valid:
            raise GrowError(f"KIConfig({name}={getattr(self, name)!r})", "the value is not usable", what_is_valid)

    def alpha_at(self, progress: float) -> float:
        """α when the share `progress` of training (0 to 1) is done; with "auto", while the teacher is heard."""
        return self.alpha * SCHEDULES[self.schedule](progress, 1.0 if self.stop_at == "auto" else self.stop_at)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
