"""Inference of a family: read the table off a tiny model of the class, and let growths of it be the judge."""

from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.families.inference import variants
from growlib.families.inference.judge import followers, trial, verdicts
from growlib.families.inference.label import draft
from growlib.families.inference.tiny import class_of, tiny_config, tiny_model
from growlib.families.schema import Family


def infer(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> Family:
    """The table of a class, with the growths that were proven for it."""
    model_class = model_class or class_of(config)
    small = tiny_config(config, model_class)
    table = draft(tiny_model(model_class, small, spread=0.07))
    model = tiny_model(model_class, small)
    table = _first_exact(list(variants.of_hidden(table)), model, "hidden")
    if "expert_ffn" in table.axes:
        table = _first_exact(list(variants.of_pairs(table)), model, "expert_ffn")
    if any(axis.meets == "query" for axis in table.axes.values()):
        table = _first_exact(list(variants.of_head_dim(table, small)), model, "query")
    return replace(table, proven=verdicts(table, model))


def _first_exact(tables: list[Family], model: PreTrainedModel, axis: str) -> Family:
    """The first table under which the axis doubles exactly; the first of all where none does."""
    for table in tables:
        field = table.axes[axis].size.split()[0]
        fields = {field: 2 * getattr(model.config, field)} if hasattr(model.config, field) else {}
        fields |= followers(table, model.config, fields, heads=axis == "hidden")
        tried = trial(table, model, fields)
        if not tried.wrong and f"{axis} x2" in tried.grew:
            return table
    return tables[0]
