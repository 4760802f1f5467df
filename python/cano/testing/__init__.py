"""Helpers for testing: a clock that jumps, checks that nothing is left running, and a suite for checkpoint stores.

All but the last need nothing but asyncio, so they also test code that does not use cano.
"""

from ._clock import ClockStalledError, VirtualClockLoop, real_time, run
from ._leaks import assert_no_orphans, no_orphans
from ._stores import StoreCheck, checkpoint_store_suite

__all__ = [
    "ClockStalledError",
    "StoreCheck",
    "VirtualClockLoop",
    "assert_no_orphans",
    "checkpoint_store_suite",
    "no_orphans",
    "real_time",
    "run",
]

for _public in __all__:
    globals()[_public].__module__ = __name__
