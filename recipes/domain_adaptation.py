"""A large model of one domain meets another, of which a small model knows more: with plenty of text and with little.

    python recipes/domain_adaptation.py                       # 2 CPU cores: the demo preset's sizes
    python recipes/domain_adaptation.py --preset miniature    # seconds, for CI; its numbers mean nothing

The large model is trained on code, small ones on prose (the teacher) and on code. Then the large one goes on with so
much prose, by itself or taught (arXiv 2105.13880, section 4.4, Tables 2 and 4); with replay half of its text is code,
whose teacher is the small model of code. Held-out loss on prose, and on code: what was forgotten. Expected number: none
is claimed; OUT/report.md says what came out.
"""

import argparse
import sys
from pathlib import Path

import ki_plus_growth as recipe
from base.domains import code_and_prose
from base.knowledge import Lab, Learned
from base.setting import load_preset


def run(options: argparse.Namespace) -> None:
    """Train, adapt, report."""
    setting = load_preset(options.preset)
    folder = options.out or Path("runs") / f"domain-adaptation-{Path(options.preset).stem}"
    domains = code_and_prose(setting.text, folder)
    prose, code = domains["prose"].train, domains["code"].train
    held_out = {name: domains[name].held_out for name in ("prose", "code")}
    lab = Lab(setting, folder, domains["code"].tokenizer, held_out)
    large = lab.learn("large-code", setting.target, {"code": code})
    small = {name: lab.learn(f"small-{name}", setting.initial, {name: domains[name].train}) for name in held_out}
    steps = max(setting.training.steps // 4, setting.training.warmup_steps + 1)
    learned: dict[str, Learned] = {"large, code": large, "small, prose": small["prose"]}
    for share in options.shares:
        some = prose[: max(len(prose) // share, 1)]
        for replay in (False, True):
            # As many blocks of code as of prose: half of what is seen.
            blocks = {"prose": some, "code": code[: len(some)]} if replay else {"prose": some}
            for taught in (False, True):
                teacher = {name: small[name].path for name in blocks} if taught else None
                name = f"1/{share} of the prose, {'taught' if taught else 'alone'}{', replay' if replay else ''}"
                words = f"adapt-{share}{'-taught' if taught else ''}{'-replay' if replay else ''}"
                learned[name] = lab.learn(words, large.path, blocks, teacher, steps=steps)
    rows: list[tuple[str, ...]] = [("training", "held-out prose", "held-out code")]
    rows += [(name, f"{one.losses['prose']:.4f}", f"{one.losses['code']:.4f}") for name, one in learned.items()]
    lab.report("Domain adaptation", rows, {name: dict(one.losses) for name, one in learned.items()})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--shares", type=int, nargs="+", default=[1, 8, 64], help="one of so many parts of the prose")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return recipe.guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
