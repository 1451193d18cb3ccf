"""How should a teacher be heard? One student and one teacher; schedule, top-K, temperature and gate vary one at a time.

    python recipes/ki_ablations.py --seeds 3             # 2 CPU cores: the demo preset's sizes, 21 trainings a seed
    python recipes/ki_ablations.py --preset miniature    # seconds, for CI; its numbers mean nothing

The schedules of arXiv 2105.13880, Figure 1b, its top-K (Figure 1c), the other treatments of the rest, and what the
paper leaves open: temperature, a gate, leaving the teacher once it is passed. All at the preset's rate for arm
knowledge. `gain` is against the same seed without a teacher. Time: 40 minutes a seed on one busy core. Expected result:
docs/results/knowledge.md.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import study, text
from base.lab import Lab
from base.setting import Setting
from base.start import Checkpoint

TO_THE_END = {"schedule": "constant", "stop_at": None, "alpha": 0.5}
VARIANTS: Mapping[str, Mapping[str, Any]] = {  # settings of `KIConfig` over the preset's
    "linear": {"schedule": "linear"},
    "heaviside": {"schedule": "heaviside"},
    "cosine": {"schedule": "cosine"},
    "constant 1/2, to the end": TO_THE_END,
    "linear, 0.6 of training": {"stop_at": 0.6},
    "linear, to the end": {"stop_at": 1.0},
    "until passed": {"stop_at": "auto"},
    "top-10, renormalised": {"top_k": 10, "tail": "renorm_teacher"},
    "top-100, renormalised": {"top_k": 100, "tail": "renorm_teacher"},
    "top-10, bucket": {"top_k": 10},
    "top-10, renormalised, constant": {**TO_THE_END, "top_k": 10, "tail": "renorm_teacher"},
    "top-10, bucket, constant": {**TO_THE_END, "top_k": 10},
    "temperature 1/2": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "temperature 4": {"temperature": 4.0},
    "gate": {"gate": True},
    "gate, constant": {**TO_THE_END, "gate": True},
}
CACHED = {"4 exact and 6 draws": {}, "4 exact and 6 draws, constant": TO_THE_END}


def ablations(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss of the student with each variant."""
    corpus = text.prepare(setting.text, None, folder)
    lab = Lab(setting, folder, corpus.tokenizer, {"text": corpus.held_out})
    blocks = {"text": corpus.train}
    teacher = lab.learn("teacher", setting.initial, blocks)
    alone = lab.learn("alone", setting.target, blocks).losses["text"]
    rows = {"(teacher)": {"held-out loss": teacher.losses["text"]}, "no teacher": {"held-out loss": alone}}

    def add(name: str, source: Checkpoint, knowledge: Mapping[str, Any]) -> None:
        evaluations = setting.training.evaluations if knowledge.get("stop_at") == "auto" else 1
        student = lab.learn("taught", setting.target, blocks, source, evaluations=evaluations, **knowledge)
        loss = student.losses["text"]
        rows[name] = {"held-out loss": loss, "gain": alone - loss}

    for name, knowledge in VARIANTS.items():
        add(name, teacher.model, knowledge)
    cache = lab.cached(teacher.model, blocks, top_k=4, samples=6)
    for name, knowledge in CACHED.items():
        add(name, cache, knowledge)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Ablations", ablations, arguments)


if __name__ == "__main__":
    sys.exit(main())
