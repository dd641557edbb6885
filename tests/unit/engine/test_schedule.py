"""The learning rate of each step."""

import itertools

import pytest

from minima.engine.schedule import Schedule


def test_warm_up_then_cosine_to_a_share_of_the_peak():
    schedule = Schedule(total_steps=110, peak=4e-3, warmup_steps=10, kind="cosine", final_fraction=0.1)
    rates = [schedule.learning_rate(step) for step in range(110)]
    assert rates[0] == pytest.approx(4e-4) and rates[9] == rates[10] == pytest.approx(4e-3)
    assert rates[60] == pytest.approx(4e-3 * (0.1 + 0.9 / 2))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert schedule.learning_rate(110) == pytest.approx(4e-4), "the end is reached after the last step"


def test_linear_and_constant():
    linear = Schedule(10, 1.0, 0, "linear", 0.0)
    assert [linear.learning_rate(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    constant = Schedule(10, 1.0, 2, "constant", 0.0)
    assert [constant.learning_rate(step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
