"""Fixtures of the faults; tests/conftest.py counts them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forks import apart, warm_process


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[..., Any]]:
    """Return warm(function, *arguments), which runs in a fork of a process that has loaded everything."""
    with warm_process() as process:
        yield lambda function, *arguments: process.submit(apart, function, *arguments).result()


@pytest.fixture(scope="session")
def straight(warm, tiny_folder, tmp_path_factory) -> Path:
    """Folder of an undisturbed run."""
    from tests.faults.launched import flags, train_to_the_end

    folder = tmp_path_factory.mktemp("straight")
    warm(train_to_the_end, flags(tiny_folder, folder / "run"), folder / "log")
    return folder / "run"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("faults")
