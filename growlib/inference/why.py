"""Why a tiny model did not grow exactly, in words that are true of its architecture."""

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from growlib.architectures.schema import Architecture, Growth, Verdict
from growlib.checkpoint.loading import skeleton
from growlib.errors import GrowError
from growlib.inference import probe
from growlib.inference.probe import Trace
from growlib.outputs import every_input
from growlib.parts import flat, last_word, parts_of, value_of

DIFFERS = "a tiny model differs by {:.1g} of its outputs' spread"
TABLE = "table"  # the data file's word where a type grows in no size
FILE = Path(__file__).with_name("not_exact.toml")
TIED = "its head is its embedding, and the norm before it has no weight: nothing takes up the scale of the new entries"
YARN = "YaRN rounds, by head_dim, where its stretch of the rotary frequencies begins: the old frequencies change"
# What the data file calls a growth: the last word of the axis's name, without the number of a second one.
SIZES = {"query": "head_dim", "key": "head_dim", "value": "head_dim", "kv_heads": "heads", "expert_ffn": "ffn"}


def of_class(failure: BaseException, fields: Mapping[str, Any], config: PreTrainedConfig) -> str:
    """What a class of transformers raised at other sizes, as a reason: which sizes it does not take together."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    asked = ", ".join(f"{name} {value_of(config, name)} -> {size}" for name, size in fields.items())
    return f"its class does not take {asked} with its other sizes as they are: {lines[-1].strip()}"


def without_table(config: PreTrainedConfig, error: GrowError) -> GrowError:
    """Why there is no table at all: the reason of the data file, where it has one for the type."""
    return GrowError(error.asked, _named({config.model_type}, {TABLE}) or error.wrong, error.valid)


def told(
    verdict: Verdict, growth: Growth, fields: Mapping[str, Any], table: Architecture, model: PreTrainedModel
) -> Verdict:
    """The verdict on what is not exact, with the cause in words where it is known."""
    differs = verdict.why.startswith(DIFFERS.partition("{")[0])
    if verdict.kind == "inexact" and not differs:  # the plan says why
        return verdict
    if known := _known(model.config, growth, fields, table):
        return Verdict(verdict.kind, known)
    if differs and _has_yarn(model.config) and _size(growth) == "head_dim":
        return Verdict(verdict.kind, YARN)
    if differs and (found := _of_width(growth, fields, table, model)):
        return Verdict(verdict.kind, found)
    return verdict


@cache
def _entries() -> list[dict[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))["cause"]


def _known(config: PreTrainedConfig, growth: Growth, fields: Mapping[str, Any], table: Architecture) -> str:
    """The reason of the data file, for the type of the model or of one of its parts; "" where it has none."""
    types = {config.model_type, *(part.model_type for part in parts_of(config).values())}
    size = _size(growth)
    named = {size, f"{size} {growth.ratio}"}
    if table.axes["hidden"].size.split()[0] in fields and growth.ratio != "deeper":
        named |= {"hidden", f"hidden {growth.ratio}"}  # what grows with the width alone
    return _named(types, named)


def _named(types: set[str], sizes: set[str]) -> str:
    return next((each["why"] for each in _entries() if types & set(each["types"]) and sizes & set(each["sizes"])), "")


def _size(growth: Growth) -> str:
    """The growth in the words of the data file."""
    word = growth.axis.rstrip("_0123456789")
    said = next((said for name, said in SIZES.items() if word.endswith(name)), word.rpartition("_")[2])
    return "depth" if growth.ratio == "deeper" else said


def _has_yarn(config: PreTrainedConfig) -> bool:
    told = [value for name, value in flat(config).items() if last_word(name) == "rope_parameters"]
    return any(isinstance(value, dict) and value.get("rope_type") == "yarn" for value in told)


def _of_width(growth: Growth, fields: Mapping[str, Any], table: Architecture, model: PreTrainedModel) -> str:
    """What sees every entry of the width, or is computed from it; "" where the width does not grow or nothing does."""
    field = table.axes["hidden"].size.split()[0]
    width = value_of(model.config, field)
    if field not in fields or not isinstance(width, int):
        return ""
    if computed := _computed(model, probe.trace(model), width):
        return f"{computed} computes positions from {field}: at another width, other values stand at the old entries"
    if not table.head_norm and _is_tied(model):
        return TIED
    if growth.ratio != "x1.5":
        return ""
    each = [probe.trace(model, [given]) for given in every_input(model)]  # an image or a sound joins the text's stream
    placed = list(dict.fromkeys(name for seen in each for name in _norms_of_all(table, model, seen, width)))
    only = f"so that only whole multiples of {field} are exact"
    return f"{' and '.join(placed)}: it sees the new entries too, {only}" if placed else ""


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def _computed(model: PreTrainedModel, seen: Trace, width: int) -> str:
    """A module without parameters that writes vectors of the width whatever the values that it is given."""
    for name, module in model.named_modules():
        own = [*module.parameters(), *module.children()]
        given, written = seen.inputs.get(name), seen.outputs.get(name)
        if own or written is None or written.shape[-1] != width:
            continue
        if given is None or (given.shape[-1] != width and given.shape != written.shape):
            return name
        try:
            again = module(2 * given + 1)
        except Exception:  # whatever a class of transformers raises: it takes more than this
            continue
        if isinstance(again, Tensor) and again.shape == written.shape and bool((again == written).all()):
            return name
    return ""


def _norms_of_all(table: Architecture, model: PreTrainedModel, seen: Trace, width: int) -> Iterable[str]:
    """The LayerNorms that write the residual stream, read an activation behind the layers, or stand before the text."""
    prefix = skeleton(model).prefix
    starts = [prefix + stack.block.partition("*")[0] for stack in table.stacks]
    blocks = [n for n in seen.inputs if any(n.startswith(s) and n[len(s) :].isdigit() for s in starts)]
    norms = {n: m for n, m in model.named_modules() if n in seen.inputs and seen.inputs[n].shape[-1] == width}
    centred = [n for n, m in norms.items() if (norm := probe.norm_of(m, width)) and norm.centred]
    read = [probe.rows(seen.inputs[n]) for n in (*blocks, *centred)]
    order = list(seen.outputs)
    last = max((order.index(n) for n in blocks if n in seen.outputs), default=len(order))
    linear = [probe.rows(seen.outputs[n]) for n, m in model.named_modules() if probe.is_linear(m) and n in order]
    streams = [probe.rows(seen.outputs[n]) for n in blocks if n in seen.outputs]
    on_text = probe.trace(model).on_text
    for name in centred:
        written, given = probe.rows(seen.outputs[name]), probe.rows(seen.inputs[name])
        if any(written <= other for other in read):
            yield f"a LayerNorm writes the residual stream ({name})"
        elif order.index(name) > last and not any(given <= other for other in (*linear, *streams)):
            yield f"a LayerNorm reads an activation ({name})"
        elif name not in on_text:
            yield f"a LayerNorm stands before the text ({name})"
