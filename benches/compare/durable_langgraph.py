"""Durable steps of LangGraph with its AsyncSqliteSaver: seconds per step, of so many threads of ten nodes at once.

Run it: python benches/compare/durable_langgraph.py 100
"""

import asyncio
import sys
import tempfile
from time import perf_counter
from typing import TypedDict

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

STEPS = 10


class State(TypedDict):
    number: int


async def step(state: State) -> State:
    return {"number": state["number"] + 1}


async def measure(runs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncSqliteSaver.from_conn_string(f"{folder}/runs.db") as saver:
            graph = StateGraph(State)
            last = START
            for number in range(STEPS):
                name = f"step {number}"
                graph.add_node(name, step)
                graph.add_edge(last, name)
                last = name
            graph.add_edge(last, END)
            compiled = graph.compile(checkpointer=saver)

            def run(thread: int) -> object:
                options = {"configurable": {"thread_id": str(thread)}}
                return compiled.ainvoke({"number": 0}, options, durability="sync")

            await run(-1)
            began = perf_counter()
            await asyncio.gather(*map(run, range(runs)))
            return (perf_counter() - began) / (runs * STEPS)


if __name__ == "__main__":
    print(asyncio.run(measure(int(sys.argv[1]))))
