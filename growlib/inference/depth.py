"""How a stack gets deeper: what makes a new block the identity, where it may stand, and what its number decides."""

from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedModel

from growlib.architectures.schema import Architecture, Stack
from growlib.checkpoint.loading import skeleton
from growlib.inference import probe
from growlib.inference.identity import pruned, with_identity
from growlib.inference.label import draft
from growlib.inference.verifier import trial
from growlib.parts import value_of


def with_depth(table: Architecture, seen: PreTrainedModel, model: PreTrainedModel, part: str = "") -> Architecture:
    """The table with stacks that get deeper exactly, where there is a way; the first one that a tiny model proves.

    Args:
        table: a draft of `seen`.
        seen: the tiny model that is looked at.
        model: another one of the same config, that is grown.
        part: of the config, of which the table is.
    """
    for layers in dict.fromkeys(stack.layers for stack in table.stacks):
        deeper = {layers: 2 * value_of(model.config, layers)}
        if trial(table, model, deeper).verdict.exact:
            table = _pruned(table, layers, seen)
            continue
        for told, tried in _ways(table, layers, seen, part):
            verdict = trial(tried, model, deeper).verdict
            table = replace(table, candidates=(*table.candidates, (f"{layers}: {told}", verdict)))
            if verdict.exact:
                table = replace(tried, candidates=table.candidates)
                break
    return table


def _pruned(table: Architecture, layers: str, seen: PreTrainedModel) -> Architecture:
    """The table with as few writers as it takes, where blocks have more than the usual two or three."""
    prefix = skeleton(seen).prefix

    def fewer(stack: Stack) -> Stack:
        many = stack.layers == layers and not stack.last_norm and len(stack.writers) > 2
        return pruned(seen, prefix, stack) if many else stack

    return replace(table, stacks=tuple(fewer(stack) for stack in table.stacks))


def _ways(table: Architecture, layers: str, seen: PreTrainedModel, part: str) -> Iterator[tuple[str, Architecture]]:
    """Tables that differ in one fact about a stack."""
    yield from _placed(table, layers, "")
    base, trace = skeleton(seen), probe.trace(seen)
    widths = {n: t.shape[-1] for n, t in trace.inputs.items()}
    modules = ((n, m) for n, m in seen.named_modules() if n in widths)
    norms = {n: norm for n, m in modules if (norm := probe.norm_of(m, widths[n]))}
    for told, known in (
        (
            "norms in lists of their own",
            _norm_lists(table, layers, base.prefix, [n for n in trace.outputs if n in norms]),
        ),
        ("the identity by zeros and ones", _found(table, layers, seen, base.prefix, norms)),
    ):
        if known:
            again = replace(draft(seen, known, part), proven={}, candidates=table.candidates)
            yield told, again
            yield from _placed(again, layers, f"{told}, ")


def _norm_lists(table: Architecture, layers: str, prefix: str, norms: list[str]) -> tuple[Stack, ...]:
    """Lists of norms beside those of what writes the stream, in the order of their use: the last ends a layer."""
    first = {prefix + stack.block.replace("*.", "0"): stack for stack in table.stacks if stack.layers == layers}
    lists = [first[name] for name in norms if name in first]
    return (*(replace(s, inner_norms=(".",)) for s in lists[:-1]), *(replace(s, last_norm=".") for s in lists[-1:]))


def _found(
    table: Architecture, layers: str, seen: PreTrainedModel, prefix: str, norms: dict[str, probe.Norm]
) -> tuple[Stack, ...]:
    """The stacks with what calling a block shows to make it the identity; none where that is nothing new."""
    found = [with_identity(seen, prefix, stack, norms) for stack in table.stacks if stack.layers == layers]
    known = tuple(stack for stack in found if stack is not None)
    return known if len(known) == len(found) and not set(known) <= set(table.stacks) else ()


def _placed(table: Architecture, layers: str, told: str) -> Iterator[tuple[str, Architecture]]:
    """New layers behind all old ones; branches that a class scales by the number of layers."""
    yield f"{told}new layers behind all old ones", _with(table, layers, numbered=True)
    yield f"{told}branches over sqrt(layers)", _with(table, layers, branch_power=-0.5)


def _with(table: Architecture, layers: str, **facts: bool | float) -> Architecture:
    stacks: list[Stack] = [replace(s, **facts) if s.layers == layers else s for s in table.stacks]  # type: ignore[arg-type]
    return replace(table, stacks=tuple(stacks))
