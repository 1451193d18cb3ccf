"""How the teacher's weight α falls over training: pure functions of the progress t/T.
 Each function returns the shape of the schedule, 1 at the start; `KIConfig.alpha` scales it. `progress` is
the share of training that is done, `global_step / max_steps` in [0, 1], and `stop_at` the share from which α
is exactly 0.
"""

import math
from collections.abc import Callable


def linear(progress: float, stop_at: float) -> float:
    """max(0, 1 - progress / stop_at): arXiv 2105.13880, section 3, with α_T = 1 / stop_at."""
    return max(0.0, 1.0 - progress / stop_at)


def heaviside(progress: float, stop_at: float) -> float:
    """1 before `stop_at`, 0 from there: the hard switch of the paper's Figure 1b."""
    return 1.0 if progress < stop_at else 0.0


def constant(progress: float, stop_at: float | None) -> float:
    """1 before `stop_at`, or throughout where it is None (the paper's Figure 1b: α = 0.5 throughout)."""
    return 1.0 if stop_at is None else heaviside(progress, stop_at)


def cosine(progress: float, stop_at: float) -> float:
    """(1 + cos(π progress / stop_at)) / 2 before `stop_at`, 0 from there; not in the paper."""
    return 0.5 * (1.0 + math.cos(math.pi * progress / stop_at)) if progress < stop_at else 0.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear,
    "heaviside": heaviside,
    "constant": constant,
    "cosine": cosine,
}
