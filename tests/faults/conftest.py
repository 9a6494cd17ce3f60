"""Counts of the faults that were tried; `make test-faults` prints them as a table at its end."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forks import apart, warm_process

COUNTS: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="session")
def tried() -> Callable[[str, str], None]:
    """Count a fault after its assertions: tried("kill -9 while saving", "survived")."""

    def count(kind: str, outcome: str) -> None:
        COUNTS[kind][outcome] += 1

    return count


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (worker := getattr(session.config, "workeroutput", None)) is not None:  # one of several worker processes
        worker["tried"] = {kind: dict(outcomes) for kind, outcomes in COUNTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for kind, outcomes in getattr(node, "workeroutput", {}).get("tried", {}).items():
        COUNTS[kind].update(outcomes)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COUNTS:
        return
    width = max(map(len, COUNTS))
    terminalreporter.section("faults tried")
    for kind, outcomes in COUNTS.items():
        parts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        terminalreporter.line(f"{kind:<{width}}  {sum(outcomes.values()):>4}: {parts}")
