"""Inference of a family: read the table off a tiny model of the class, and let growths of it be the judge."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.families import families, family
from growlib.families.inference import variants
from growlib.families.inference.judge import followers, trial, verdicts
from growlib.families.inference.label import draft
from growlib.families.inference.tiny import class_of, tiny_config, tiny_model
from growlib.families.schema import Family, from_table, to_table

_known: dict[tuple[type[PreTrainedModel], str], Family] = {}


def cached(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> Family:
    """The verdict of an earlier run: per class, its switches, and versions of transformers and growlib.

    It is kept in `~/.cache/growlib` ($GROWLIB_CACHE) for transformers' own classes, else in this process only.
    """
    model_class = model_class or class_of(config)
    small = tiny_config(config, model_class)
    switches = {k: v for k, v in small.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")}
    key = (model_class, json.dumps(switches, sort_keys=True, default=str))
    if key not in _known:
        _known[key] = (
            _from_disk(key, small)
            if model_class.__module__.startswith("transformers.")
            else examine(model_class, small)
        )
    return _known[key]


def heard(config: PreTrainedConfig) -> Family:
    """A config's table with the judge's verdicts: the curated one of its type where there is one, else the inferred."""
    if config.model_type not in families():
        return cached(config)
    table, model_class = family(config.model_type), class_of(config)
    return replace(table, proven=verdicts(table, tiny_model(model_class, tiny_config(config, model_class))))


def _from_disk(key: tuple[type[PreTrainedModel], str], small: PreTrainedConfig) -> Family:
    model_class, switches = key
    asked = f"{model_class.__module__} {model_class.__name__} {version('transformers')} {version('torch')} {switches}"
    digest = hashlib.sha256(asked.encode() + _own_source()).hexdigest()
    folder = Path(os.environ.get("GROWLIB_CACHE", Path.home() / ".cache" / "growlib"))
    path = folder / f"{model_class.__name__}-{digest[:16]}.json"
    try:
        return from_table(small.model_type, json.loads(path.read_text()), path.name)
    except (OSError, ValueError):
        table = examine(model_class, small)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(to_table(table), file)
        Path(file.name).replace(path)
    except OSError:  # a cache that cannot be written costs a few seconds next time
        pass
    return table


@cache
def _own_source() -> bytes:
    """The code that judges: another growlib may come to another verdict."""
    package = Path(__file__).parents[2]
    return b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")) if "ki" not in path.parts)


def examine(model_class: type[PreTrainedModel], small: PreTrainedConfig) -> Family:
    """The table of a class at tiny sizes, with the candidates that were tried and the growths that were proven."""
    table = replace(draft(tiny_model(model_class, small, spread=0.07)), proven={})
    model = tiny_model(model_class, small)
    table = _first_exact(table, variants.of_hidden(table, small), model, "hidden")
    if "expert_ffn" in table.axes:
        table = _first_exact(table, variants.of_pairs(table), model, "expert_ffn")
    if any(axis.per_token for axis in table.axes.values()):
        table = _first_exact(table, variants.of_experts(table), model, "experts")
    if any(axis.meets == "query" for axis in table.axes.values()):
        table = _first_exact(table, variants.of_head_dim(table, small), model, "query")
    return replace(table, proven=verdicts(table, model))


def _first_exact(table: Family, candidates: Iterable[tuple[str, Family]], model: PreTrainedModel, axis: str) -> Family:
    """The first candidate under which the axis doubles exactly; the table as it is where none does."""
    heard = list(table.candidates)
    for name, candidate in candidates:
        field = candidate.axes[axis].size.split()[0]
        fields = {field: 2 * getattr(model.config, field)} if hasattr(model.config, field) else {}
        fields |= followers(candidate, model.config, fields, heads=axis == "hidden")
        tried = trial(candidate, model, fields)
        exact = not tried.wrong and f"{axis} x2" in tried.grew
        heard.append((f"{axis} x2: {name}", "" if exact else tried.wrong or "it did not grow"))
        if exact:
            return replace(candidate, candidates=tuple(heard))
    return replace(table, candidates=tuple(heard))
