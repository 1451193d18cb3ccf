"""Does a config field act? A tiny model of the class is asked: built with the old value and with the new one."""

import logging
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.inference.tiny import tiny_config, tiny_model
from growlib.outputs import distance, every_input, outputs
from growlib.parts import flat, rebuilt

Effect = Literal["acts", "silent", "unknown"]
SMALL = 3  # what a large number is tried as: a window that is longer than the inputs would hide what it does


def effect_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, field: str, old: Any, new: Any) -> Effect:
    """Whether a change of a field changes any shape or output of a tiny model, or is never read.

    A number that is read is tried as it is and small; without a difference it is silent. What else is read and makes
    no difference on short inputs may still make one on others: unknown.
    """
    pairs = [(old, new)]
    numbers = all(type(value) is int for value in (old, new))
    if numbers and min(old, new) > SMALL:
        pairs.append((SMALL, max(SMALL + 1, round(SMALL * new / old))))
    try:
        small = tiny_config(config, model_class)
        results = [_differ(model_class, small, field, *pair) for pair in pairs]
    except Exception as error:  # whatever a class of transformers raises on such a value
        logging.getLogger("growlib").debug("%s was not tried: %s", field, error)
        return "unknown"
    if any(differs for differs, _ in results):
        return "acts"
    return "silent" if numbers or not any(was_read for _, was_read in results) else "unknown"


def _differ(
    model_class: type[PreTrainedModel], small: PreTrainedConfig, field: str, old: Any, new: Any
) -> tuple[bool, bool]:
    """Whether two tiny models that differ in a field differ in a shape or an output, and whether the field was read."""
    read: set[str] = set()
    configs = [rebuilt(small, {**flat(small), field: value}) for value in (old, new)]
    models = [tiny_model(model_class, _spied(config, read)) for config in configs]
    shapes = [[(name, p.shape) for name, p in model.named_parameters()] for model in models]
    if shapes[0] != shapes[1]:
        return True, True
    inputs = every_input(models[0])
    apart = [distance(outputs(models[0], given), outputs(models[1], given)) for given in inputs]
    return any(each.absolute > 0 for each in apart), field in read


def _spied(config: PreTrainedConfig, read: set[str]) -> PreTrainedConfig:
    """The config, and the names of the fields that are read of it from now on."""
    kind = type(config)

    def look_up(self: PreTrainedConfig, name: str) -> Any:
        read.update((name, kind.attribute_map.get(name, name)))
        return kind.__getattribute__(self, name)

    config.__class__ = type(kind.__name__, (kind,), {"__getattribute__": look_up})
    return config
