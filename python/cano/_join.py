"""How the branches of a split are joined."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

from . import _core
from ._config import Seconds
from ._core import Bulkhead, JoinStrategy
from ._errors import ConfigurationError, show

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class JoinConfig(Generic[S]):
    """When a split may go on, and where to.

    Attributes:
        strategy: A `JoinStrategy`: ``All``, ``Any``, ``Quorum(n)``, ``Percentage(p)``, ``PartialResults(n)`` or
            ``PartialTimeout``.
        next_state: The state that is entered once the strategy is reached.
        timeout: Seconds the join may stay undecided; None is no limit. When it passes, ``PartialTimeout`` goes on with the
            branches that have ended; every other strategy raises `JoinTimeoutError`.
        bulkhead: How many branches may be alive at once, 1 or more, or a `Bulkhead` whose slots they share with others;
            None is no limit. The others wait in branch order, and are never started once the join is decided.
        fail_fast: Whether a join that can no longer succeed cancels the branches in flight at once. By default it lets
            them end, so that every outcome is reported.
        hedge_after: Seconds, above 0, with ``Any`` alone: the branches start one by one. The first starts at once, the
            next one when the newest has run for so long, and one more at once for each that ends without success. The
            first success decides; a branch that has not been started by then counts as cancelled, and its task is never
            called. None starts all branches at once.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> JoinConfig(JoinStrategy.Quorum(3), "confirm").with_timeout(5).timeout
        5.0
        >>> JoinConfig(JoinStrategy.Any, "show", hedge_after=0.05).hedge_after
        0.05
    """

    strategy: JoinStrategy
    next_state: S
    timeout: Seconds | None = None
    bulkhead: int | Bulkhead | None = None
    fail_fast: bool = False
    hedge_after: Seconds | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, JoinStrategy):
            raise ConfigurationError(
                f"strategy must be a JoinStrategy, such as JoinStrategy.All or JoinStrategy.Quorum(2), "
                f"got {show(self.strategy)}"
            )
        if type(self.fail_fast) is not bool:
            raise ConfigurationError(f"fail_fast must be True or False, got {show(self.fail_fast)}")
        _check_bulkhead(self.bulkhead)
        try:
            hash(self.next_state)
        except TypeError:
            raise ConfigurationError(f"next_state must be hashable, got {show(self.next_state)}") from None
        object.__setattr__(self, "timeout", _core.seconds("timeout", self.timeout))
        object.__setattr__(self, "hedge_after", _core.seconds("hedge_after", self.hedge_after))
        if self.hedge_after == 0:
            raise ConfigurationError("hedge_after must be above 0, got 0; None starts all branches at once")
        if self.hedge_after is not None and self.strategy != JoinStrategy.Any:
            raise ConfigurationError(f"hedge_after needs the strategy JoinStrategy.Any, got {self.strategy!r}")

    def with_timeout(self, seconds: Seconds | None) -> Self:
        """A copy with another timeout; None is no limit."""
        return replace(self, timeout=seconds)

    def with_bulkhead(self, limit: int | Bulkhead | None) -> Self:
        """A copy with another bulkhead, of its own or shared; None is no limit."""
        return replace(self, bulkhead=limit)

    def with_hedge_after(self, seconds: Seconds | None) -> Self:
        """A copy whose branches start one by one, the next when the newest has run for `seconds`; None starts all at once."""
        return replace(self, hedge_after=seconds)

    def with_next_state(self, state: S) -> Self:
        """A copy that joins into another state."""
        return replace(self, next_state=state)


def _check_bulkhead(bulkhead: Any) -> None:
    if bulkhead is None or isinstance(bulkhead, Bulkhead):
        return
    if type(bulkhead) is not int or bulkhead < 1:
        raise ConfigurationError(f"bulkhead must be an int of at least 1, or a Bulkhead, got {show(bulkhead)}")
