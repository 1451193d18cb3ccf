"""Start a large language model from a small one: grow its weights, inherit its knowledge."""

from growlib.errors import GrowError

__all__ = ["GrowError"]
