"""Presets are TOML files: every number of a run stands in one. A preset may extend another one."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from base.setting import Setting
from growlib import GrowError

PRESETS = Path(__file__).parent.parent / "presets"
STARTS = ("fresh", "grown")
MAY_BE_0 = {"seed", "max_bytes", "tokenizer_bytes", "train_tokens", "warmup_steps", "rewarm"}  # of the whole numbers


def presets() -> list[str]:
    """The names of the presets that come with the recipes."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Setting:
    """A preset by its name, or by the path of a TOML file.

    Raises:
        GrowError: there is no such preset, or it has unknown, missing or wrong entries.
    """
    asked = f"preset {name!r}"
    setting: Setting = _build(Setting, {"preset": name, **_read(name)}, asked)
    length, held_out = setting.text.sequence_length, setting.text.held_out_tokens
    if held_out < length:
        raise GrowError(f"{asked}, text, held_out_tokens", f"{held_out} is less than one sequence", f"{length} or more")
    if setting.teacher and setting.teacher.start not in STARTS:
        wrong = f"{setting.teacher.start!r} is no start"
        raise GrowError(f"{asked}, teacher, start", wrong, f"one of {', '.join(STARTS)}")
    of_teacher = [("teacher, sizes", setting.teacher.sizes)] if setting.teacher else []
    of_when = [("when, small", sizes) for sizes in setting.when.small] if setting.when else []
    starts = setting.progressive.starts if setting.progressive else {}
    of_progressive = [(f"progressive, starts, {name}", sizes) for name, sizes in starts.items()]
    of_lifelong = [("lifelong, sizes", sizes) for sizes in setting.lifelong.sizes] if setting.lifelong else []
    inside = [*of_teacher, *of_when, *of_progressive, *of_lifelong]
    every = [("initial", setting.initial), ("target", setting.target), *inside]
    for name, sizes in every:
        for whole, part in (("hidden", "heads"), ("heads", "kv_heads")):
            size, parts = getattr(sizes, whole), getattr(sizes, part)
            if size % parts:
                raise GrowError(
                    f"{asked}, {name}, {whole}", f"{size} is no multiple of {part}", f"a multiple of {parts}"
                )
    return setting


def _read(name: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        valid = f"one of {', '.join(presets())}, or the path of a .toml file"
        raise GrowError(f"preset {name!r}", "there is no such preset", valid)
    if name in extended_by:
        raise GrowError(f"preset {name!r}, extends", "the preset extends itself", "another preset, or none")
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GrowError(f"preset {name!r}", f"{path} is not TOML ({error})", "a TOML file") from error
    extends = rows.pop("extends", None)
    return _merge(_read(str(extends), (*extended_by, name)), rows) if extends else rows


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; tables are merged entry by entry."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _build(kind: type, rows: Mapping[str, Any], asked: str) -> Any:
    """A dataclass from a table, each entry once and of its type; a section that may be None may be missing."""
    types = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    needed = [name for name in names if type(None) not in get_args(types[name])]
    unknown, missing = sorted(set(rows) - set(names)), [name for name in needed if name not in rows]
    if unknown or missing:
        parts = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise GrowError(f"{asked}, {kind.__name__.lower()}", "; ".join(parts), f"exactly {', '.join(names)}")
    values = {name: _value(types[name], rows[name], f"{asked}, {name}") for name in names if name in rows}
    for name, value in values.items():
        least = 0 if name in MAY_BE_0 else 1
        if types[name] is int and value < least:
            raise GrowError(f"{asked}, {name}", f"{value} is too small", f"{least} or more")
    return kind(**values)


def _value(kind: Any, value: Any, asked: str) -> Any:
    """A value of a type, or of one of several."""
    kinds = [one for one in (get_args(kind) if isinstance(kind, UnionType) else (kind,)) if one is not NoneType]
    table: Any = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
    if table is not None and isinstance(value, Mapping):
        return _build(table, value, asked)
    if float in kinds and type(value) is int:
        return float(value)
    plain = tuple(Mapping if one is table else get_origin(one) or one for one in kinds)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(one.__name__ for one in plain)
        raise GrowError(asked, f"{value!r} is no {names}", f"a {names}")
    parts = get_args(kind)
    if get_origin(kind) is list:
        return [_value(parts[0], one, asked) for one in value]
    if get_origin(kind) is Mapping and parts[1] is not Any:
        return {name: _value(parts[1], one, f"{asked}, {name}") for name, one in value.items()}
    return value
