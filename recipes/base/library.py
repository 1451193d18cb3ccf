"""What the recipes take from inside growlib, in one place: its public face does not promise these names."""

from growlib.checkpoint.loading import class_like
from growlib.checkpoint.loading import load as load_checkpoint
from growlib.operators import method as method_named

__all__ = ["class_like", "load_checkpoint", "method_named"]
