"""A large model of one domain meets another, of which a small model knows more: with plenty of text and with little.

    python recipes/domain_adaptation.py --seeds 3            # 2 CPU cores: the demo preset's sizes, 39 trainings a seed
    python recipes/domain_adaptation.py --preset miniature   # seconds, for CI; its numbers mean nothing

The large model is trained on code, small ones on prose (the teacher) and on code. Then the large one goes on for a
quarter of the steps with so much prose, by itself or taught, at each of two learning rates (arXiv 2105.13880, section
4.4, Tables 2 and 4). With replay half of its text is code, whose teacher is the small model of code. Held-out loss on
prose, and on code: what was forgotten. Time: 25 minutes a seed on one busy core. Expected result:
docs/results/knowledge.md.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import study
from base.domains import code_and_prose
from base.lab import Lab
from base.setting import Setting

SHARES = (1, 8, 64)  # one of so many parts of the prose
LEARNING_RATES = (5e-4, 2e-3)
TEACHING: Mapping[str, Mapping[str, Any] | None] = {  # settings of `KIConfig`; None: no teacher
    "alone": None,
    "taught": {},
    "taught to the end": {"schedule": "constant", "stop_at": None, "alpha": 0.5},
}


def adaptation(setting: Setting, folder: Path) -> study.Rows:
    """Held-out losses on both domains."""
    domains = code_and_prose(setting.text, folder)
    prose, code = domains["prose"].train, domains["code"].train
    held_out = {name: domains[name].held_out for name in ("prose", "code")}
    lab = Lab(setting, folder, domains["code"].tokenizer, held_out)
    large = lab.learn("large-code", setting.target, {"code": code})
    small = {name: lab.learn(f"small-{name}", setting.initial, {name: domains[name].train}) for name in held_out}
    steps = max(setting.training.steps // 4, setting.training.warmup_steps + 1)
    learned = {"large, code": large, "small, prose": small["prose"]}
    for share in SHARES:
        some = prose[: max(len(prose) // share, 1)]
        # As many blocks of code as of prose: half of what is seen.
        texts = {"": {"prose": some}, ", replay": {"prose": some, "code": code[: len(some)]}}
        for replay, blocks in texts.items():
            for teaching, knowledge in TEACHING.items():
                teacher = None if knowledge is None else {name: small[name].model for name in blocks}
                for rate in LEARNING_RATES:
                    name = f"1/{share} of the prose, {teaching}{replay}, {rate:g}"
                    learned[name] = lab.learn(
                        "adapt", large.model, blocks, teacher, steps=steps, learning_rate=rate, **knowledge or {}
                    )
    return {name: {f"held-out {d}": loss for d, loss in one.losses.items()} for name, one in learned.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Domain adaptation", adaptation, arguments)


if __name__ == "__main__":
    sys.exit(main())
