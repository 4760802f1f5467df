"""A call guarded by the circuit breakers of others, each used as its documentation does.

Each function makes a loop of `calls` guarded calls, and the same loop of bare ones. pybreaker guards plain functions only (its
`call_async` is for Tornado), and holds its lock during the call. purgatory's documentation asks for the breaker before each
call, since its state may lie in Redis; "kept" asks once, which the store in memory allows. None of the three is told of a
cancellation, limits its probes or knows a late outcome from a present one.
"""

from collections.abc import Awaitable, Callable

Loop = Callable[[], Awaitable[str]]


def function() -> str:
    return "done"


async def coroutine() -> str:
    return "done"


def functions(calls: int) -> Loop:
    async def loop() -> str:
        result = ""
        for _ in range(calls):
            result = function()
        return result

    return loop


def coroutines(calls: int) -> Loop:
    async def loop() -> str:
        result = ""
        for _ in range(calls):
            result = await coroutine()
        return result

    return loop


def pybreaker(calls: int) -> tuple[Loop, Loop]:
    from pybreaker import CircuitBreaker  # noqa: PLC0415 - may not be installed

    breaker = CircuitBreaker()

    async def loop() -> str:
        result = ""
        for _ in range(calls):
            result = breaker.call(function)
        return result

    return loop, functions(calls)


def aiobreaker(calls: int) -> tuple[Loop, Loop]:
    from aiobreaker import CircuitBreaker  # noqa: PLC0415 - may not be installed

    breaker = CircuitBreaker()

    async def loop() -> str:
        result = ""
        for _ in range(calls):
            result = await breaker.call_async(coroutine)
        return result

    return loop, coroutines(calls)


def purgatory(calls: int) -> tuple[Loop, Loop]:
    from purgatory import AsyncCircuitBreakerFactory  # noqa: PLC0415 - may not be installed

    factory = AsyncCircuitBreakerFactory()

    async def loop() -> str:
        result = ""
        for _ in range(calls):
            async with await factory.get_breaker("payments"):
                result = await coroutine()
        return result

    return loop, coroutines(calls)


def purgatory_kept(calls: int) -> tuple[Loop, Loop]:
    from purgatory import AsyncCircuitBreakerFactory  # noqa: PLC0415 - may not be installed

    factory = AsyncCircuitBreakerFactory()

    async def loop() -> str:
        breaker = await factory.get_breaker("payments")
        result = ""
        for _ in range(calls):
            async with breaker:
                result = await coroutine()
        return result

    return loop, coroutines(calls)
