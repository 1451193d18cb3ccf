"""Which students gain from a teacher? Students that differ in one thing each, beside the same students without one.

    python recipes/student_factors.py --preset tokens --seeds 3    # one CPU core, 10 minutes a seed
    python recipes/student_factors.py --preset miniature           # seconds, for CI; its numbers mean nothing

Width: three pairs of a teacher and its student; the second pair is the preset's, the others are half and twice as wide.
Sequences per step: half and twice the preset's, at as many tokens, with the rate times the square root. Label
smoothing, the control (arXiv 2105.13880, Table 10, A.1, A.3): a teacher that finds every token equally likely, heard to
the end, is label smoothing up to a constant. `gain` is against the same student alone, with the same seed. Expected
result: docs/results/knowledge.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from base import store, study, text
from base.lab import Lab, fresh, wider
from base.setting import Setting, Sizes
from base.start import Checkpoint

WIDTHS = {"half as wide": 0.5, "as it is": 1.0, "twice as wide": 2.0}
BATCHES = {"half the sequences per step": 0.5, "twice the sequences per step": 2.0}
SMOOTHED = (0.1, 0.2)


def uniform(lab: Lab) -> Checkpoint:
    """A teacher that finds every token equally likely: its logits are zero."""
    model = fresh(lab.setting, lab.setting.initial).model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    path = lab.folder / "uniform"
    model.save_pretrained(path)
    lab.tokenizer.save_pretrained(path)
    return Checkpoint(path, store.key_of("uniform", model.config.to_dict()))


def with_batches(setting: Setting, factor: float) -> Setting:
    """The setting with other batches, as many tokens, and rates times the square root."""
    training = setting.training
    batches = dataclasses.replace(
        training,
        batch_size=round(factor * training.batch_size),
        steps=round(training.steps / factor),
        warmup_steps=round(training.warmup_steps / factor),
    )
    rates = {arm: rate * factor**0.5 for arm, rate in setting.learning_rate.items()}
    return dataclasses.replace(setting, training=batches, learning_rate=rates)


def factors(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss of each student, alone and taught."""
    corpus = text.prepare(setting.text, None, folder)
    blocks = {"text": corpus.train}
    lab = Lab(setting, folder, corpus.tokenizer, {"text": corpus.held_out})

    def row(lab: Lab, sizes: Sizes, teacher: Checkpoint, **knowledge: Any) -> dict[str, float]:
        alone = lab.learn("alone", sizes, blocks).losses["text"]
        taught = lab.learn("taught", sizes, blocks, teacher, **knowledge).losses["text"]
        return {"alone": alone, "taught": taught, "gain": alone - taught}

    teachers = {name: lab.learn("teacher", wider(setting.initial, factor), blocks) for name, factor in WIDTHS.items()}
    rows = {
        name: {
            **row(lab, wider(setting.target, factor), teachers[name].model),
            "teacher": teachers[name].losses["text"],
        }
        for name, factor in WIDTHS.items()
    }
    for name, factor in BATCHES.items():
        batches = dataclasses.replace(lab, setting=with_batches(setting, factor))
        rows[name] = row(batches, setting.target, teachers["as it is"].model)
    for share in SMOOTHED:
        to_the_end = {"schedule": "constant", "stop_at": None, "alpha": share}
        rows[f"label smoothing {share:g}"] = row(lab, setting.target, uniform(lab), **to_the_end)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Student factors", factors, arguments)


if __name__ == "__main__":
    sys.exit(main())
