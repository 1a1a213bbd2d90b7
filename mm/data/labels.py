"""Names out of shards as they may be shown in a terminal: they are untrusted, and could move its cursor."""

from __future__ import annotations

from pathlib import PurePosixPath

from rich.markup import escape


def printable(text: str, most: int = 100) -> str:
    """The text on one line, cut to so many characters, without control characters and without rich markup."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in text[: most + 1])
    return escape(shown if len(shown) <= most else f"{shown[: most - 1]}…")


def place_name(shard: str, key: str) -> str:
    """``train-0000.tar: 000123``: a record by the name of its shard and its key, which says nothing alone."""
    name = printable(PurePosixPath(shard).name)
    return f"{name}: {printable(key)}" if key else name
