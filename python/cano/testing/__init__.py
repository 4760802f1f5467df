"""Helpers for testing asyncio code: a clock that jumps, and checks that nothing is left running.

They need nothing but asyncio, so they also test code that does not use cano.
"""

from ._clock import ClockStalledError, VirtualClockLoop, real_time, run
from ._leaks import assert_no_orphans, no_orphans

__all__ = [
    "ClockStalledError",
    "VirtualClockLoop",
    "assert_no_orphans",
    "no_orphans",
    "real_time",
    "run",
]

for _public in (ClockStalledError, VirtualClockLoop, assert_no_orphans, no_orphans, real_time, run):
    _public.__module__ = __name__
