"""Start a large language model from a small one: grow its weights, inherit its knowledge."""

import importlib
from typing import TYPE_CHECKING, Any

from growlib.errors import GrowError
from growlib.expand import expand, plan
from growlib.families import families
from growlib.methods import Method, methods
from growlib.plan import GrowthPlan
from growlib.verify import Verification, verify

if TYPE_CHECKING:
    from growlib import ki
    from growlib.ki import KIConfig, KIMixin, KITrainer, cache_teacher

__all__ = [
    "GrowError",
    "GrowthPlan",
    "KIConfig",
    "KIMixin",
    "KITrainer",
    "Method",
    "Verification",
    "cache_teacher",
    "expand",
    "families",
    "ki",
    "methods",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import `growlib.ki` on first use: it imports the Trainer, which the weights half does not need."""
    if name not in {"KIConfig", "KIMixin", "KITrainer", "cache_teacher", "ki"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ki = importlib.import_module("growlib.ki")
    return ki if name == "ki" else getattr(ki, name)
