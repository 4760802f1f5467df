"""Every example is true: the Python blocks of README.md and docs/, and the doctests of the public names, are executed.

The blocks of a page run in order and share a namespace, as a reader would type them into one file. ``asyncio.run`` in a block
uses the virtual clock, so examples may sleep as long as they like.
"""

import ast
import asyncio
import doctest
import enum
import inspect
import re
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cano
import cano.testing
from cano.testing import VirtualClockLoop

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```python\b[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """One Markdown file: its blocks in order, and the module in which they run."""

    path: Path
    blocks: list[tuple[int, str]] = field(default_factory=list)
    done: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            line = text.count("\n", 0, fence.start("code")) + 1
            self.blocks.append((line, textwrap.dedent(fence["code"])))
        self.module = types.ModuleType("__main__")

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def run(self, index: int) -> None:
        """Run the block, and before it those before it that have not run yet."""
        while self.done <= index:
            line, code = self.blocks[self.done]
            self.done += 1
            # Empty lines put each line where it is in the file, for the traceback.
            compiled = compile("\n" * (line - 1) + code, str(self.path), "exec", dont_inherit=True)
            exec(compiled, vars(self.module))  # noqa: S102 - this is the test


PAGES = [Page(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]
BLOCKS = [
    pytest.param(page, index, id=f"{page.name}:{line}") for page in PAGES for index, (line, _) in enumerate(page.blocks)
]


@pytest.mark.parametrize(("page", "index"), BLOCKS)
def test_block_of_a_page_runs(
    page: Page, index: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A Python block of the documentation runs as it stands, after the blocks above it, in a folder of the page's own."""
    page.folder = page.folder or tmp_path_factory.mktemp(page.path.stem)
    monkeypatch.chdir(page.folder)
    monkeypatch.setitem(sys.modules, "__main__", page.module)
    monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualClockLoop)
    monkeypatch.setattr(sys, "argv", [str(page.path)])

    page.run(index)


def test_pages_are_found() -> None:
    """The cancellation contract is among the pages, and its examples among the blocks."""
    blocks = {page.name: len(page.blocks) for page in PAGES}

    assert "README.md" in blocks
    assert blocks["docs/cancellation.md"] >= 7


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        pytest.param("```python\na = 1\n```\n", [(2, "a = 1\n")], id="plain"),
        pytest.param("x\n\n```python title='t'\na = 1\nb = 2\n```", [(4, "a = 1\nb = 2\n")], id="with an attribute"),
        pytest.param("- x\n\n  ```python\n  if a:\n      b\n  ```\n", [(4, "if a:\n    b\n")], id="in a list"),
        pytest.param("```console\n$ make\n```\n```text\nx\n```\n", [], id="other languages"),
        pytest.param("```python\na\n```\n\n```python\nb\n```\n", [(2, "a\n"), (6, "b\n")], id="two"),
    ],
)
def test_blocks_of_a_page_know_their_lines(tmp_path: Path, text: str, blocks: list[tuple[int, str]]) -> None:
    """A block is found with its first line's number, wherever it stands; other languages are left alone."""
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")

    page = Page(path)

    assert page.blocks == blocks


# --- docstrings ------------------------------------------------------------------------------------------------------


def examples() -> Iterator[Any]:
    """One parameter for each public docstring that has examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in (cano, cano.testing):
        names = vars(module) | {"asyncio": asyncio, "cano": cano, "enum": enum, "threading": threading}
        for name in ["", *module.__all__]:
            thing = getattr(module, name) if name else module
            if name and not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            qualified = f"{module.__name__}.{name}".rstrip(".")
            found = finder.find(thing, qualified, module=False, globs=dict(names)) if name else []
            if not name and module.__doc__:
                found = [doctest.DocTestParser().get_doctest(module.__doc__, dict(names), qualified, None, None)]
            for test in found:
                if test.examples:
                    yield pytest.param(test, id=test.name)
    yield from stub_examples(names | vars(cano))


def stub_examples(names: dict[str, Any]) -> Iterator[Any]:
    """The same for the native classes, whose docstrings stand in the stub."""
    stub = ast.parse((ROOT / "python" / "cano" / "_core.pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        for part in ast.walk(node) if isinstance(node, ast.ClassDef) and node.name in cano.__all__ else ():
            text = ast.get_docstring(part) if isinstance(part, ast.ClassDef | ast.FunctionDef) else None
            name = f"cano.{node.name}" + ("" if part is node else f".{getattr(part, 'name', '')}")
            test = doctest.DocTestParser().get_doctest(text or "", dict(names), name, None, None)
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_example_in_a_docstring_is_true(
    example: doctest.DocTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The examples of a public docstring give what they say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualClockLoop)
    report: list[str] = []

    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)

    assert result.failed == 0, "".join(report)


def test_examples_in_docstrings_are_found() -> None:
    """Functions, classes and methods of the package show examples."""
    names = {param.values[0].name for param in examples()}

    assert {"cano.Workflow", "cano.Workflow.task", "cano.TaskConfig", "cano.JoinConfig", "cano.in_thread"} <= names
    assert {"cano.testing.run", "cano.RateLimiter", "cano.RetryMode.fixed"} <= names
