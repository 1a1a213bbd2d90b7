"""Names out of shards as messages and tables show them."""

from __future__ import annotations

from pathlib import PurePosixPath

from mm.terminal import printable


def place_name(shard: str, key: str) -> str:
    """``train-0000.tar: 000123``: a record by the name of its shard and its key, which says nothing alone."""
    name = printable(PurePosixPath(shard).name)
    return f"{name}: {printable(key)}" if key else name
