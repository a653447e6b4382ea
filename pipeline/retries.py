"""When a failed event is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .channel import is_count, is_time
from .errors import LONGEST_DELAY, ConfigurationError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    attempts  all calls of the handler for one event, the first included; after the last it becomes a dead letter
    base      seconds; the n-th retry waits a random time up to base · 2^(n−1)
    cap       seconds; no retry waits longer
    """

    attempts: int = 5
    base: float = 0.2
    cap: float = 60.0

    def __post_init__(self) -> None:
        times = all(is_time(seconds) and seconds < LONGEST_DELAY for seconds in (self.base, self.cap))
        if not (is_count(self.attempts) and times):
            raise ConfigurationError(
                f"{self!r}: attempts is a whole number, at least 1; base and cap are in seconds, not negative and less "
                "than ten years"
            )

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` failed."""
        return random.uniform(0, min(self.cap, self.base * 2 ** min(attempt - 1, 60)))
