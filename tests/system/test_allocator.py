"""The allocator's setting: expandable segments, unless the user has chosen something."""

import os

import pytest

from grpo_ds.system import ranks
from grpo_ds.system.allocator import EXPANDABLE, VARIABLES, use_expandable_segments


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)


def test_segments_are_expandable_when_cuda_starts(monkeypatch):
    def started(device):
        raise InterruptedError(os.environ[VARIABLES[0]])

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", started)
    with pytest.raises(InterruptedError, match=EXPANDABLE):
        ranks.start()


@pytest.mark.parametrize("name", VARIABLES)
def test_a_setting_of_the_user_stays_alone(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments()
    assert {other: os.environ[other] for other in VARIABLES if other in os.environ} == {name: "max_split_size_mb:128"}
