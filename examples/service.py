"""A workflow per HTTP request: parse the body, analyse the text in three branches, transform what they found.

The exit state decides the status of the answer: DONE is 200, INVALID 422, OVERLOADED 503; a run that uses up its budget is
504. The workflow is defined once, and each run gets a store of its own. A client that hangs up cancels its run.

Run it: python examples/service.py          (or: uvicorn --app-dir examples service:app)
Try it: curl -d '{"text": "one two two"}' localhost:8000/analyse
        curl localhost:8000/outcomes
"""

import argparse
import asyncio
import json
from collections import Counter
from enum import Enum, auto
from typing import Annotated, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cano import (
    JoinConfig,
    JoinStrategy,
    MemoryStore,
    Res,
    Run,
    SplitResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)

CAPACITY = 500  # runs at once


class State(Enum):
    PARSE = auto()
    ANALYSE = auto()
    TRANSFORM = auto()

    DONE = auto()
    INVALID = auto()
    OVERLOADED = auto()


STATUS = {State.DONE: 200, State.INVALID: 422, State.OVERLOADED: 503}

Store = Annotated[MemoryStore, Res("store")]

outcomes: Counter[str] = Counter()
running: set[Run[State]] = set()


async def parse(store: Store) -> Literal[State.ANALYSE, State.INVALID, State.OVERLOADED]:
    if store.get("crowded", bool):
        store.put("answer", {"error": "too many requests at once, try again later"})
        return State.OVERLOADED
    try:
        body = json.loads(store.get("body", bytes))
    except (ValueError, RecursionError):
        body = None
    match body:
        case {"text": str(text), "pause": int() | float() as pause} if 0 <= pause <= 60:
            store.put("pause", pause)
        case {"text": str(text), **rest} if "pause" not in rest:
            store.put("pause", 0)
        case _:
            store.put("answer", {"error": 'the body must be JSON like {"text": "one two two"}'})
            return State.INVALID
    store.put("words", text.lower().split())
    return State.ANALYSE


def count(store: Store) -> int:
    return len(store.get("words", list))


def frequent(store: Store) -> list[tuple[str, int]]:
    words: list[str] = store.get("words", list)
    return Counter(words).most_common(3)


async def summary(store: Store) -> str:
    await asyncio.sleep(store.get("pause"))  # stands for a call to a slow model
    words: list[str] = store.get("words", list)
    return " ".join(words[:5])


async def transform(store: Store, analysis: SplitResult) -> Literal[State.DONE]:
    store.put("answer", {branch.name: branch.value for branch in analysis.successes})
    return State.DONE


workflow = (
    Workflow[State](name="analyse")
    .register(State.PARSE, parse)
    .register_split(State.ANALYSE, [count, frequent, summary], JoinConfig(JoinStrategy.All, State.TRANSFORM))
    .register(State.TRANSFORM, transform)
    .add_exit_states(STATUS)
    .with_timeout(2)
)
workflow.validate()  # here, so that a mistake in the definition shows before the first request


async def analyse(request: Request) -> Response:
    store = MemoryStore()
    store.put("body", await request.body())
    store.put("crowded", len(running) >= CAPACITY)
    run = workflow.start(State.PARSE, resources={"store": store})
    running.add(run)
    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(cancel_when_gone(request, run))
        try:
            state = await run
            outcome, status, answer = state.name, STATUS[state], store.get("answer")
        except WorkflowTimeoutError as error:
            outcome, status, answer = "TIMED_OUT", 504, {"error": str(error)}
        except WorkflowCancelledError:
            outcome, status, answer = "CANCELLED", 499, None  # nobody is there to read it
        finally:
            running.discard(run)
            watcher.cancel()
    outcomes[outcome] += 1
    return JSONResponse(answer, status)


async def cancel_when_gone(request: Request, run: Run[State]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    run.cancel("the client hung up")


async def show_outcomes(_: Request) -> Response:
    return JSONResponse({"running": len(running), **outcomes})


app = Starlette(routes=[Route("/analyse", analyse, methods=["POST"]), Route("/outcomes", show_outcomes)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a workflow per request.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    uvicorn.run(app, port=parser.parse_args().port)


if __name__ == "__main__":
    main()
