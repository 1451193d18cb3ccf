"""The settings of teacher-guided training."""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from growlib.errors import GrowError
from growlib.ki.schedules import SCHEDULES


@dataclass(frozen=True)
class KIConfig:
    """Settings of Knowledge Inheritance (arXiv 2105.13880), checked at construction.

    Attributes:
        teacher: a model, a folder, or a hub id, of the student's tokenizer. A model that is passed in is used
            as it is: frozen, put in eval mode, and moved to the training device.
        schedule: how α falls: one of `growlib.ki.SCHEDULES`.
        stop_at: share of training (0 to 1) from which α is 0 and the teacher gone; the paper's α_T is 1 /
            stop_at. None, with `schedule="constant"` only: never.
        temperature: τ of both softmaxes.
        alpha: α at the first step, which the schedule scales down.
        teacher_dtype: what the teacher is cast to, once; None keeps the checkpoint's.
        common_vocab: number of token ids, counted from 0, that mean the same to student and teacher. None:
            both vocabularies are equally large, or the two tokenizers prove that only their padding differs.
            The data must hold no id that the teacher's embedding lacks.

    Raises:
        GrowError: a value is out of range.
    """

    teacher: PreTrainedModel | str | os.PathLike[str]
    schedule: str = "linear"
    stop_at: float | None = 0.3
    temperature: float = 1.0
    alpha: float = 1.0
    teacher_dtype: torch.dtype | None = None
    common_vocab: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, PreTrainedModel | str | os.PathLike):
            raise GrowError(
                f"KIConfig(teacher={type(self.teacher).__name__} object)",
                "this is not a language model",
                "a PreTrainedModel, a folder, or a hub id",
            )
        self._require("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        if self.stop_at is None:
            self._require(
                "stop_at", self.schedule == "constant", "a share in (0, 1]; None with constant only"
            )
        else:
            self._require("stop_at", 0 < self.stop_at <= 1, "a share of training in (0, 1]")
        self._require("temperature", 0 < self.temperature < float("inf"), "a positive number")
        self._require("alpha", 0 <= self.alpha <= 1, "a weight in [0, 1]")
        self._require(
            "teacher_dtype",
            self.teacher_dtype is None or self.teacher_dtype.is_floating_point,
            "a floating-point torch.dtype, or None",
        )
        self._require(
            "common_vocab", self.common_vocab is None or self.common_vocab > 0, "a positive count, or None"
        )

    def _require(self, name: str, valid: bool, what_is_valid: str) -> None:
        if not valid:
            raise GrowError(
                f"KIConfig({name}={getattr(self, name)!r})", "the value is not usable", what_is_valid
            )

    def alpha_at(self, progress: float) -> float:
        """α when the share `progress` of training (0 to 1) is done."""
        return self.alpha * SCHEDULES[self.schedule](progress, self.stop_at)
