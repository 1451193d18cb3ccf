"""What does a larger model inherit from a small one? Four trainings on the same tokens say it.

    scratch      the target from random values
    weights      the target grown from the small model (growlib.expand)
    knowledge    the target from random values, taught (growlib.KITrainer)
    both         grown and taught

The teacher is the small model, --teacher, or one that the preset trains. With --reference there is a fifth training,
`small, trained on`: the small model itself, trained on for the FLOPs that the arms get.

    python recipes/ki_plus_growth.py                                # on 2 CPU cores in under 8 minutes
    python recipes/ki_plus_growth.py --preset demo-teacher          # with a teacher that is better than the small model
    python recipes/ki_plus_growth.py --preset demo-long --arms scratch,weights
    python recipes/ki_plus_growth.py --preset demo-little-data      # where text is short, both wins
    python recipes/ki_plus_growth.py --small ckpt/ --target hidden_size=1536 --teacher big/ --text corpus/
    python recipes/ki_plus_growth.py --preset gpu --arms scratch    # one GPU, one arm per call
    torchrun --nproc-per-node 4 recipes/ki_plus_growth.py --preset gpu

Text: the Python standard library's source, or --text; a sixteenth of its files is held out. The small model
is trained on it first. Cost is counted in FLOPs, the teacher's included. OUT gets results.json, curves.png
and report.md. The small model and every finished arm stay there too, and the next run with the same settings
uses them. Expected result: the demo's table in README.md. Learning rates: docs/results, by recipes/sweep.py.
"""

import argparse
import json
import sys
from typing import Any

from accelerate import PartialState

from base import options as shared
from base.command import guarded, say
from base.comparison import ARMS, Prepared, describe, finished, prepare, run_arm
from base.reference import run_reference
from base.report import as_text, remarks, results_of, table, write_report
from base.store import read_json


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser_of(__doc__)
    shared.add_arms_option(parser)
    shared.add_method_option(parser)
    parser.add_argument("--seed", type=int, help="of initial values, growth and order of the tokens")
    parser.add_argument("--learning-rate", type=float, help="one for all arms, instead of the preset's swept ones")
    shared.add_reference_option(parser)
    shared.add_setting_options(parser, preset="demo")
    shared.add_knowledge_options(parser)
    return parser.parse_args(arguments)


def compare(prepared: Prepared, arms: list[str]) -> dict[str, Any]:
    """Run the arms; those that an earlier run finished under the same setting are in the results too."""
    reused = [name for name in ARMS if finished(prepared, name)]
    if reused:
        say(f"From an earlier run: {', '.join(reused)}.")
    for name in arms:
        run_arm(prepared, name)
    found = {name: finished(prepared, name) for name in ARMS}
    results = {name: result for name, result in found.items() if result}
    reference = run_reference(prepared, results) if results and prepared.setting.reference.trained else None
    return results_of(describe(prepared), results, reference)


def changed(before: Any, now: dict[str, Any]) -> list[str]:
    """The entries of the setting in which the results of an earlier run differ. What it ran on decides nothing."""
    setting = json.loads(json.dumps(now))["setting"]  # a key that is a number becomes text
    old = before.get("setting", {}) if isinstance(before, dict) else {}
    return sorted(name for name in setting if name != "environment" and setting[name] != old.get(name))


def run(options: argparse.Namespace) -> None:
    """Prepare, compare, report."""
    setting, arms, target = shared.setting_of(options), shared.arms_of(options.arms), shared.target_of(options.target)
    folder = shared.results_folder(options, setting)
    teaches = any(ARMS[name].knowledge for name in arms)
    prepared = prepare(setting, folder, options.small, target, shared.teachers_of(options), teaches=teaches)
    say(
        f"Text: {prepared.corpus.files} files, {prepared.blocks.size:,} distinct tokens to train on. "
        f"Small model: held-out loss {prepared.small.eval_loss:.3f}."
    )
    results = compare(prepared, arms)
    if not results["arms"]:
        return
    if PartialState().is_main_process:
        before = read_json(folder / "results.json")
        if before and (names := changed(before, results)):
            say(f"{folder}/results.json was of other settings ({', '.join(names)}); its trainings are kept.")
        write_report(folder, results)
    say("\n" + as_text(table(results)) + "\n")
    for remark in remarks(results):
        say(f"- {remark}")
    say(f"\nWritten: {folder}/results.json, curves.png, report.md.")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
