"""The options that command lines share, and the setting that they make of a preset."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from base.command import say
from base.comparison import ARMS, Target
from base.models import MODELS, model_row
from base.presets import load_preset, presets
from base.setting import Setting
from base.store import open_folder
from growlib import GrowError, KIConfig, methods
from growlib.ki import SCHEDULES


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the recipe's own words."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_setting_options(parser: argparse.ArgumentParser, preset: str) -> None:
    """Those of every recipe that compares trainings and may be given a small model."""
    parser.add_argument(
        "--small", type=Path, help="the folder of a checkpoint with its tokenizer, instead of a new one"
    )
    parser.add_argument("--target", help="a folder or config.json, or KEY=VALUE,... over the small model's config")
    add_preset_options(parser, preset)


def add_preset_options(parser: argparse.ArgumentParser, preset: str) -> None:
    """Those of every recipe that compares trainings."""
    parser.add_argument("--text", help="a file or folder of text, stdlib, or environment (default: the preset's)")
    parser.add_argument("--model", help=f"the small model's architecture: {', '.join(MODELS)}")
    parser.add_argument("--preset", default=preset, help=f"{', '.join(presets())}, or a .toml file (default: {preset})")
    parser.add_argument("--train-tokens", type=int, help="train on so many distinct tokens, repeated (0: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/PRESET)")


def add_method_option(parser: argparse.ArgumentParser) -> None:
    """How the arms with weights grow."""
    parser.add_argument("--method", help=f"of growth: {', '.join(m.name for m in methods())}, or WIDTH+DEPTH")


def add_arms_option(parser: argparse.ArgumentParser) -> None:
    """Which arms."""
    parser.add_argument("--arms", help=f"comma-separated: {', '.join(ARMS)} (default: all), or none")


def add_knowledge_options(parser: argparse.ArgumentParser) -> None:
    """Who teaches the arms with knowledge, and for how long."""
    parser.add_argument(
        "--teacher",
        action="append",
        help="the folder of a checkpoint with the same tokenizer; several, with commas or by repeating the option, are "
        "averaged (default: the preset's, or the small model)",
    )
    parser.add_argument("--schedule", help=f"of the teacher's weight: {', '.join(SCHEDULES)} (default: the preset's)")
    parser.add_argument("--stop-at", help="the share of training from which the teacher is gone, auto, or none")
    parser.add_argument("--alpha", type=float, help="the teacher's weight at the first step, 0 to 1")


def add_reference_option(parser: argparse.ArgumentParser) -> None:
    """Whether the comparison has the reference."""
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        help="train the small model on, too, for the FLOPs of the arms (default: the preset's)",
    )


def setting_of(options: argparse.Namespace) -> Setting:
    """The preset with the command line's overrides.

    Raises:
        GrowError: there is no such preset, architecture or schedule, or a number is out of range.
    """
    setting = load_preset(options.preset)
    given = _given(options, "model", "method", "seed")
    text = _given(options, "train_tokens", text="source")
    rate = getattr(options, "learning_rate", None)
    rates = dict(setting.learning_rate) if rate is None else dict.fromkeys(ARMS, rate)
    knowledge = _given(options, "schedule", "alpha")
    if getattr(options, "stop_at", None) is not None:
        knowledge["stop_at"] = _share(options.stop_at)
    setting = dataclasses.replace(
        setting,
        text=dataclasses.replace(setting.text, **text),
        knowledge=dataclasses.replace(setting.knowledge, **knowledge),
        reference=dataclasses.replace(setting.reference, **_given(options, reference="trained")),
        learning_rate=rates,
        **given,
    )
    model_row(setting.model)
    _check_knowledge(setting, several=len(teachers_of(options)) > 1)
    for arm in ARMS:
        if not rates.get(arm, 0.0) > 0:
            asked = f"learning rate {rates.get(arm)} of arm {arm}"
            raise GrowError(asked, "it is not positive", "a number such as 2e-3")
    if setting.seed < 0:
        raise GrowError(f"--seed {setting.seed}", "it is negative", "0 or more")
    return setting


def section_of(options: argparse.Namespace, setting: Setting, name: str, *lists: str) -> Any:
    """A section of the preset with the command line's overrides: how many seeds, and lists of numbers, in order.

    Raises:
        GrowError: the preset has no such section, a list is empty, or there is no seed.
    """
    found = getattr(setting, name)
    if found is None:
        raise GrowError(
            f"preset {setting.preset!r}", f"it has no section {name}", f"{name}, miniature, or a .toml file"
        )
    given = _given(options, "seeds")
    for one in lists:
        if (value := getattr(options, one)) is not None:
            given[one] = sorted(numbers(f"--{one.replace('_', '-')}", value, float))
    section = dataclasses.replace(found, **given)
    if section.seeds < 1:
        raise GrowError(f"--seeds {section.seeds}", "it is below 1", "1 or more")
    if not all(getattr(section, one) for one in lists):
        raise GrowError(f"preset {setting.preset!r}, {name}", f"{' or '.join(lists)} is empty", "at least one of each")
    return section


def _given(options: argparse.Namespace, *names: str, **renamed: str) -> dict[str, Any]:
    """What the command line says, by the names of the setting's fields."""
    fields = {name: name for name in names} | renamed
    return {field: value for name, field in fields.items() if (value := getattr(options, name, None)) is not None}


def _share(option: str) -> float | str:
    try:
        return option if option in {"auto", "none"} else float(option)
    except ValueError as error:
        raise GrowError(f"--stop-at {option}", "it is no share", "a number in (0, 1], auto, or none") from error


def _check_knowledge(setting: Setting, several: bool) -> None:
    """What KIConfig would refuse is refused before anything is trained, in the words of the command line."""
    knowledge = setting.knowledge
    asked = f"--schedule {knowledge.schedule} --stop-at {knowledge.stop_at} --alpha {knowledge.alpha:g}"
    try:
        KIConfig(teacher="teacher", **knowledge.options())
    except GrowError as error:
        raise GrowError(asked, f"{error.asked}: {error.wrong}", error.valid) from error
    if several and knowledge.stop_at == "auto":
        raise GrowError(asked, "the held-out loss of an average of teachers is not known", "one teacher, or a share")


def teachers_of(options: argparse.Namespace) -> tuple[Path, ...]:
    """The teachers' folders; none were given: the preset's teacher, or the small model."""
    parts = [part.strip() for option in getattr(options, "teacher", None) or () for part in option.split(",")]
    if not all(parts):
        raise GrowError(f"--teacher {','.join(parts)}", "one of the paths is empty", "folders with commas between them")
    return tuple(map(Path, parts))


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


def numbers(name: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """Comma-separated numbers, each once: whole ones from 0 up, others above 0."""
    asked, valid = f"{name} {option}", "0 or more" if kind is int else "numbers above 0"
    try:
        found = list(dict.fromkeys(kind(part) for part in option.split(",")))
    except ValueError as error:
        raise GrowError(asked, str(error), f"{valid}, with commas between them") from error
    if not all(0 <= number < float("inf") and (number or kind is int) for number in found):
        raise GrowError(asked, "a number is out of range", valid)
    return found


def results_folder(options: argparse.Namespace, setting: Setting) -> Path:
    """The folder of the results, made and tried."""
    folder = options.out or Path("runs") / Path(setting.preset).stem
    open_folder(folder)
    say(f"Preset {setting.preset}; results go to {folder}.")
    return folder
