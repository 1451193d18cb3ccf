"""The setting of a run: presets are TOML files, and a preset may extend another one.

Every number of a run stands in its preset. `Setting` only gives the numbers names and types; it holds no
defaults, so that a preset (with those that it extends) says everything.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growlib import GrowError

PRESETS = Path(__file__).parent.parent / "presets"
MAY_BE_0 = {"seed", "max_bytes", "tokenizer_bytes", "train_tokens", "warmup_steps"}  # of the whole numbers


@dataclass(frozen=True)
class Text:
    """Where the text comes from and how it becomes tokens."""

    source: str  # "stdlib", "environment", or a path
    max_bytes: int  # of the text that is used, whole files; 0: all
    vocab_size: int
    tokenizer_bytes: int  # of training text that the tokenizer is trained on
    sequence_length: int
    train_tokens: int  # distinct tokens to train on, repeated as needed; 0: all there are
    held_out_tokens: int  # evaluated at each point of the curve


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in words that hold for every architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Small:
    """How the small model, which is the given checkpoint and the teacher, is trained."""

    text: str  # "same" as the target's, or "other": text of the same kind that the target never sees
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Training:
    """What is the same for every model and arm."""

    steps: int  # of each arm
    batch_size: int  # sequences per step, over all devices
    device_batch_size: int  # sequences at once on one device; the rest is accumulated
    warmup_steps: int
    schedule: str  # an `lr_scheduler_type` of the HF Trainer
    schedule_options: Mapping[str, Any]
    weight_decay: float
    adam_beta2: float
    max_grad_norm: float
    initializer_range: float
    evaluations: int  # points of the curve after the start
    precision: str  # "float32", or "bf16" (autocast, needs a GPU)
    compile: bool


@dataclass(frozen=True)
class Knowledge:
    """`growlib.KIConfig` without its teacher, which is the small model."""

    schedule: str
    stop_at: float
    temperature: float
    alpha: float


@dataclass(frozen=True)
class Learned:
    """How a method that learns its map does so: the arguments of `growlib.learn`, batches of `device_batch_size`."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Compare:
    """What compare_methods.py runs: each method with each seed."""

    methods: list[str]  # names of `growlib.methods()`; what lacks a width or a depth gets that of lossless
    seeds: int  # how many: the setting's seed and the next ones
    lag: int  # the step after which methods are ranked


@dataclass(frozen=True)
class Setting:
    """Everything that decides the result of a run."""

    preset: str
    model: str  # a key of `base.models.MODELS`
    method: str  # a method of `growlib.methods()`
    seed: int
    text: Text
    initial: Sizes  # of the small model
    target: Sizes
    small: Small
    training: Training
    knowledge: Knowledge
    learned: Learned
    compare: Compare
    learning_rate: Mapping[str, float]  # per arm, each the winner of a sweep of its own

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.text.sequence_length


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
    for name, sizes in (("initial", setting.initial), ("target", setting.target)):
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
    """A dataclass from a table, each entry once and of its type."""
    types = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown, missing = sorted(set(rows) - set(names)), [name for name in names if name not in rows]
    if unknown or missing:
        parts = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise GrowError(f"{asked}, {kind.__name__.lower()}", "; ".join(parts), f"exactly {', '.join(names)}")
    values = {name: _value(types[name], rows[name], f"{asked}, {name}") for name in names}
    for name, value in values.items():
        least = 0 if name in MAY_BE_0 else 1
        if types[name] is int and value < least:
            raise GrowError(f"{asked}, {name}", f"{value} is too small", f"{least} or more")
    return kind(**values)


def _value(kind: Any, value: Any, asked: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return _build(kind, value, asked)
    if kind is float and type(value) is int:
        return float(value)
    plain = typing.get_origin(kind) or kind
    expected = Mapping if dataclasses.is_dataclass(kind) else plain
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise GrowError(asked, f"{value!r} is no {getattr(expected, '__name__', expected)}", f"a {expected.__name__}")
    return value
