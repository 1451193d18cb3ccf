"""Can a config of full size be planned with the table of a tiny model? From configs alone, without values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from growlib.architectures.schema import EXACT, Architecture, Growth, size_of
from growlib.checkpoint.loading import class_of, skeleton_of
from growlib.errors import GrowError
from growlib.growth import target_of
from growlib.growth_plan import Skeleton
from growlib.inference.verifier import growths
from growlib.operators import method
from growlib.planner import Request, make_plan


def not_planned(table: Architecture, config: PreTrainedConfig) -> dict[Growth, str]:
    """The growths that are exact on a tiny model and cannot be planned for this config, each with the reason.

    Whole multiples and depth alone: where they can be planned, the table knows all tensors.
    """
    exact = [g for g, verdict in (table.proven or {}).items() if verdict == EXACT and g.ratio != "x1.5"]
    unset = [axis.size for axis in table.axes.values() if size_of(axis.size, config) is None]
    if unset:
        return dict.fromkeys(exact, f"the default config does not say {', '.join(dict.fromkeys(unset))}")
    try:
        source = skeleton_of(class_of(config), config)
    except GrowError as error:
        return dict.fromkeys(exact, error.wrong)
    bare, options = replace(table, proven={}), dict(growths(table, config))
    wrongs = {growth: _wrong(bare, source, options[growth]) for growth in exact if growth in options}
    return {growth: wrong for growth, wrong in wrongs.items() if wrong}


def _wrong(table: Architecture, source: Skeleton, options: list[dict[str, Any]]) -> str:
    """Why none of the growths to these fields can be planned, that of the first one; "" where one can."""
    wrongs = []
    for fields in options:
        try:
            _plan(table, source, fields)
        except (GrowError, ValueError) as error:
            wrongs.append(error.wrong if isinstance(error, GrowError) else str(error))
        else:
            return ""
    return wrongs[0]


def _plan(table: Architecture, source: Skeleton, fields: Mapping[str, Any]) -> None:
    chosen = method("copies")
    target = target_of(source.config, table, fields, chosen)
    make_plan(Request(table, chosen, 0, source, skeleton_of(class_of(source.config), target)))
