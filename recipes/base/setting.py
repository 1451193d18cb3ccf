"""The setting of a run: presets are TOML files, and a preset may extend another one.

Every number of a run stands in its preset. `Setting` only gives the numbers names and types; it holds no
defaults, so that a preset (with those that it extends) says everything.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from growlib import GrowError

PRESETS = Path(__file__).parent.parent / "presets"
STARTS = ("fresh", "grown")
MAY_BE_0 = {"seed", "max_bytes", "tokenizer_bytes", "train_tokens", "warmup_steps", "rewarm"}  # of the whole numbers


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
    masked_share: float  # of the tokens that a masked language model has to find


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
class Teacher:
    """A teacher of the arms with knowledge that is trained for it."""

    sizes: Sizes
    start: str  # "fresh": from random values, or "grown": from the small model, with the setting's method
    text: str  # as in `Small`
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Reference:
    """What the small model reaches by itself: trained on for the FLOPs of the arms. Its schedule is the arms'."""

    trained: bool
    learning_rate: float


@dataclass(frozen=True)
class Knowledge:
    """`growlib.KIConfig` without its teacher."""

    schedule: str
    stop_at: float | str  # a share of training, "auto", or "none"
    temperature: float
    alpha: float

    def options(self) -> dict[str, Any]:
        """The arguments of `growlib.KIConfig`."""
        return dataclasses.asdict(self) | {"stop_at": None if self.stop_at == "none" else self.stop_at}


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
    learning_rates: list[float]  # each method trains at its own best one


@dataclass(frozen=True)
class When:
    """What when_to_grow.py runs: each small model with each share of the budget and each seed."""

    shares: list[float]  # of the budget, on the small model; 1: it never grows
    seeds: int  # how many: the setting's seed and the next ones
    learning_rates: list[float]  # each model trains at its own best one
    small: list[Sizes]


@dataclass(frozen=True)
class Progressive:
    """What progressive_growth.py runs: each way to the target with each moment and each seed."""

    starts: Mapping[str, Sizes]  # of the models that grow into the target, by the name of the way
    moments: list[float]  # shares of the steps after which the model grows
    decay: float  # the share of the steps, the last ones, in which the learning rate falls
    rewarm: int  # steps of a second warm-up of the new entries; 0: none
    seeds: int  # how many: the setting's seed and the next ones
    learning_rates: list[float]  # each way trains at its own best one


@dataclass(frozen=True)
class Lifelong:
    """What lifelong.py runs: a model that learns domain after domain, in several ways."""

    sizes: list[Sizes]  # of the model while it learns each domain
    replay: float  # the share of a stage's blocks that are of earlier domains
    learning_rates: list[float]  # of the domains after the first; each way trains at its own best one


@dataclass(frozen=True)
class Downstream:
    """What downstream.py runs: fine-tunings of each arm's model."""

    packages: int  # of the standard library: the classes
    length: int  # of a snippet, in tokens
    train: int  # snippets to fine-tune on
    judged: int  # snippets that choose the rate, and as many for the accuracy; fewer where there are not so many
    steps: int
    batch_size: int
    learning_rates: list[float]  # each model is fine-tuned at its own best one


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
    reference: Reference
    knowledge: Knowledge
    learned: Learned
    compare: Compare
    learning_rate: Mapping[str, float]  # per arm, each the winner of a sweep of its own
    teacher: Teacher | None = None  # None: the small model teaches
    when: When | None = None  # None: nothing for when_to_grow.py
    progressive: Progressive | None = None  # None: nothing for progressive_growth.py
    lifelong: Lifelong | None = None  # None: nothing for lifelong.py
    downstream: Downstream | None = None  # None: nothing for downstream.py

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
