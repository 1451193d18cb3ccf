"""Does knowledge pass through generations? G1 -> G2 -> G3 against G1 -> G3, and against none.

    python recipes/generations.py --seeds 3              # 2 CPU cores: the demo preset's sizes, 7 trainings a seed
    python recipes/generations.py --preset miniature     # seconds, for CI; its numbers mean nothing

G1 has the preset's initial sizes, G3 its target sizes, G2 those half way; all see the same tokens for the preset's
steps (arXiv 2105.13880, section 4.2, whose result is that the chain beats both single teachers). Models that are done
stay in OUT. Time: 13 minutes a seed on one busy core. Expected result: docs/results/knowledge.md.
"""

import sys
from pathlib import Path

from base import study, text
from base.lab import Lab, between
from base.setting import Setting


def generations(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss of each generation."""
    corpus = text.prepare(setting.text, None, folder)
    lab = Lab(setting, folder, corpus.tokenizer, {"text": corpus.held_out})
    blocks = {"text": corpus.train}
    g1, g3 = setting.initial, setting.target
    g2 = between(g1, g3)
    first = lab.learn("g1", g1, blocks)
    second = lab.learn("g2", g2, blocks)
    taught_second = lab.learn("g1-g2", g2, blocks, first.model)
    learned = {
        "G1": first,
        "G2": second,
        "G1 → G2": taught_second,
        "G3": lab.learn("g3", g3, blocks),
        "G1 → G3": lab.learn("g1-g3", g3, blocks, first.model),
        "G2 → G3": lab.learn("g2-g3", g3, blocks, second.model),
        "G1 → G2 → G3": lab.learn("g1-g2-g3", g3, blocks, taught_second.model),
    }
    return {name: {"held-out loss": one.losses["text"]} for name, one in learned.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Generations", generations, arguments)


if __name__ == "__main__":
    sys.exit(main())
