"""The terminal, as all of the suite writes to it.

    keys, reasons, captions, paths, messages ──▶ `printable`, `Console`, `Progress`, `logger` ──▶ stdout, stderr

Text out of shards, files and models is untrusted. It may hold rich markup, emoji codes, escape sequences that move the
cursor or set the window's title, carriage returns, or code points that turn the direction of writing or that no
encoding knows. So a `str` is words, never markup, and one line wherever it is printed: what could act on a terminal
appears as �. A style is given by `styled`, and text of several lines by `paragraph`. ``tests/test_terminal.py`` finds
modules that print in another way.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, LiteralString, TypeVar

import rich.console
import rich.progress
from rich.console import ConsoleOptions, OverflowMethod, RenderableType
from rich.progress import BarColumn, ProgressColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.protocol import is_renderable
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

T = TypeVar("T")


def printable(text: object, most: int = 100) -> str:
    """The text on one line, cut to so many characters, without anything that acts on a terminal."""
    shown = str(text)
    return _clean(shown if len(shown) <= most else f"{shown[: most - 1]}…")


def paragraph(text: str, indent: str = "") -> Text:
    """Text that keeps its lines, to be printed with ``soft_wrap=True``.

    Args:
        indent: before all lines but the first, so that no line of a message that quotes others' text passes for another
            message.
    """
    return Text(_lines(text, indent))


def styled(*parts: str | tuple[str, str]) -> Text:
    """A line of which some parts have a style: ``styled(("done", "bold"), f", see {folder}")``."""
    pairs = ((part, "") if isinstance(part, str) else part for part in parts)
    return Text.assemble(*((_clean(words), style) for words, style in pairs))


def _clean(text: str, kept: str = "") -> str:
    """The text with a � in place of every character that is neither visible, nor a space, nor kept."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in kept or unicodedata.category(letter) == "Zs" else "�"
        for letter in text
    )


def _lines(text: str, indent: str) -> str:
    return _clean(text.replace("\r\n", "\n"), kept="\n\t").replace("\n", f"\n{indent}")


class Console(rich.console.Console):
    """A console to which every `str` is one line of words: in a sentence, a table's cell or title, or a rule."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; one that is not made for rich, such as a path, is the `str` of it."""
        super().print(*(each if is_renderable(each) else str(each) for each in objects), **options)

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: rich.console.JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **parsing: Any,
    ) -> Text:
        """The text as it is. `parsing` (markup, emoji, highlight) is what other consoles do, and this one never."""
        return Text(_clean(text), style, justify=justify, overflow=overflow)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Segments to print. Text that some renderable made without `render_str` is cleaned here."""
        for segment in super().render(renderable, options):
            words = segment.text if segment.control else _clean(segment.text, kept="\n")
            yield segment if words == segment.text else Segment(words, segment.style)


console = Console()
errors = Console(stderr=True)


class Progress(rich.progress.Progress):
    """Progress bars, on stderr unless a console is given.

    Args:
        columns: what a line shows. A string is a format of rich's, never text from outside, which would reach
            ``str.format``: that belongs into the description of a task.
    """

    def __init__(
        self,
        *columns: ProgressColumn | LiteralString,
        console: Console | None = None,
        transient: bool = False,
        disable: bool = False,
    ) -> None:
        described = TextColumn("{task.description}", style="progress.description", markup=False)
        chosen = columns or (described, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(
            *(TextColumn(column, markup=False) if isinstance(column, str) else column for column in chosen),
            console=console or Console(stderr=True),
            transient=transient,
            disable=disable,
        )

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        return super().add_task(printable(description), *args, **options)


def track(items: Iterable[T], description: str, total: float | None = None, transient: bool = False) -> Iterator[T]:
    """The items, with a bar that shows how many have been taken."""
    with Progress(transient=transient) as progress:
        yield from progress.track(items, total=total, description=description)


def logger(name: str) -> logging.Logger:
    """A logger whose messages are printable: lines after the first are indented."""
    named = logging.getLogger(name)
    named.addFilter(_clean_record)
    return named


def _clean_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = _lines(record.getMessage(), "  "), ()
    return True


class _CleanRecord(logging.LogRecord):
    """A message of any library: its lines without what acts on a terminal, colours included."""

    def getMessage(self) -> str:
        return _lines(_COLOUR.sub("", super().getMessage()), "  ")


_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def clean_what_libraries_say() -> None:
    """Let logs and warnings of libraries be printable: they quote names of tensors, keys and files of anybody."""
    logging.setLogRecordFactory(_CleanRecord)
    written = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: _lines(written(*about, **more), "")


def replace_what_cannot_be_encoded() -> None:
    """Let stdout and stderr print a ? for what their encoding lacks, such as … in a C locale, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
