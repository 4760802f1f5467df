"""`versus`: contenders measured side by side, so that a ratio is of one process, one minute and one state of the machine.

A benchmark names its contenders, ours first. They are measured in rounds: in every round each takes its turn, in an order
shuffled anew, with the garbage collector off. Where other work slows the machine down it slows a whole round, and the ratios
within the round stay what they were; the report takes their median. pytest-benchmark records ours; the samples of all, per
operation and in the order of the rounds, go to ``extra_info`` and from there into its JSON, which `report` reads.

The clock is the CPU time of the thread, read inside the coroutine: neither waiting nor entering the loop is in a sample.
pytest-benchmark's own statistics are per sample, and entering the loop is in them. What a call needs beforehand, such as the
futures that its branches await, is prepared inside the loop and not timed.
"""

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from time import perf_counter, thread_time
from typing import Any, TypeVar

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches import report

Contender = Callable[[], Awaitable[Any]]
Prepare = Callable[[], object]
LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Sampler = Callable[[], float]
Samples = dict[str, list[float]]

_T = TypeVar("_T")

_SECONDS = 1.2
"""CPU time for the rounds of one benchmark, within the fewest and the most rounds."""

_MOST_SECONDS = 3.0
"""Wall time for them: those that wait for timers need little CPU time."""

_FEWEST, _MOST = 11, 150

_results = pytest.StashKey[list[dict[str, Any]]]()
_environment = pytest.StashKey[dict[str, str]]()


class Versus:
    """Measures contenders, the first of them by way of pytest-benchmark."""

    def __init__(self, benchmark: BenchmarkFixture, section: str, results: list[dict[str, Any]]) -> None:
        self._benchmark = benchmark
        self._section = section
        self._results = results

    def __call__(
        self,
        title: str,
        contenders: Mapping[str, Contender],
        *,
        returns: object,
        calls: int = 1,
        per: int = 1,
        prepare: Prepare | None = None,
        loop_factory: LoopFactory | None = None,
    ) -> None:
        """Compare the CPU time of an operation.

        Args:
            title: What the report calls the benchmark.
            contenders: Coroutine functions by name.
            returns: What each of them must return.
            calls: How many calls make a sample; a sample should take a millisecond or more.
            per: How many operations a call is.
            prepare: Called in the loop before each call; its time is not taken.
            loop_factory: Makes the loop, instead of asyncio.
        """

        def sample(runner: asyncio.Runner, contender: Contender) -> float:
            return _sample(runner, contender, returns=returns, calls=calls, per=per, prepare=prepare)

        self._record(title, "s", self._measure(contenders, sample, loop_factory))

    def growing(
        self, title: str, contenders: Mapping[str, tuple[int, Contender, Prepare | None]], *, returns: object
    ) -> None:
        """Compare the CPU time of an operation where one call is so many of them, and each sample as many as the largest.

        Each contender comes with its number, and with what prepares a call. It returns a list of so many `returns`.
        """
        largest = max(per for per, _, _ in contenders.values())

        def sample(runner: asyncio.Runner, sized: tuple[int, Contender, Prepare | None]) -> float:
            per, contender, prepare = sized
            return _sample(runner, contender, returns=[returns] * per, calls=largest // per, per=per, prepare=prepare)

        self._record(title, "s", self._measure(contenders, sample))

    def added(
        self, title: str, contenders: Mapping[str, tuple[Contender, Contender]], *, returns: object, per: int = 1
    ) -> None:
        """Compare what something adds to an operation: each contender comes with it and without."""
        turns = {name: with_it for name, (with_it, _) in contenders.items()}
        turns |= {f"{name}, without": without for name, (_, without) in contenders.items()}
        samples = self._measure(turns, partial(_sample, returns=returns, calls=1, per=per))
        pairs = {name: zip(samples[name], samples[f"{name}, without"], strict=True) for name in contenders}
        self._record(title, "s", {name: [one - other for one, other in pair] for name, pair in pairs.items()})

    def sampled(self, title: str, samplers: Mapping[str, Sampler], *, unit: str, rounds: int) -> None:
        """Compare what the samplers return, each of which measures by its own means: seconds ("s") or bytes ("B")."""
        self._record(title, unit, self._play(samplers, fewest=rounds, most=rounds))

    def _measure(
        self,
        contenders: Mapping[str, _T],
        sample: Callable[[asyncio.Runner, _T], float],
        loop_factory: LoopFactory | None = None,
    ) -> Samples:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return self._play({name: partial(sample, runner, contender) for name, contender in contenders.items()})

    def _play(self, samplers: Mapping[str, Sampler], *, fewest: int = _FEWEST, most: int = _MOST) -> Samples:
        ours, *others = samplers
        order = [ours, *others]
        samples: Samples = {}
        shuffle = random.Random(1).shuffle

        def play(*names: str) -> None:
            for name in names:
                samples.setdefault(name, []).append(samplers[name]())

        def play_up_to_ours() -> None:
            gc.collect()
            shuffle(order)
            play(*order[: order.index(ours)])

        def play_after_ours() -> None:
            play(*order[order.index(ours) + 1 :])

        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            began, began_wall = thread_time(), perf_counter()
            play(*others)
            if self._benchmark.disabled:
                self._benchmark.pedantic(partial(play, ours))
                return samples
            play(ours)
            samples.clear()  # that was to warm up
            affordable = min(_SECONDS / (thread_time() - began), _MOST_SECONDS / (perf_counter() - began_wall))
            rounds = min(max(fewest, int(affordable)), most)
            self._benchmark.pedantic(
                partial(play, ours), setup=play_up_to_ours, teardown=play_after_ours, rounds=rounds
            )
        finally:
            gc.enable()
            gc.unfreeze()
        return {name: samples[name] for name in samplers}

    def _record(self, title: str, unit: str, samples: Samples) -> None:
        result = {"section": self._section, "title": title, "unit": unit, "samples": samples}
        if self._benchmark.enabled:
            self._benchmark.extra_info.update(result)
            self._results.append(result)


def _sample(
    runner: asyncio.Runner,
    contender: Contender,
    *,
    returns: object,
    calls: int,
    per: int,
    prepare: Prepare | None = None,
) -> float:
    timed = _cpu_time(contender, calls) if prepare is None else _cpu_time_prepared(contender, calls, prepare)
    seconds, result = runner.run(timed)
    assert result == returns
    return seconds / (calls * per)


async def _cpu_time(contender: Contender, calls: int) -> tuple[float, Any]:
    result = None
    began = thread_time()
    for _ in range(calls):
        result = await contender()
    return thread_time() - began, result


async def _cpu_time_prepared(contender: Contender, calls: int, prepare: Prepare) -> tuple[float, Any]:
    result, seconds = None, 0.0
    for _ in range(calls):
        prepare()
        began = thread_time()
        result = await contender()
        seconds += thread_time() - began
    return seconds, result


@pytest.fixture
def versus(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Versus:
    return Versus(benchmark, request.path.stem.removeprefix("test_"), request.config.stash[_results])


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []
    config.stash[_environment] = report.environment() | {"load before": report.load()}


def _environment_now(config: pytest.Config) -> dict[str, str]:
    return config.stash[_environment] | {"load after": report.load()}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["environment"] = _environment_now(config)


def pytest_benchmark_group_stats(config: pytest.Config) -> list[Any] | None:
    """Leave the table to our own: it compares with opponents, not with the fastest benchmark of all."""
    return None if config.getoption("benchmark_compare") else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_results]
    if results and not config.getoption("benchmark_json"):
        terminalreporter.write(f"\n{report.text(_environment_now(config), results)}")
