"""Means of a tally: divided at the end, over everything that was counted."""

import pytest

from grpo_ds.core.tally import Tally


def test_the_mean_of_unequal_parts_is_the_mean_of_the_whole():
    tally = Tally()
    tally.add("length", 30, 3)  # three observations of 10
    tally.add("length", 2, 1)  # one of 2; the average of averages would be 6
    assert tally.means()["length"] == 8


def test_ranks_exchange_sums_and_counts():
    one, two = Tally(), Tally()
    one.add_all({"b": [1.0, 3.0], "a": [0.0]})
    two.add_all({"a": [6.0, 6.0, 4.0], "b": [2.0]})
    assert one.means(one.as_tensor() + two.as_tensor()) == pytest.approx({"a": 4.0, "b": 2.0})


def test_a_name_without_observations_is_zero_not_a_crash():
    tally = Tally()
    tally.add_all({"none": []})
    assert tally.means() == {"none": 0.0}
