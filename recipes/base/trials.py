"""Trainings that are compared over seeds, each at its own best learning rate."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

from base import flops, text
from base.comparison import TEXT
from base.job import Finished
from base.known import is_masked
from base.lab import Lab
from base.report import mean_and_deviation
from base.setting import Setting


def lab_of(setting: Setting, folder: Path, model: PreTrainedModel) -> tuple[Lab, text.Corpus, np.ndarray]:
    """What trainings from random values share, the text, and its blocks to train on; `model` is one of their kind."""
    with PartialState().main_process_first():
        corpus = text.prepare(setting.text, None, folder)
    blocks, _ = text.share_text(corpus, setting.text.train_tokens, "same")
    masking = text.masking_of(corpus.tokenizer, is_masked(model), setting.text.masked_share)
    return Lab(setting, folder, corpus.tokenizer, {TEXT: corpus.held_out}, masking), corpus, blocks


def step_flops(setting: Setting, model: PreTrainedModel) -> int:
    """What a step of training costs."""
    forward = flops.forward_flops(model, setting.text.sequence_length)
    return flops.training_flops(forward, setting.training.batch_size)


def best_rate(rates: Iterable[float], train: Callable[[float], Finished]) -> tuple[float, dict[str, float]]:
    """The rate with the lowest loss at the end, and the loss at each."""
    tried = {rate: train(rate).losses[TEXT] for rate in rates}
    return min(tried, key=lambda rate: tried[rate]), {f"{rate:g}": loss for rate, loss in tried.items()}


def spent(*trainings: Finished) -> dict[str, Any]:
    """Where the last of some trainings ends, and what they cost together."""
    results = [one.result for one in trainings]
    return {
        "loss": trainings[-1].losses[TEXT],
        "flops": sum(result["flops"]["student"] for result in results),
        "seconds": sum(result["seconds"] for result in results),
    }


def over_seeds(runs: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One way with all seeds; the difference to another is that of each seed."""
    return {
        "loss": mean_and_deviation([run["loss"] for run in runs.values()]),
        "difference": mean_and_deviation([run["loss"] - other[seed]["loss"] for seed, run in runs.items()]),
        "runs": dict(runs),
    }
