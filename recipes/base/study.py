"""A study: the same trainings with several seeds, and a table of their means."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from base.command import environment, guarded, say
from base.options import parser_of
from base.presets import load_preset
from base.report import as_markdown, as_text, mean_and_deviation, shown
from base.setting import Setting
from base.store import open_folder, write_json, write_text
from growlib import GrowError

Rows = Mapping[str, Mapping[str, float]]  # row -> column -> what one seed gave
OneSeed = Callable[[Setting, Path], Rows]
Results = Mapping[str, Mapping[str, list[float]]]  # row -> column -> by seed


def main(doc: str | None, title: str, one_seed: OneSeed, arguments: list[str] | None, *, preset: str = "demo") -> int:
    """A recipe that is a study; the exit code.

    Args:
        doc: its help.
        one_seed: the trainings with the seed of a setting, whose models are kept in a folder.
        preset: where the command line names none.
    """
    parser = parser_of(doc)
    named = f"a name in recipes/presets, or a .toml file (default: {preset})"
    parser.add_argument("--preset", default=preset, help=named)
    parser.add_argument("--seed", type=int, help="the first seed (default: the preset's)")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of models and results (default: runs/RECIPE-PRESET)")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(title, one_seed, options))


def run(title: str, one_seed: OneSeed, options: argparse.Namespace) -> None:
    """Every seed, then OUT/results.json and OUT/report.md."""
    setting = load_preset(options.preset)
    if options.seed is not None:
        setting = dataclasses.replace(setting, seed=options.seed)
    if options.seeds < 1 or setting.seed < 0:
        asked = f"--seed {setting.seed} --seeds {options.seeds}"
        raise GrowError(asked, "there is no such run", "a seed of 0 or more, and 1 or more of them")
    folder = options.out or Path("runs") / f"{title.lower().replace(' ', '-')}-{Path(options.preset).stem}"
    open_folder(folder)
    seeds = range(setting.seed, setting.seed + options.seeds)
    results: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        say(f"Seed {seed}.")
        for row, columns in one_seed(dataclasses.replace(setting, seed=seed), folder).items():
            for column, value in columns.items():
                results.setdefault(row, {}).setdefault(column, []).append(value)
    if PartialState().is_main_process:
        write(folder, title, results, {**dataclasses.asdict(setting), "seeds": list(seeds), **environment()})
    say("\n" + as_text(table(results)) + f"\n\nWritten: {folder}/results.json, report.md.")


def write(folder: Path, title: str, results: Results, setting: Mapping[str, Any]) -> None:
    """Write results.json and report.md."""
    write_json(folder / "results.json", {"setting": setting, "results": results})
    said = f"Preset {setting['preset']}, seeds {', '.join(map(str, setting['seeds']))}: mean ± deviation over seeds."
    write_text(folder / "report.md", f"# {title}\n\n{said}\n\n{as_markdown(table(results))}\n")


def table(results: Results) -> list[tuple[str, ...]]:
    """The rows as text, the header first."""
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    rows: list[tuple[str, ...]] = [("", *columns)]
    for name, row in results.items():
        rows.append((name, *(_cell(row[column]) if column in row else "" for column in columns)))
    return rows


def _cell(values: list[float]) -> str:
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:  # a size, not a measurement
        return str(values[0])
    return shown(mean_and_deviation(values), "{:.3f}")
