"""An index of ten thousand shards: made once, gone on with after a kill, extended and opened in seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm.data.card import Card
from mm.data.index import Index, index_card
from tests.processes import session, wait_until
from tests.shard_files import pairs, write_card, write_tar
from tests.small_world import environment

SHARDS = 10_000
ROWS = 3  # a shard


def write_shards(folder: Path, numbers: range) -> None:
    content = write_tar(folder / "a.tar", pairs(ROWS)).read_bytes()
    (folder / "a.tar").unlink()
    for number in numbers:
        (folder / f"{number:05d}.tar").write_bytes(content)


def start_indexing(card: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mm", "index", str(card), "--folder", str(folder), "--processes", "2"]
    return subprocess.Popen(command, env=environment(), start_new_session=True)


def written(folder: Path) -> dict[str, int]:
    """When each file of the index was written, in ns."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, cpu = time.monotonic(), time.process_time()
    yield
    print(f"{what}: {time.monotonic() - wall:.1f} s, {time.process_time() - cpu:.1f} s of them on this core")


def opened(card: Path, folder: Path) -> Index:
    return index_card(Card.load(card), "train", folder, processes=2, progress=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_shards_are_indexed_once_whatever_befalls(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    write_shards(tmp_path, range(SHARDS))
    card = write_card(tmp_path, "*.tar")

    killed = start_indexing(card, folder)
    wait_until(lambda: len(written(folder)) >= SHARDS // 2, seconds=1800)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not session(killed.pid))
    half = written(folder)
    assert SHARDS // 2 <= len(half) < SHARDS

    with timed(f"indexing the other {SHARDS - len(half)} shards in 2 processes"):
        assert start_indexing(card, folder).wait() == 0
    whole = written(folder)
    assert len(whole) == SHARDS
    assert half.items() <= whole.items()
    assert not list(folder.glob("*.unfinished"))

    began = time.process_time()
    with timed(f"opening an index of {SHARDS} shards that did not change"):
        index = opened(card, folder)
    assert time.process_time() - began < 5
    assert index.rows == SHARDS * ROWS
    assert written(folder) == whole

    write_shards(tmp_path, range(SHARDS, SHARDS + 10))
    with timed("opening it after 10 were added"):
        index = opened(card, folder)
    assert index.rows == (SHARDS + 10) * ROWS
    assert whole.items() <= written(folder).items()
    assert len(written(folder)) == SHARDS + 10
