"""Progress of long work as text: printed in a file whenever nothing else was printed for half a minute.

No thread prints: the work itself calls `advance`, so a line comes between two tokens or two backwards, never within a
write of the main thread, a fork or a signal handler. A prefill or a single backward is silent, however long it takes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

SILENCE = 30.0  # seconds without a line after which progress is printed
Advance = Callable[[int, int], None]  # (units done, tokens) since the last call


@dataclass(slots=True)
class Work:
    """A piece of work and how much of it is done.

    Example: 24 of 89 questions were answered in 47 seconds, with 1457 tokens.
        >>> Work("Evaluation", 89, "questions", done=24, tokens=1457).text(47.0)
        'Evaluation: 24 of 89 questions, 31 tokens/s, about 3 min left'
    """

    name: str
    total: int
    unit: str
    most_tokens: int = 0  # at the length limit of every completion; 0: not shown
    done: int = 0
    tokens: int = 0

    def add(self, done: int, tokens: int) -> None:
        self.done = min(self.done + done, self.total)  # ranks with unequal shares are counted as equal
        self.tokens += tokens

    def text(self, seconds: float) -> str:
        """Describe the work after `seconds`. The time left supposes that the rest goes as fast."""
        if not (self.done or self.tokens):
            return f"{self.name}: {self.total} {self.unit} to do"
        tokens = f", {self.tokens} of at most {self.most_tokens} tokens" if self.most_tokens else ""
        rate = f", {self.tokens / seconds:.0f} tokens/s" if self.tokens and seconds else ""
        going = 0 < self.done < self.total
        left = f", about {ceil(seconds * (self.total / self.done - 1) / 60)} min left" if going else ""
        return f"{self.name}: {self.done} of {self.total} {self.unit}{tokens}{rate}{left}"


class ProgressLines:
    """Knows the time: follows work, and prints its progress after SILENCE."""

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        """say: prints a line. now: a clock, in seconds."""
        self._say, self._now = say, now
        self._printed = now()
        self._work: tuple[Work, float] | None = None  # and when it began

    def printed(self) -> None:
        """Note that something was printed, so that progress waits."""
        self._printed = self._now()

    @contextmanager
    def follow(self, work: Work, *, announce: bool = False) -> Iterator[Advance]:
        """Follow `work` until the block ends; yields `advance`. announce: say at once what begins."""

        def advance(done: int, tokens: int) -> None:
            work.add(done, tokens)
            if self._now() - self._printed >= SILENCE:
                show()

        def show() -> None:
            self.printed()
            self._say(self.text())

        self._work = work, self._now()
        try:
            show() if announce else advance(0, 0)  # after a silence, say what begins
            yield advance
        finally:
            self._work = None

    def text(self) -> str:
        """Progress of the work that is going on; "" if there is none."""
        if not (current := self._work):
            return ""
        work, began = current
        return work.text(self._now() - began)
