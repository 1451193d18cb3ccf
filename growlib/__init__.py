"""Start a large language model from a small one: grow its weights, inherit its knowledge."""

from growlib.errors import GrowError
from growlib.expand import expand, plan
from growlib.families import families
from growlib.methods import Method, methods
from growlib.plan import GrowthPlan
from growlib.verify import Verification, verify

__all__ = [
    "GrowError",
    "GrowthPlan",
    "Method",
    "Verification",
    "expand",
    "families",
    "methods",
    "plan",
    "verify",
]
