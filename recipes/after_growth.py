"""How should a grown model train: all entries alike, or its new ones in their own way?

    python recipes/after_growth.py --preset methods --seeds 3   # 2 CPU cores, 13 trainings a seed
    python recipes/after_growth.py --preset miniature           # seconds, for CI; its numbers mean nothing

One small model, grown in width and depth (and, for `freeze_old`, in depth alone), and trained with one thing changed
at a time: rates of new and of old entries (SPARKLING, arXiv 2602.02472), muP's rates (arXiv 2203.03466), weight decay,
warm-up. Below zero, the change helped. Time: 12 minutes a seed on one core. Expected result: docs/results/after.md.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import job, study
from base.aids import Aid
from base.comparison import Prepared, arm_job, prepare
from base.setting import Setting
from growlib import Rewarm

PLAIN = "plain"
ARM = "weights"


def aids(setting: Setting) -> Mapping[str, Mapping[str, Any]]:
    """What changes in each row: fields of `Aid`, of the training, or the rate as a multiple of the preset's."""
    warm_up = setting.training.warmup_steps
    rewarm = Rewarm(rho=1.3, steps=setting.training.steps // 4)
    return {
        PLAIN: {},
        "new entries at twice the rate": {"new": 2.0},
        "new entries at half the rate": {"new": 0.5},
        f"new entries warm up a second time, {rewarm.steps} steps": {"new": rewarm},
        "old entries at half the rate": {"old": 0.5},
        "old entries frozen": {"old": 0.0},
        "no weight decay on new entries": {"decays_new": False},
        "muP": {"mup": True},
        "muP at twice the rate": {"mup": True, "rate": 2.0},
        "no warm-up": {"warmup_steps": 0},
        f"warm-up of {3 * warm_up} steps, not {warm_up}": {"warmup_steps": 3 * warm_up},
    }


def trained(prepared: Prepared, name: str, changed: Mapping[str, Any]) -> float:
    """The held-out loss at the end of one training."""
    of_aid = {field.name for field in dataclasses.fields(Aid)} & changed.keys()
    of_training = changed.keys() - of_aid - {"rate"}
    plain = arm_job(prepared, ARM, shown=name)
    wanted = dataclasses.replace(
        plain,
        training=dataclasses.replace(plain.training, **{field: changed[field] for field in of_training}),
        learning_rate=plain.learning_rate * changed.get("rate", 1.0),
        aid=Aid(prepared.plan, **{field: changed[field] for field in of_aid}) if of_aid else None,
    )
    return job.run(wanted, prepared.lab.folder).result["final_eval_loss"]


def one_seed(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss of each training, and its difference to the plain one of the same growth."""
    rows: dict[str, dict[str, float]] = {}
    deeper = dataclasses.replace(setting, target=dataclasses.replace(setting.initial, layers=setting.target.layers))
    growths = {
        "": (setting, aids(setting)),
        "deeper alone: ": (deeper, {PLAIN: {}, "old blocks frozen": {"frozen": True}}),
    }
    for growth, (of_growth, changes) in growths.items():
        prepared = prepare(of_growth, folder, None, None)
        for name, changed in changes.items():
            loss = trained(prepared, growth + name, changed)
            plain = rows[growth + PLAIN]["held-out loss"] if name != PLAIN else loss
            rows[growth + name] = {"held-out loss": loss, "difference": loss - plain}
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "After growth", one_seed, arguments)


if __name__ == "__main__":
    sys.exit(main())
