"""The schedules with a name, and those of one's own."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ki_tiny import examples, llama, parameters, train

from growlib import GrowError, KIConfig
from growlib.ki import SCHEDULES, Schedule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.0, 0.0]),
        ("heaviside", [1.0, 1.0, 1.0, 0.0, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 0.0, 0.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0, 0.0]),
    ],
)
def test_schedules_at_given_progress(name, expected):
    progress = [0.0, 0.1, 0.2, 0.4, 0.9]
    assert [SCHEDULES[name](p, 0.4) for p in progress] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@given(steps=st.integers(1, 1000), stop=st.integers(1, 1000))
def test_every_schedule_is_exactly_zero_from_stop_at(name, steps, stop):
    stop = min(stop, steps)
    assert SCHEDULES[name](stop / steps, stop / steps) == 0.0
    assert SCHEDULES[name]((stop - 1) / steps, stop / steps) > 0.0


def test_constant_without_stop_never_stops():
    assert SCHEDULES["constant"](1.0, None) == 1.0


@pytest.mark.parametrize(
    ("schedule", "stop_at"), [("linear", 1.0), ("cosine", 1.0), ("heaviside", 0.3), ("constant", None)]
)
def test_where_no_end_is_given(schedule, stop_at):
    assert KIConfig(teacher="x", schedule=schedule).stop_at == stop_at


@pytest.mark.parametrize(
    ("options", "stop_at", "expected"),
    [
        ({"schedule": lambda progress: 1 - progress**2}, None, [0.8, 0.6, 0.288]),
        ({"schedule": lambda progress: np.float32(0.5), "stop_at": 0.5}, 0.5, [0.4, 0.0, 0.0]),
        ({"schedule": lambda progress: 1, "stop_at": "auto"}, "auto", [0.8, 0.8, 0.8]),
        ({"schedule": Schedule(lambda progress, stop_at: (1 - progress / stop_at) ** 2)}, 1.0, [0.8, 0.2, 0.032]),
        ({"schedule": Schedule(lambda progress, stop_at: 0.25, stop_at=0.7)}, 0.7, [0.2, 0.2, 0.0]),
    ],
)
def test_a_schedule_of_ones_own_ends_where_it_says(options, stop_at, expected):
    ki = KIConfig(teacher="x", alpha=0.8, **options)
    assert ki.stop_at == stop_at
    assert [ki.alpha_at(progress) for progress in (0.0, 0.5, 0.8)] == pytest.approx(expected)


def test_a_schedule_that_needs_an_end_has_one():
    for schedule in (*(name for name in SCHEDULES if name != "constant"), Schedule(lambda progress, stop_at: 1.0)):
        with pytest.raises(GrowError, match="needs an end"):
            KIConfig(teacher="x", schedule=schedule, stop_at=None)


@pytest.mark.parametrize("value", [1.01, -1e-9, math.nan, math.inf, None, "1", True, 1j])
def test_a_value_that_is_no_weight_is_named_with_its_progress(value):
    ki = KIConfig(teacher="x", schedule=lambda progress: value if progress > 0.6 else 1.0)
    assert ki.alpha_at(0.6) == 1.0
    with pytest.raises(GrowError, match=r"at progress 0\.75: it returns .* a number in \[0, 1\]"):
        ki.alpha_at(0.75)
    with pytest.raises(GrowError, match="at progress 0:"):  # before anything is loaded
        KIConfig(teacher="x", schedule=lambda progress: value)


def test_training_follows_a_schedule_of_ones_own(tmp_path):
    """It is asked once per micro-batch, with the steps done over all steps; at 0 the teacher is gone."""
    asked = []

    def fade(progress):
        asked.append(progress)
        return max(0.0, 1 - 2 * progress)

    students = [llama(0), llama(0)]
    options = {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 2}
    for student, ki in zip(students, ({"schedule": fade}, {"stop_at": 0.5}), strict=True):
        trainer = train(tmp_path, student, KIConfig(teacher=llama(1), **ki), examples(16), **options)
    assert asked == [0.0, 0.0, 0.25, 0.5, 0.75]  # the first is the check of the settings
    assert (parameters(students[0]) == parameters(students[1])).all()
    assert [log["ki/alpha"] for log in trainer.state.log_history if "ki/alpha" in log] == [1.0, 0.5, 0.0, 0.0]


def test_settings_with_a_function_are_copied_and_compared():
    ki = KIConfig(teacher="x", schedule=abs, alpha=0.5)
    assert copy.deepcopy(ki) == ki == KIConfig(**dataclasses.asdict(ki))
    assert hash(ki) == hash(copy.copy(ki))
    other = dataclasses.replace(ki, alpha=0.25)
    assert (other.schedule, other.stop_at, other.alpha_at(0.5)) == (abs, None, 0.125)
