"""When is `both` more than each of weights and knowledge? Cases that differ from one another in one thing each.

    python recipes/both_factors.py --preset tokens --seeds 3    # one CPU core, 20 minutes a seed
    python recipes/both_factors.py --preset miniature           # seconds, for CI; its numbers mean nothing

Each case has three arms with the same seed: grown (weights), taught from random values (knowledge), grown and taught
(both). `gain` is the better one of weights and knowledge less both. The source is a small model of code; it is the
teacher, too, where no other is named, with the preset's schedule. Better teachers have twice the steps and teach with α
= 1 to the end. Shares of text are of 20 tokens per parameter. Rates are the preset's, not swept. Expected result:
docs/results/both.md.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base import job, study
from base.domains import code_and_prose
from base.lab import Lab, fresh, wider
from base.setting import Setting
from base.start import Checkpoint, Fresh, Grown

TO_THE_END = {"schedule": "constant", "stop_at": None, "alpha": 1.0}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "its α begins at 1/4": {"alpha": 0.25},
    "its gate": {"gate": True},
    "until it is passed": {"stop_at": "auto"},
    "its temperature 1/2": {"temperature": 0.5},
}
PER_PARAMETER = 20  # tokens
LOOKS = 8  # evaluations: `auto` stops at one of them


@dataclass(frozen=True)
class Case:
    """What the arms of a row share."""

    blocks: Mapping[str, np.ndarray]
    source: Checkpoint
    teachers: tuple[Checkpoint, ...]
    teacher_loss: float
    knowledge: Mapping[str, Any]
    method: str


def arms(lab: Lab, case: Case) -> dict[str, float]:
    """The three arms' losses on the case's domain, and what `both` gains on the better of the others."""
    (domain,) = case.blocks
    new = fresh(lab.setting, lab.setting.target)
    grown = Grown(case.source, new.config, case.method, lab.setting.learned)

    def loss(arm: str, start: Fresh | Grown, teachers: tuple[Checkpoint, ...] = ()) -> float:
        known = {**lab.setting.knowledge.options(), **case.knowledge} if teachers else {}
        rate = lab.setting.learning_rate[arm]
        training = lab.job(
            arm, start, case.blocks, learning_rate=rate, evaluations=LOOKS, teachers=teachers, knowledge=known
        )
        return job.run(training, lab.folder).losses[domain]

    weights, knowledge = loss("weights", grown), loss("knowledge", new, case.teachers)
    both = loss("both", grown, case.teachers)
    gain = min(weights, knowledge) - both
    return {"teacher": case.teacher_loss, "weights": weights, "knowledge": knowledge, "both": both, "gain": gain}


def cases(lab: Lab, code: np.ndarray, prose: np.ndarray) -> Iterator[tuple[str, Case]]:
    """The rows of the table."""
    setting, steps, text = lab.setting, lab.setting.training.steps, {"code": code}
    length, parameters = code.shape[1], fresh(setting, setting.target).model().num_parameters()
    small = lab.learn("small", setting.initial, text)
    plain = Case(text, small.model, (small.model,), small.losses["code"], {}, setting.method)
    parts = {n: {"code": code[: max(PER_PARAMETER * parameters // length // n, 1)]} for n in (1, 4, 16)}
    yield "the source teaches", plain
    for number in (4, 16):
        yield f"1/{number} of the text", dataclasses.replace(plain, blocks=parts[number])
    half = {**TO_THE_END, "alpha": 0.5}
    yield "1/16 of the text, α = 1/2 to the end", dataclasses.replace(plain, blocks=parts[16], knowledge=half)
    for name, knowledge in VARIANTS.items():
        yield name, dataclasses.replace(plain, knowledge=knowledge)
    others = [dataclasses.replace(lab, setting=dataclasses.replace(setting, seed=setting.seed + n)) for n in (10, 20)]
    small_ones = (small, *(other.learn("small", setting.initial, text) for other in others))
    mean = float(np.mean([each.losses["code"] for each in small_ones]))
    yield (
        "the mean of three small models teaches",
        dataclasses.replace(plain, teachers=tuple(each.model for each in small_ones), teacher_loss=mean),
    )
    teachers = {
        "a teacher of the target's size": lab.learn("equal", setting.target, text),
        "the same with twice the steps": lab.learn("longer", setting.target, text, steps=2 * steps),
        "twice the steps, 1.5 times as wide": lab.learn("larger", wider(setting.target, 1.5), text, steps=2 * steps),
    }
    taught = {
        name: dataclasses.replace(plain, teachers=(one.model,), teacher_loss=one.losses["code"], knowledge=TO_THE_END)
        for name, one in teachers.items()
    }
    yield from taught.items()
    better = taught["the same with twice the steps"]
    yield "twice the steps, 1/16 of the text", dataclasses.replace(better, blocks=parts[16])
    yield "inexact growth, the source teaches", dataclasses.replace(plain, method="random+stack")
    yield "inexact growth, twice the steps", dataclasses.replace(better, method="random+stack")
    of_prose = lab.learn("prose", setting.initial, {"prose": prose})
    new = dataclasses.replace(plain, blocks={"prose": prose[: len(parts[4]["code"])]})
    yield (
        "prose: its small model teaches the grown one of code",
        dataclasses.replace(new, teachers=(of_prose.model,), teacher_loss=of_prose.losses["prose"]),
    )


def factors(setting: Setting, folder: Path) -> study.Rows:
    """The arms of each case."""
    domains = code_and_prose(setting.text, folder)
    held_out = {name: domains[name].held_out for name in ("code", "prose")}
    lab = Lab(setting, folder, domains["code"].tokenizer, held_out)
    return {name: arms(lab, case) for name, case in cases(lab, domains["code"].train, domains["prose"].train)}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Both factors", factors, arguments)


if __name__ == "__main__":
    sys.exit(main())
