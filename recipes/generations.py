"""Does knowledge pass through generations? G1 -> G2 -> G3 against G1 -> G3, and against none.

    python recipes/generations.py                        # 2 CPU cores: the demo preset's sizes, six trainings
    python recipes/generations.py --preset miniature     # seconds, for CI; its numbers mean nothing

G1 has the preset's initial sizes, G3 its target sizes, G2 those half way; all see the same tokens for the preset's
steps (arXiv 2105.13880, section 4.2, whose result is that the chain beats both single teachers). Models that are done
stay in OUT. Expected number: none is claimed; OUT/report.md says what came out, and
docs/results/generations.md what one run gave.
"""

import argparse
import sys
from pathlib import Path

import ki_plus_growth as recipe
from base import text
from base.knowledge import Lab, between
from base.setting import load_preset


def run(options: argparse.Namespace) -> None:
    """Train the generations and report."""
    setting = load_preset(options.preset)
    folder = options.out or Path("runs") / f"generations-{Path(options.preset).stem}"
    corpus = text.prepare(setting.text, None, folder)
    lab = Lab(setting, folder, corpus.tokenizer, {"text": corpus.held_out})
    blocks = {"text": corpus.train}
    g1, g3 = setting.initial, setting.target
    g2 = between(g1, g3)
    first = lab.learn("g1", g1, blocks)
    second = lab.learn("g2", g2, blocks)
    taught_second = lab.learn("g1-g2", g2, blocks, first.path)
    learned = {
        "G1": first,
        "G2": second,
        "G1 -> G2": taught_second,
        "G3": lab.learn("g3", g3, blocks),
        "G1 -> G3": lab.learn("g1-g3", g3, blocks, first.path),
        "G2 -> G3": lab.learn("g2-g3", g3, blocks, second.path),
        "G1 -> G2 -> G3": lab.learn("g1-g2-g3", g3, blocks, taught_second.path),
    }
    rows: list[tuple[str, ...]] = [("generation", "held-out loss", "seconds")]
    rows += [(name, f"{one.losses['text']:.4f}", f"{one.seconds:.0f}") for name, one in learned.items()]
    lab.report("Generations", rows, {name: dict(one.losses) for name, one in learned.items()})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return recipe.guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
