"""Start a large language model from a small one: grow its weights, inherit its knowledge."""

import importlib
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401
if TYPE_CHECKING:  # for the type checker, which does not run __getattr__
    from growlib import ki
    from growlib.architectures import families
    from growlib.errors import GrowError
    from growlib.growth import expand, plan
    from growlib.growth_plan import GrowthPlan
    from growlib.growth_schedule import GrowthSchedule
    from growlib.inference import infer
    from growlib.ki import KIConfig, KIMixin, KITrainer, cache_teacher
    from growlib.learning import learn
    from growlib.maps import AxisMap, LayerMap
    from growlib.operators import Method, methods, register
    from growlib.origin import Origin
    from growlib.record import GrowthRecord
    from growlib.streaming import expand_checkpoint
    from growlib.tensor_check import TensorCheck, verify_tensors
    from growlib.training import EntryRates, Rewarm, freeze_old, mup_groups
    from growlib.training_checkpoint import expand_training_checkpoint
    from growlib.verification import Verification, verify

# Each public name and where it stands: imported on first use, so that `growlib --help` need not wait for torch.
_PLACES = {
    "AxisMap": "maps",
    "EntryRates": "training",
    "GrowError": "errors",
    "GrowthPlan": "growth_plan",
    "GrowthRecord": "record",
    "GrowthSchedule": "growth_schedule",
    "KIConfig": "ki",
    "KIMixin": "ki",
    "KITrainer": "ki",
    "LayerMap": "maps",
    "Method": "operators",
    "Origin": "origin",
    "Rewarm": "training",
    "TensorCheck": "tensor_check",
    "Verification": "verification",
    "cache_teacher": "ki",
    "expand": "growth",
    "expand_checkpoint": "streaming",
    "expand_training_checkpoint": "training_checkpoint",
    "families": "architectures",
    "freeze_old": "training",
    "infer": "inference",
    "learn": "learning",
    "methods": "operators",
    "mup_groups": "training",
    "plan": "growth",
    "register": "operators",
    "verify": "verification",
    "verify_tensors": "tensor_check",
}
__all__ = ["ki", *_PLACES]


def __getattr__(name: str) -> Any:
    if name == "ki":
        return importlib.import_module("growlib.ki")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"growlib.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
