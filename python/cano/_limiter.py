"""How a call waits for its limiters: the one thing about them that is a coroutine."""

from typing import Any

from . import _core


async def acquire(limiter: _core.Limiter | _core.MultiRateLimiter, charge: Any) -> None:
    """Take what is asked for, in the order of the line; nothing suspends where it can be taken at once."""
    call = limiter._enter(charge)
    if call is None:
        return
    try:
        while (turn := call.turn()) is not None:
            await turn
    except BaseException:
        call.leave()
        raise
