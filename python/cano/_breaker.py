"""What a circuit breaker tells about itself."""

from dataclasses import dataclass
from enum import Enum


class CircuitState(Enum):
    """What a circuit breaker does with calls; ``str()`` of a member is its value.

    - ``Closed``: every call is let through.
    - ``Open``: none is.
    - ``HalfOpen``: a few are, to find out.
    """

    Closed = "closed"
    Open = "open"
    HalfOpen = "half-open"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitSnapshot:
    """A circuit breaker at one moment.

    Attributes:
        state: The state.
        is_forced: Whether it is open by ``force_open()``, that is until ``reset()``.
        calls: How many calls count towards opening: the present failures in a row, or those in the window; 0 unless closed.
        failures: How many of them failed.
        slow_calls: How many of them were slow calls.
        probes: How many probes are in flight; 0 unless half-open.
        successes: How many probes have succeeded since it became half-open; 0 unless half-open.
        retry_after: Seconds until a call is let through; 0.0 if the next one is; None if only ``reset()`` ends that.
    """

    state: CircuitState
    is_forced: bool
    calls: int
    failures: int
    slow_calls: int
    probes: int
    successes: int
    retry_after: float | None
