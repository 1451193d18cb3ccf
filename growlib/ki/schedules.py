"""How the teacher's weight α falls over training: pure functions of the progress t/T.

`progress` is the share of training that is done, `global_step / max_steps` in [0, 1]. `stop_at` is the share from which
α is 0. A new schedule is one row in `SCHEDULES`, and its function where it needs one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from growlib.errors import GrowError


@dataclass(frozen=True)
class Schedule:
    """A function of the progress, and how it ends.

    Attributes:
        function: (progress, stop_at) -> factor of `KIConfig.alpha`, in [0, 1]; called before `stop_at` only.
        needs_stop_at: `stop_at` must be a number; False: it may be None, and the function ends by itself.
        stop_at: the value of `KIConfig.stop_at` where none is given.
    """

    function: Callable[[float, Any], float]
    needs_stop_at: bool = True
    stop_at: float | None = 1.0

    def __call__(self, progress: float, stop_at: float | None) -> float:
        """The factor of `KIConfig.alpha`; raises GrowError where the function returns no number in [0, 1]."""
        if stop_at is not None and progress >= stop_at:
            return 0.0
        factor = self.function(progress, stop_at)
        if not isinstance(factor, Real) or isinstance(factor, bool) or not 0 <= factor <= 1:
            raise GrowError(f"the schedule at progress {progress:g}", f"it returns {factor!r}", "a number in [0, 1]")
        return float(factor)


def linear(progress: float, stop_at: float) -> float:
    """1 - progress / stop_at: arXiv 2105.13880, section 3, with α_T = 1 / stop_at."""
    return 1.0 - progress / stop_at


def constant(progress: float, stop_at: float | None) -> float:
    """1. With its end the hard switch of the paper's Figure 1b, "heaviside"; without one its constant weight."""
    return 1.0


def cosine(progress: float, stop_at: float) -> float:
    """(1 + cos(π progress / stop_at)) / 2; not in the paper."""
    return 0.5 * (1.0 + math.cos(math.pi * progress / stop_at))


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(linear),
    "heaviside": Schedule(constant, stop_at=0.3),
    "constant": Schedule(constant, needs_stop_at=False, stop_at=None),
    "cosine": Schedule(cosine),
}


def schedule_of(schedule: Any) -> Schedule:
    """The schedule of a name, a `Schedule`, or a function of the progress; GrowError where it is none of them."""
    if isinstance(schedule, Schedule):
        return schedule
    if callable(schedule):
        return Schedule(lambda progress, _: schedule(progress), needs_stop_at=False, stop_at=None)
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule]
    valid = f"one of {', '.join(SCHEDULES)}, or a function of the progress"
    raise GrowError(f"KIConfig(schedule={schedule!r})", "there is no such schedule", valid)
