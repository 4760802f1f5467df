"""A stream: readings of a sensor, averaged over each half of a second, until the run's time is up.

What is open at the end is not lost: it is flushed before the run is over.

Run it: python examples/stream.py
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from enum import Enum, auto

from cano import Continue, ItemErrorPolicy, StreamProgress, StreamTask, StreamWindow, Workflow, WorkflowTimeoutError


class State(Enum):
    MEASURE = auto()
    DONE = auto()


class Average(StreamTask[State]):
    window = StreamWindow.Duration(0.5)
    on_item_error = ItemErrorPolicy.Skip

    async def open(self, _cursor: None) -> AsyncIterator[tuple[int, str]]:
        readings = [(0.1, "21.0"), (0.1, "21.5"), (0.4, "21.8"), (0.1, "----"), (0.4, "22.1"), (0.1, "22.0")]
        for number, (pause, text) in enumerate(readings, 1):
            await asyncio.sleep(pause)
            yield number, text
        await asyncio.sleep(3600)  # the sensor has fallen silent

    def process_item(self, item: tuple[int, str]) -> tuple[float, int]:
        number, text = item
        return float(text), number

    async def flush_window(self, outputs: list[float]) -> type[Continue]:
        print(f"average of {len(outputs)}: {sum(outputs) / len(outputs):.1f}")
        return Continue

    def on_close(self, reason: str, progress: StreamProgress) -> State:
        print(f"{reason} after number {progress.cursor}, {progress.skipped} skipped")
        return State.DONE


def main() -> None:
    logging.getLogger("cano").setLevel(logging.ERROR)  # the reading that is skipped is a warning there
    workflow = Workflow[State]().register_stream(State.MEASURE, Average()).add_exit_state(State.DONE)
    try:
        asyncio.run(workflow.orchestrate(State.MEASURE, timeout=1.4))
    except WorkflowTimeoutError as error:
        print(type(error).__name__)


if __name__ == "__main__":
    main()
