"""Records in a JSON file that a user has: a list of them, or one a line, whatever the file's name ends in.

    [{…}, {…}]       read whole                       where = record 1, record 2, …
    {…}\\n{…}\\n       read line by line                where = line 1, line 2, …

A record that cannot be read is an error that costs no other. A list with an error between its records has no further
ones that could be found, so the file is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.files import refuse_unreadable
from mm.data.jsonl import BYTE_ORDER_MARK, MAX_LINE, lines, parse_object
from mm.data.sources.writer import BuildError

_SPACE = re.compile(r"[ \t\n\r]*")
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{},]', re.DOTALL)
_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1}
_HEAD = 64 * 1024


class Found(NamedTuple):
    """A record, or the reason why there is none.

    where: for people
    size: bytes of the file that it takes up, about
    """

    where: str
    size: int
    record: dict[str, Any] | None
    error: str | None = None


def read_records(source: Path) -> Iterator[Found]:
    """The records of a file, in order.

    Raises:
        FileNotFoundError: no file there.
        BuildError: a folder or device, or no JSON of these two forms.
        ShardError: the file is compressed.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file at {source}")
    if not source.is_file():
        raise BuildError(f"{source} is not a plain file; expected a list of records in JSON, or JSON lines")
    with source.open("rb") as stream:
        head = stream.read(_HEAD)
    refuse_unreadable(str(source), head)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in head:
        raise BuildError(f"{source} is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    return _of_list(source) if _is_list(source) else _of_lines(source)


def _is_list(source: Path) -> bool:
    """Whether a file is one list, and not lines of which the first happens to be a list."""
    with source.open("rb") as stream:
        pieces = (piece.removeprefix(BYTE_ORDER_MARK) for piece in iter(lambda: stream.readline(MAX_LINE), b""))
        filled = (piece for piece in pieces if piece.strip())
        first, second = next(filled, b""), next(filled, b"")
    if not first.lstrip().startswith(b"["):
        return False
    try:
        return not second or not isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return True


def nested(text: str) -> int:
    """Levels of lists and objects in JSON, without a parser's limit."""
    depths = itertools.accumulate(_DEPTH.get(token[0], 0) for token in _TOKENS.finditer(text))
    return max(depths, default=0)


def _of_lines(source: Path) -> Iterator[Found]:
    with source.open("rb") as stream:
        for count, line in enumerate(lines(stream)):
            try:
                record, error = parse_object(line), None
            except ValueError as problem:
                if count == 0:
                    _refuse_one_object(source)
                record, error = None, str(problem)
            yield Found(f"line {line.number}", line.size + 1, record, error)


def _refuse_one_object(source: Path) -> None:
    """Raise `BuildError` for an object over several lines, which is no list of records."""
    if source.stat().st_size > MAX_LINE:
        return
    try:
        value = json.loads(source.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        keys = ", ".join(map(ascii, itertools.islice(value, 5)))
        raise BuildError(f"{source} is one object (keys {keys}); expected a list of records, or one record a line")


def _of_list(source: Path) -> Iterator[Found]:
    # Bytes that are not UTF-8 become halves of surrogate pairs, which cost their own record when it is written.
    text = source.read_bytes().decode("utf-8", "surrogateescape")
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, text.index("[") + 1)
    for number in itertools.count(1):
        if number == 1 and text.startswith("]", at):
            break
        start, record, error = at, None, None
        try:
            value, at = decode(text, start)
            if isinstance(value, dict):
                record = value
            else:
                error = f"broken record: a {type(value).__name__} instead of an object with keys"
        except json.JSONDecodeError as problem:
            raise _no_json(source, text, problem.pos, problem.msg) from problem
        except (ValueError, RecursionError) as problem:  # a number of too many digits, or too many levels
            reason = "nested too deep" if isinstance(problem, RecursionError) else problem
            error, at = f"broken JSON: {reason}", _end(source, text, start)
        yield Found(f"record {number}", at - start, record, error)
        at = _skip_space(text, at)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise _no_json(source, text, at, "Expecting ',' or ']'")
        at = _skip_space(text, at + 1)
    if (rest := _skip_space(text, at + 1)) < len(text):
        raise _no_json(source, text, rest, "More follows the end of the list")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _end(source: Path, text: str, start: int) -> int:
    """Where a record ends that the parser gave up on, found by its brackets."""
    depth = 0
    for token in _TOKENS.finditer(text, start):
        if depth == 0 and token[0] in (",", "]"):
            return token.start()
        depth += _DEPTH.get(token[0], 0)
        if depth == 0 and token[0] in ("]", "}"):
            return token.end()
    raise _no_json(source, text, len(text), "The file ends inside of a record")


def _no_json(source: Path, text: str, at: int, problem: str) -> BuildError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return BuildError(f"{source}, line {line}, column {column}: no JSON: {problem}; repair the file, or write it anew")
