"""Inference of an architecture: read the table off a tiny model of the class, and prove it by growing that model."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.architectures import families, is_tested, table_of
from growlib.architectures.schema import Architecture, Growth, Verdict, from_table, to_table
from growlib.checkpoint.loading import class_of
from growlib.config import OWN_FIELDS
from growlib.errors import GrowError
from growlib.inference import variants, why
from growlib.inference.depth import with_depth
from growlib.inference.label import draft
from growlib.inference.powers import scaled_by_width
from growlib.inference.tiny import tiny_config, tiny_model
from growlib.inference.towers import joined
from growlib.inference.verifier import followers, growths, only_copies, trial, unverified, verdicts
from growlib.operators import Method
from growlib.parts import flat, last_word, part_in, parts_of, value_of

Class = tuple[type[PreTrainedModel], str, str]  # its switches, and the part that is looked at
PASSES = 2  # over what may stand elsewhere: a second change may show that the first was none

_inferred: dict[Class, Architecture] = {}
_checked: dict[tuple[type[PreTrainedModel], str, frozenset[Growth], Method], str] = {}


def architecture_of(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], parts: Sequence[str] = ()
) -> Architecture:
    """The table of a config's type, or the one that is inferred for the class. Raises GrowError where neither is.

    Of a model of several parts it is that of the text, and of the towers that are named.
    """
    if config.model_type not in families():
        text = infer(config, model_class)
        return joined(text, {part: infer(config, model_class, part) for part in parts})
    return table_of(config.model_type) if is_tested(config.model_type) else _proven(config, model_class)


def infer(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, part: str = "") -> Architecture:
    """Find the table of any class of transformers, and prove it on a tiny randomised model.

    The verdict of an earlier run is taken: per class, its switches, and versions of transformers and growlib. It is
    kept in `~/.cache/growlib` ($GROWLIB_CACHE) for transformers' own classes, else in this process only.

    Args:
        config: its switches and per-layer lists decide what the table holds; its sizes do not matter.
        model_class: by default the class that the config names, or the first one for its model type.
        part: of a model of several parts, the one whose sizes are meant, such as `vision_config`: by default its text.

    Returns:
        The table. `proven` has the verdict on each growth of the tiny model: exact, inexact or refused, and why.

    Raises:
        GrowError: no tiny model of the class can be built, or its tensors cannot be told apart.
    """
    try:
        return _inferred_of(config, model_class or class_of(config), part)
    except GrowError as error:
        raise why.without_table(config, error) from error


def _inferred_of(config: PreTrainedConfig, model_class: type[PreTrainedModel], part: str) -> Architecture:
    small = tiny_config(config, model_class)
    key = (model_class, _switches(small), part)
    if key not in _inferred:
        of_transformers = model_class.__module__.startswith("transformers.")
        _inferred[key] = _from_disk(key, small) if of_transformers else _examined(model_class, small, part)
    return _inferred[key]


def verified(config: PreTrainedConfig) -> Architecture:
    """A config's table with verdicts: the curated one of its type where there is one, else the inferred one."""
    return _proven(config, class_of(config)) if config.model_type in families() else infer(config)


def _proven(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Architecture:
    """A written table with the verdicts of a tiny model; where none can be built, nothing is proven."""
    table = table_of(config.model_type)
    try:
        small = tiny_config(config, model_class)
    except GrowError as error:
        return replace(table, proven=unverified(table, error.wrong))
    key = (model_class, _switches(small) + repr(table), "")
    if key not in _inferred:
        _inferred[key] = _with_verdicts(table, tiny_model(model_class, small))
    return _inferred[key]


def _switches(small: PreTrainedConfig) -> str:
    fields = {key: value for key, value in flat(small).items() if last_word(key) not in OWN_FIELDS}
    fields |= {f"{name}.model_type": part.model_type for name, part in parts_of(small).items()}
    return json.dumps(fields, sort_keys=True, default=str)


def _from_disk(key: Class, small: PreTrainedConfig) -> Architecture:
    model_class, switches, part = key
    asked = f"{model_class.__module__} {model_class.__name__} {version('transformers')} {version('torch')} {switches}"
    digest = hashlib.sha256((asked + part).encode() + _own_source()).hexdigest()
    try:
        folder = Path(os.environ.get("GROWLIB_CACHE") or Path.home() / ".cache" / "growlib")
    except RuntimeError:  # no home
        return _examined(model_class, small, part)
    path = folder / f"{model_class.__name__}-{digest[:16]}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["checksum"] != _checksum(stored["table"]):
            raise ValueError("it was changed")
        return from_table(small.model_type, stored["table"], path.name)
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not what was written: proven again
        table = _examined(model_class, small, part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump({"checksum": _checksum(to_table(table)), "table": to_table(table)}, file)
        Path(file.name).replace(path)
    except OSError:  # a cache that cannot be written costs a few seconds next time
        pass
    return table


def _checksum(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def why_not(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    table: Architecture,
    kinds: frozenset[Growth],
    chosen: Method,
) -> str:
    """Grow a tiny model in all these ways at once: why it is not exact; "" where it is.

    Where it cannot be built so, the verdicts on single growths stand, other than on several parts at once.

    Verdicts on single growths, which may come from disk, are checked so where they are used.
    """
    small = tiny_config(config, model_class)
    key = (model_class, _switches(small), kinds, chosen)
    if key not in _checked:
        fields: dict[str, Any] = {}
        for growth, (alone, *_) in growths(table, small):
            if growth in kinds:
                fields |= {name: max(size, fields.get(name, 0)) for name, size in alone.items()}
        verdict = trial(replace(table, proven={}), tiny_model(model_class, small), fields, chosen).verdict
        several = len({part_in(name) for name in fields if name not in table.follows}) > 1  # parts at once
        _checked[key] = verdict.why if verdict.kind == "inexact" or (several and not verdict.exact) else ""
    return _checked[key]


@cache
def _own_source() -> bytes:
    """The code that infers and verifies: another growlib may come to another verdict."""
    package = Path(__file__).parents[1]
    files = sorted((*package.rglob("*.py"), *package.glob("inference/*.toml")))
    return b"".join(path.read_bytes() for path in files if "ki" not in path.parts)


def _examined(model_class: type[PreTrainedModel], small: PreTrainedConfig, part: str) -> Architecture:
    """The same as `examine`. A class whose tensors cannot be told apart is refused, whatever it raises on the way."""
    try:
        return examine(model_class, small, part)
    except GrowError:
        raise
    except Exception as error:  # whatever a class of transformers leads to
        wrong = f"its tensors cannot be told apart ({type(error).__name__}: {error})"
        asked = f"inferring the table of {f'the {part} of ' if part else ''}{model_class.__name__}"
        valid = "the growth of another part" if part else "a table in growlib/architectures"
        raise GrowError(asked, wrong, valid) from error


def examine(model_class: type[PreTrainedModel], small: PreTrainedConfig, part: str = "") -> Architecture:
    """The table of a class at tiny sizes, with the candidates that were tried and the growths that were proven.

    Of a model of several parts it is the table of one of them: of its text, or of the `part` that is named.
    """
    seen, model = tiny_model(model_class, small, spread=0.07), tiny_model(model_class, small)
    table = with_depth(replace(draft(seen, part=part), proven={}), seen, model, part)
    table = _first_exact(table, variants.of_hidden(table, small), model, "hidden")
    table = scaled_by_width(table, model, small)
    table = _behind_norms(table, model)
    if "expert_ffn" in table.axes:
        table = _first_exact(table, variants.of_pairs(table), model, "expert_ffn")
    if any(axis.per_token for axis in table.axes.values()):
        table = _first_exact(table, variants.of_experts(table), model, "experts")
    if any(axis.role == "query" for axis in table.axes.values()):
        table = _first_exact(table, variants.of_head_dim(table, small), model, "query")
    return _with_verdicts(table, model)


def _behind_norms(table: Architecture, model: PreTrainedModel) -> Architecture:
    """The table with those rows changed that stand on the residual stream and, as the tiny model shows, do not.

    Whole copies cannot tell: there the stream has the scale of what a norm makes of it.
    """
    field = table.axes["hidden"].size.split()[0]
    if not isinstance(width := value_of(model.config, field), int):
        return table  # one of several widths
    fields = {field: int(1.5 * width)}
    fields |= followers(table, model.config, fields)
    best = trial(table, model, fields)
    if best.verdict.exact or best.apart == inf:
        return table
    tried = []
    for _ in range(PASSES):
        start, seen = best.apart, set()
        while more := next(((t, c) for t, c in variants.of_stream(table) if t not in seen), None):
            told, candidate = more
            found = trial(candidate, model, fields)
            seen.add(told)
            tried.append((f"hidden x1.5: {told}", found.verdict))
            if found.apart < best.apart:
                table, best = candidate, found
            if best.verdict.exact:
                break
        if best.verdict.exact or best.apart == start:
            break
    return replace(table, candidates=(*table.candidates, *tried))


def _with_verdicts(table: Architecture, model: PreTrainedModel) -> Architecture:
    proven = verdicts(table, model)
    return replace(table, proven=proven, axes=only_copies(table, proven))


def _first_exact(
    table: Architecture, candidates: Iterable[tuple[str, Architecture]], model: PreTrainedModel, axis: str
) -> Architecture:
    """The first candidate under which the axis doubles exactly; the table as it is where none does."""
    tried = list(table.candidates)
    for name, candidate in candidates:
        field = candidate.axes[axis].size.split()[0]
        size = value_of(model.config, field)
        fields = {} if size is None else {field: 2 * size}
        fields |= followers(candidate, model.config, fields, heads=axis in ("hidden", "experts"))
        grew, verdict, _ = trial(candidate, model, fields)
        if verdict.exact and Growth(axis, "x2") not in grew:
            verdict = Verdict("refused", "it did not grow")
        tried.append((f"{axis} x2: {name}", verdict))
        if verdict.exact:
            return replace(candidate, candidates=tuple(tried))
    return replace(table, candidates=tuple(tried))
