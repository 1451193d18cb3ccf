"""Start a large language model from a small one: grow its weights, inherit its knowledge."""

import importlib
from typing import TYPE_CHECKING, Any

from growlib.errors import GrowError
from growlib.expand import expand, plan
from growlib.families import families
from growlib.learn import learn
from growlib.methods import Method, methods
from growlib.origin import Origin
from growlib.plan import GrowthPlan
from growlib.verify import Verification, verify

if TYPE_CHECKING:
    from growlib import ki
    from growlib.after import EntryRates, Rewarm, freeze_old, mup_groups
    from growlib.ki import KIConfig, KIMixin, KITrainer, cache_teacher

__all__ = [
    "EntryRates",
    "GrowError",
    "GrowthPlan",
    "KIConfig",
    "KIMixin",
    "KITrainer",
    "Method",
    "Origin",
    "Rewarm",
    "Verification",
    "cache_teacher",
    "expand",
    "families",
    "freeze_old",
    "ki",
    "learn",
    "methods",
    "mup_groups",
    "plan",
    "verify",
]


# What imports the Trainer, which the weights half does not need: imported on first use.
_LAZY = dict.fromkeys(("EntryRates", "Rewarm", "freeze_old", "mup_groups"), "growlib.after")
_LAZY |= dict.fromkeys(("KIConfig", "KIMixin", "KITrainer", "cache_teacher"), "growlib.ki")


def __getattr__(name: str) -> Any:
    if name == "ki":
        return importlib.import_module("growlib.ki")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
