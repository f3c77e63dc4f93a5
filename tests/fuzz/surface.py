"""A surface to fuzz: cases that hypothesis draws, and a check that must pass for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Surface:
    """Something that takes data from outside.

    Attributes:
        cases: what may come.
        check: raises if what comes of a case is not right.
        daily: cases a day in CI.
    """

    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    daily: int

    def run(self, count: int, seed: int, seconds: float = float("inf")) -> int:
        """Check `count` cases, or one and as many more as there is time for; returns how many.

        Raises:
            Exception: of the smallest case that fails, which is printed.
        """
        end, done = float("inf"), 0

        def check(case: Any) -> None:
            nonlocal end, done
            if not done:  # making what the first case is drawn from is not counted
                end = time.monotonic() + seconds
            if time.monotonic() < end:
                done += 1
                self.check(case)

        settings = hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )
        hypothesis.seed(seed)(settings(hypothesis.given(self.cases)(check)))()
        return done


def today() -> int:
    """The seed of the day (UTC)."""
    return int(datetime.now(UTC).strftime("%Y%m%d"))


def in_words(error: Exception) -> None:
    """An error for people says something."""
    assert str(error).strip(), f"a {type(error).__name__} without words"
