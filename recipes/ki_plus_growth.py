"""What does a larger model inherit from a small one? Four trainings on the same tokens say it.

    scratch      the target from random values
    weights      the target grown from the small model (growlib.expand)
    knowledge    the target from random values, taught by the small model (growlib.KITrainer)
    both         grown and taught

    python recipes/ki_plus_growth.py                                # on 2 CPU cores in under 8 minutes
    python recipes/ki_plus_growth.py --preset demo-little-data      # where text is short, both wins
    python recipes/ki_plus_growth.py --preset gpu --arms scratch    # one GPU, one arm per call
    torchrun --nproc-per-node 4 recipes/ki_plus_growth.py --preset gpu

Text: the Python standard library's source, or --text; a sixteenth of its files is held out. The small model
is trained on it first. Cost is counted in FLOPs, the teacher's included. OUT gets results.json, curves.png
and report.md. The small model and every finished arm stay there too, and the next run with the same settings
uses them. Expected result: the demo's table in README.md. Learning rates: docs/results, by recipes/sweep.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from base.command import guarded, say
from base.comparison import ARMS, Prepared, Target, describe, finished, prepare, run_arm
from base.models import MODELS, model_row
from base.report import as_text, remarks, results_of, table, write_report
from base.setting import Setting, load_preset, presets
from base.store import open_folder, read_json
from growlib import GrowError, methods


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--arms", help=f"comma-separated: {', '.join(ARMS)} (default: all), or none: only the small model"
    )
    parser.add_argument("--method", help=f"of growth: {', '.join(m.name for m in methods())}, or WIDTH+DEPTH")
    parser.add_argument("--seed", type=int, help="of initial values, growth and order of the tokens")
    add_setting_options(parser, preset="demo")
    return parser.parse_args(arguments)


def add_setting_options(parser: argparse.ArgumentParser, preset: str) -> None:
    """The options of every recipe that compares trainings."""
    parser.add_argument("--text", help="a file or folder of text, stdlib, or environment (default: the preset's)")
    parser.add_argument(
        "--small", type=Path, help="the folder of a checkpoint with its tokenizer, instead of a new one"
    )
    parser.add_argument("--target", help="a folder or config.json, or KEY=VALUE,... over the small model's config")
    parser.add_argument("--model", help=f"the small model's architecture: {', '.join(MODELS)}")
    parser.add_argument("--preset", default=preset, help=f"{', '.join(presets())}, or a .toml file (default: {preset})")
    parser.add_argument("--train-tokens", type=int, help="train on so many distinct tokens, repeated (0: all)")
    parser.add_argument("--learning-rate", type=float, help="one for all arms, instead of the preset's swept ones")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/PRESET)")


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides."""
    setting = load_preset(options.preset)
    given = {name: value for name in ("model", "method", "seed") if (value := getattr(options, name)) is not None}
    text = setting.text
    if options.text is not None:
        text = dataclasses.replace(text, source=options.text)
    if options.train_tokens is not None:
        text = dataclasses.replace(text, train_tokens=options.train_tokens)
    rates = dict(setting.learning_rate)
    if options.learning_rate is not None:
        rates = dict.fromkeys(rates, options.learning_rate)
    setting = dataclasses.replace(setting, text=text, learning_rate=rates, **given)
    model_row(setting.model)
    for arm in ARMS:
        if rates.get(arm, 0.0) <= 0:
            asked = f"learning rate {rates.get(arm)} of arm {arm}"
            raise GrowError(asked, "it is not positive", "a number such as 2e-3")
    if setting.seed < 0:
        raise GrowError(f"--seed {setting.seed}", "it is negative", "0 or more")
    return setting


def arms_of(option: str | None) -> list[str]:
    """The arms that were asked for, in the table's order."""
    if option == "none":
        return []
    asked = list(ARMS) if option is None else [name.strip() for name in option.split(",")]
    unknown = [name for name in asked if name not in ARMS]
    if unknown:
        wrong = f"there is no arm {', '.join(map(repr, unknown))}"
        raise GrowError(f"--arms {option}", wrong, f"{', '.join(ARMS)}, with commas between them, or none")
    return [name for name in ARMS if name in asked]


def target_of(option: str | None) -> Target:
    """A path stays a path; KEY=VALUE,... becomes overrides."""
    if option is None or "=" not in option:
        return option
    overrides: dict[str, Any] = {}
    for pair in option.split(","):
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise GrowError(f"--target {option}", f"{pair!r} is no KEY=VALUE", "hidden_size=128,num_hidden_layers=4")
        try:
            overrides[key.strip()] = json.loads(value)
        except ValueError:  # a bare word
            overrides[key.strip()] = value
    return overrides


def compare(prepared: Prepared, arms: list[str]) -> dict[str, Any]:
    """Run the arms; those that an earlier run finished under the same setting are in the results too."""
    reused = [name for name in ARMS if finished(prepared, name)]
    if reused:
        say(f"From an earlier run: {', '.join(reused)}.")
    for name in arms:
        run_arm(prepared, name)
    found = {name: finished(prepared, name) for name in ARMS}
    return results_of(describe(prepared), {name: result for name, result in found.items() if result})


def run(options: argparse.Namespace) -> None:
    """Prepare, compare, report."""
    setting, arms, target = setting_of(options), arms_of(options.arms), target_of(options.target)
    folder = options.out or Path("runs") / Path(setting.preset).stem
    open_folder(folder)
    say(f"Preset {setting.preset}; results go to {folder}.")
    prepared = prepare(setting, folder, options.small, target)
    say(
        f"Text: {prepared.corpus.files} files, {prepared.blocks.size:,} distinct tokens to train on. "
        f"Small model: held-out loss {prepared.small_facts['eval_loss']:.3f}."
    )
    results = compare(prepared, arms)
    if not results["arms"]:
        return
    if PartialState().is_main_process:
        before = read_json(folder / "results.json")
        if before and before["setting"] != results["setting"]:
            say(f"{folder}/results.json was of other settings; its arms stay in {folder}/arms.")
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
