"""Copies of remote shards: complete or not there, shared by processes and runs, and never another shard's."""

from __future__ import annotations

import errno
import fcntl
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mm.cli import app
from mm.configure import RecipeError
from mm.data import cache as cache_module
from mm.data import columns
from mm.data import files as files_module
from mm.data.cache import ShardCache, ShardCopy, fetch_ahead, parse_bytes
from mm.data.card import Card
from mm.data.files import LocalFile, RemoteFile, ShardChanged, ShardStat
from mm.data.index import Index, SplitSamples, fetch_rows_ahead, index_card
from mm.data.parquet import ParquetShard
from mm.data.rows import RowShard
from mm.train.checkpoint import Position
from mm.train.dataset import PlannedData, open_data
from mm.train.loop import load_batches
from mm.train.parallel import World
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests.processes import wait_until
from tests.shard_files import jpeg, pairs, text_length, words, write_card, write_tar
from tests.small_world import environment, losses, train_apart, write_recipe

KB = 1024
CHUNK = 64 * KB


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges, counts what it gives, and fails as it is told.

    requests: (method, file, first byte) of every request
    sent: bytes of bodies
    etag, date: versions that it gives
    fault: called with the number of a GET before its answer; gives "refuse" for a 503, "cut" for half a body
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        folder.mkdir()
        self.folder = folder
        self.requests: list[tuple[str, str, int]] = []
        self.sent = 0
        self.etag: str | None = '"v1"'
        self.date: str | None = None
        self.fault: Callable[[int], str | None] = lambda number: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def starts(self, file: str = "") -> list[int]:
        """First bytes of the ranges that were asked for."""
        return [first for method, name, first in self.requests if method == "GET" and file in name]

    def forget(self) -> None:
        self.requests, self.sent = [], 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        low, _, high = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        with server.lock:
            server.requests.append((self.command, path.name, int(low)))
            number = len(server.starts())
        fault = server.fault(number) if body else None
        if fault == "refuse":
            self.send_error(503)
            return
        content = path.read_bytes()
        data = content[int(low) : int(high or len(content)) + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {low}-{int(low) + len(data) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (("ETag", server.etag), ("Last-Modified", server.date)):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if body:
            sent = data[: len(data) // 2] if fault == "cut" else data
            self.close_connection = fault == "cut"
            with server.lock:
                server.sent += len(sent)
            with suppress(ConnectionError):  # whoever asked was killed
                self.wfile.write(sent)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, short pauses before a request is tried again."""
    monkeypatch.setattr(cache_module, "CHUNK", CHUNK)
    monkeypatch.setattr(files_module, "PAUSES", (0.01, 0.02))
    cache_module._warned.clear()


def serve(server: Server, name: str = "0.bin", size: int = 300 * KB, seed: int = 0) -> tuple[str, ShardStat, bytes]:
    """URL, size and version, and content of a file of noise."""
    data = np.random.default_rng(seed).bytes(size)
    (server.folder / name).write_bytes(data)
    path = f"{server.url}/{name}"
    stat = RemoteFile(path).stat()
    server.forget()
    return path, stat, data


def cache_in(folder: Path, limit: str = "10MB") -> ShardCache:
    return ShardCache(folder / "cache", parse_bytes(limit))


def kept(cache: ShardCache, suffix: str = ".shard") -> list[str]:
    """Names of the files whose copies, or parts of them, are there."""
    return sorted(file.name.split("-")[0] for file in cache.folder.glob(f"*{suffix}"))


def as_a_new_process() -> None:
    """Forgets which copies were found to be sound."""
    cache_module._sound.clear()


PROCESS = """
import logging, sys, time
from pathlib import Path
from mm.data import cache as cache_module, files as files_module
from mm.data.cache import ShardCache, ShardCopy
from mm.data.shards import ShardStat

logging.basicConfig(level=logging.INFO)
cache_module.CHUNK = 64 * 1024
cache = ShardCache(Path(sys.argv[1]), int(sys.argv[2]))
path, stat = sys.argv[3], ShardStat(int(sys.argv[4]), sys.argv[5])
file = cache.file(path, stat)
"""


def start(cache: ShardCache, path: str, stat: ShardStat, script: str) -> subprocess.Popen[str]:
    """A real process with a `file` of the cache, for the rest of the script."""
    arguments = [str(cache.folder), str(cache.limit), path, str(stat.size), stat.version]
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + script, *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ----------------------------------------------------------------------------------------------------------- transfer


def test_a_shard_is_fetched_once_and_read_from_disk(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    file = cache_in(tmp_path).file(path, stat)
    assert file.read(1000, 70_000) == data[1000:71_000]
    assert server.starts() == [CHUNK * number for number in range(5)]
    assert server.sent == len(data)
    server.forget()
    again = cache_in(tmp_path).file(path, stat)
    assert again.read(0, 10**6) == data
    assert again.read(len(data) - 5, 100) == data[-5:]
    assert again.read(len(data), 100) == b""
    assert again.stream().read() == data
    assert server.requests == []
    assert again.fingerprint() == RemoteFile(path).fingerprint()  # the index knows no difference


def test_the_stamp_tells_where_a_copy_is_from(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server)
    cache = cache_in(tmp_path)
    cache.file(path, stat).read(0, 1)
    (stamp,) = cache.folder.glob("*.json")
    written = json.loads(stamp.read_text())
    assert (written["shard"], written["size"], written["version"]) == (path, stat.size, stat.version)
    assert sorted(file.suffix for file in cache.folder.iterdir()) == [".json", ".lock", ".lock", ".shard"]


def test_memory_urls_are_cached(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/0.bin", b"first")
    stat = RemoteFile("memory://bucket/0.bin").stat()
    assert stat.version  # when the file was made
    file = cache_in(tmp_path).file("memory://bucket/0.bin", stat)
    assert file.read(0, 5) == b"first"
    system.pipe_file("/bucket/0.bin", b"other")
    assert file.read(0, 5) == cache_in(tmp_path).file("memory://bucket/0.bin", stat).read(0, 5) == b"first"
    changed = RemoteFile("memory://bucket/0.bin").stat()
    assert cache_in(tmp_path).file("memory://bucket/0.bin", changed).read(0, 5) == b"other"


def test_an_empty_file_is_cached(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server, size=0)
    assert cache_in(tmp_path).file(path, stat).read(0, 10) == b""


def test_a_connection_that_breaks_is_tried_again(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    server.fault = {2: "cut", 3: "refuse", 5: "cut"}.get
    assert cache_in(tmp_path).file(path, stat).read(0, len(data)) == data
    assert server.starts() == [CHUNK * number for number in (0, 1, 1, 1, 2, 2, 3, 4)]


def test_a_transfer_that_broke_off_goes_on_where_it_was(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    server.fault = lambda number: "cut" if number > 3 else None
    with pytest.raises(OSError, match=f"{path}: request failed three times"):
        file.read(0, 1)
    assert (kept(cache), kept(cache, ".part")) == ([], ["0.bin"])
    server.fault = lambda number: None
    server.forget()
    assert file.read(0, len(data)) == data
    assert server.starts() == [CHUNK * number for number in (2, 3, 4)]  # the last chunk on disk is not trusted
    assert kept(cache, ".part") == []


def test_without_versions_a_transfer_starts_over(tmp_path: Path, server: Server) -> None:
    server.etag = None
    path, stat, data = serve(server)
    assert stat.version == ""
    file = cache_in(tmp_path).file(path, stat)
    server.fault = lambda number: "cut" if number > 3 else None
    with pytest.raises(OSError, match="three times"):
        file.read(0, 1)
    server.fault = lambda number: None
    server.forget()
    assert file.read(0, len(data)) == data
    assert server.starts()[0] == 0  # nothing says that the part is of the same file


def test_a_shard_that_changes_during_its_transfer_is_refused_and_nothing_is_kept(
    tmp_path: Path, server: Server
) -> None:
    path, stat, data = serve(server)

    def change(number: int) -> None:
        if number == 3:
            (server.folder / "0.bin").write_bytes(data[::-1])
            server.etag = '"v2"'

    server.fault = change
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    with pytest.raises(ShardChanged, match="v2"):
        file.read(0, 1)
    assert kept(cache) == kept(cache, ".part") == []
    (server.folder / "0.bin").write_bytes(data)
    server.etag = '"v1"'
    server.fault = lambda number: None
    assert file.read(0, len(data)) == data


def test_a_shard_that_changed_between_two_transfers_is_refused(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server)
    file = cache_in(tmp_path).file(path, stat)
    server.fault = lambda number: "cut" if number > 3 else None
    with pytest.raises(OSError, match="three times"):
        file.read(0, 1)
    server.etag = '"v2"'
    server.fault = lambda number: None
    with pytest.raises(ShardChanged, match="v2"):
        file.read(0, 1)
    assert kept(cache_in(tmp_path), ".part") == []


@pytest.mark.parametrize("date", ["Fri, 01 Jan 2100 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT", "yesterday"])
def test_a_server_whose_clock_is_wrong_is_read_all_the_same(tmp_path: Path, server: Server, date: str) -> None:
    server.etag, server.date = None, date
    path, stat, data = serve(server)
    assert stat.version == date
    cache = cache_in(tmp_path)
    assert cache.file(path, stat).read(0, len(data)) == data
    server.forget()
    as_a_new_process()
    assert cache.file(path, stat).read(0, len(data)) == data
    assert server.requests == []
    server.date = "Fri, 02 Jan 2026 00:00:00 GMT"  # the clock was set right, or the file replaced: nobody can tell
    assert cache.file(path, stat).read(0, len(data)) == data
    with pytest.raises(ShardChanged, match="02 Jan 2026"):
        cache_in(tmp_path / "other").file(path, stat).read(0, 1)


def test_a_file_that_is_not_there_is_told_at_once(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server)
    (server.folder / "0.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.bin"):
        cache_in(tmp_path).file(path, stat).read(0, 1)


def test_a_server_that_is_away_is_not_taken_for_a_missing_file(tmp_path: Path) -> None:
    with Server(tmp_path / "served") as server:  # closed at the end: nobody listens at its address
        path = f"{server.url}/0.bin"
    with pytest.raises(OSError, match=rf"{path}: request failed three times: .*Connect") as raised:
        cache_in(tmp_path).file(path, ShardStat(1, "v1")).read(0, 1)
    assert not isinstance(raised.value, FileNotFoundError)


def test_a_full_disk_means_reading_in_place(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, stat, data = serve(server)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = cache_in(tmp_path)
    assert cache.file(path, stat).read(10, 20) == data[10:30]
    assert kept(cache) == kept(cache, ".part") == []
    assert "is full" in caplog.text


# ---------------------------------------------------------------------------------------------------------- processes


def test_processes_that_race_for_a_shard_fetch_it_once(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    server.fault = lambda number: time.sleep(0.05)
    script = "sys.stdin.readline(); print(file.read(100_000, 4).hex(), flush=True)"
    racers = [start(cache_in(tmp_path), path, stat, script) for _ in range(3)]
    outputs = [racer.communicate("go\n", timeout=240)[0] for racer in racers]
    assert [output.strip().splitlines()[-1] for output in outputs] == [data[100_000:100_004].hex()] * 3
    assert server.starts() == [CHUNK * number for number in range(5)]


def test_a_process_finishes_the_transfer_of_one_that_was_killed(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    cache, hold = cache_in(tmp_path), threading.Event()
    server.fault = lambda number: hold.wait(20) and None if number == 4 else None
    killed = start(cache, path, stat, "file.read(0, 1)")
    wait_until(lambda: len(server.starts()) == 4)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    hold.set()
    assert (kept(cache), kept(cache, ".part")) == ([], ["0.bin"])
    server.forget()
    assert cache.file(path, stat).read(0, len(data)) == data
    assert server.starts() == [CHUNK * number for number in (2, 3, 4)]


def test_nobody_waits_for_a_transfer_that_stands_still(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE", 0.2)
    path, stat, data = serve(server)
    hold = threading.Event()
    server.fault = lambda number: hold.wait(20) and None if number == 2 else None
    stopped = start(cache_in(tmp_path), path, stat, "file.read(0, 1)")
    wait_until(lambda: len(server.starts()) == 2)
    os.kill(stopped.pid, signal.SIGSTOP)
    assert cache_in(tmp_path).file(path, stat).read(0, 9) == data[:9]
    assert "stands still" in caplog.text
    stopped.kill()
    stopped.communicate()
    hold.set()


def test_what_another_process_reads_is_not_evicted(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server, "0.bin")
    cache = cache_in(tmp_path, "700kB")
    script = "file.read(0, 1); print('has it', flush=True); sys.stdin.readline(); print(file.read(200_000, 4).hex())"
    reader = start(cache, path, stat, script)
    assert reader.stdout is not None
    for line in reader.stdout:
        if "has it" in line:
            break
    for number in (1, 2, 3):
        other = cache.file(*serve(server, f"{number}.bin")[:2])
        other.read(0, 1)
        other.close()
    assert kept(cache) == ["0.bin", "3.bin"]
    server.forget()
    output, _ = reader.communicate("go\n", timeout=240)
    assert output.strip() == data[200_000:200_004].hex()
    assert server.requests == []
    cache.file(*serve(server, "4.bin")[:2]).read(0, 1)
    assert kept(cache) == ["3.bin", "4.bin"]  # its reader is gone


def test_a_copy_removed_by_hand_stays_readable_to_those_who_have_it_open(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    file.read(0, 1)
    server.forget()
    for left in cache.folder.iterdir():
        left.unlink()
    assert file.read(0, len(data)) == data
    assert server.requests == []


def test_a_forked_child_does_not_give_up_what_its_parent_reads(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    file.read(0, 1)
    child = get_context("fork").Process(target=lambda: (cache_module._release_oldest(cache), file.close()))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    (copy,) = cache.folder.glob("*.shard")
    with copy.open("rb") as opened, pytest.raises(BlockingIOError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --------------------------------------------------------------------------------------------------------- corruption


def flip(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[1234] ^= 1
    copy.write_bytes(data)


def forge(copy: Path) -> None:
    """Alters a copy under its old date and size."""
    before = copy.stat()
    flip(copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(copy: Path) -> None:
    os.truncate(copy, 1000)


def lose_stamp(copy: Path) -> None:
    copy.with_suffix(".json").unlink()


def garble_stamp(copy: Path) -> None:
    copy.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [flip, forge, cut, lose_stamp, garble_stamp])
def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path, server: Server, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path, stat, data = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    file.read(0, 1)
    file.close()
    (copy,) = cache.folder.glob("*.shard")
    damage(copy)
    as_a_new_process()
    server.forget()
    assert cache.file(path, stat).read(0, len(data)) == data
    assert len(server.starts()) == 5
    assert caplog.text.count("is not what was written") == 1
    server.forget()
    as_a_new_process()
    assert cache.file(path, stat).read(0, len(data)) == data
    assert server.requests == []


def test_a_copy_altered_since_this_process_had_it_is_noticed(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    file.read(0, 1)
    file.close()
    (copy,) = cache.folder.glob("*.shard")
    flip(copy)
    assert cache.file(path, stat).read(0, len(data)) == data


def test_a_copy_cut_while_it_is_read_is_left_for_the_server(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path, stat, data = serve(server)
    cache = cache_in(tmp_path)
    file = cache.file(path, stat)
    file.read(0, 1)
    (copy,) = cache.folder.glob("*.shard")
    cut(copy)
    assert file.read(900, 5000) == data[900:5900]
    assert "was cut" in caplog.text


# -------------------------------------------------------------------------------------------------------------- limit


def test_the_copy_used_longest_ago_makes_room(tmp_path: Path, server: Server) -> None:
    cache = cache_in(tmp_path, "1MB")  # three of 300 KiB
    served = [serve(server, f"{number}.bin", seed=number) for number in range(4)]
    for number in (0, 1, 2, 0, 3):
        path, stat, data = served[number]
        file = cache.file(path, stat)
        assert file.read(0, len(data)) == data
        file.close()
    assert kept(cache) == ["0.bin", "2.bin", "3.bin"]


def test_transfers_that_nobody_goes_on_with_make_room(tmp_path: Path, server: Server) -> None:
    cache = cache_in(tmp_path, "500kB")
    path, stat, _ = serve(server, "0.bin")
    server.fault = lambda number: "cut"
    with pytest.raises(OSError, match="three times"):
        cache.file(path, stat).read(0, 1)
    server.fault = lambda number: None
    assert kept(cache, ".part") == ["0.bin"]
    cache.file(*serve(server, "1.bin")[:2]).read(0, 1)
    assert (kept(cache), kept(cache, ".part")) == (["1.bin"], [])


def test_shards_above_the_limit_are_read_in_place_with_one_warning(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path, "200kB")
    for number in range(3):
        path, stat, data = serve(server, f"{number}.bin", seed=number)
        assert cache.file(path, stat).read(10, 20) == data[10:30]
        assert server.sent == 20
    assert caplog.text.count("more than the cache's limit") == 1
    server.etag = '"v2"'
    with pytest.raises(ShardChanged, match="v2"):
        cache.file(path, stat).read(10, 20)


def test_a_limit_below_what_is_in_use_does_not_move_shards_back_and_forth(tmp_path: Path, server: Server) -> None:
    cache = cache_in(tmp_path, "700kB")  # two of the four
    served = [serve(server, f"{number}.bin", seed=number) for number in range(4)]
    files = [cache.file(path, stat) for path, stat, _ in served]
    for _ in range(5):
        for file, (_, _, data) in zip(files, served, strict=True):
            assert file.read(50, 20) == data[50:70]
    whole = [name for _, name, first in server.requests if first == 4 * CHUNK]
    assert sorted(whole) == ["0.bin", "1.bin", "2.bin", "3.bin"]  # once each at most
    assert sum(file.stat().st_size for file in cache.folder.glob("*.shard")) <= cache.limit


def test_room_held_by_other_processes_leaves_a_shard_in_place(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path, "500kB")
    script = "file.read(0, 1); print('has it', flush=True); sys.stdin.readline()"
    reader = start(cache, *serve(server, "0.bin")[:2], script)
    assert reader.stdout is not None
    assert any("has it" in line for line in iter(reader.stdout.readline, ""))
    path, stat, data = serve(server, "1.bin", seed=1)
    assert cache.file(path, stat).read(10, 20) == data[10:30]
    assert server.sent == 20
    assert "no room in the cache" in caplog.text
    reader.communicate("\n", timeout=240)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5 * CHUNK), min_size=1, max_size=5),
    reads=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12),
    limit=st.integers(1, 12 * CHUNK),
)
def test_any_reads_under_any_limit_give_the_shards_and_keep_the_limit(
    sizes: list[int], reads: list[tuple[int, bool]], limit: int
) -> None:
    system = fsspec.filesystem("memory")
    contents = [np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        cache, files = ShardCache(Path(folder), limit), []
        for number, content in enumerate(contents):
            path = f"memory://any/{number}.bin"
            system.pipe_file(path.removeprefix("memory:/"), content)
            files.append(cache.file(path, RemoteFile(path).stat()))
        for number, closes in reads:
            number %= len(files)
            assert files[number].read(0, sizes[number]) == contents[number]
            if closes:
                files[number].close()
            assert sum(file.stat().st_size for file in cache.folder.iterdir() if file.suffix != ".json") <= limit
        for file in files:
            file.close()


# -------------------------------------------------------------------------------------------------------------- ahead


def finish_ahead() -> None:
    wait_until(lambda: cache_module._ahead._thread is None)


def test_shards_are_fetched_ahead_in_order_up_to_half_of_the_limit(tmp_path: Path, server: Server) -> None:
    cache = cache_in(tmp_path, "2MB")
    served = [serve(server, f"{number}.bin", seed=number) for number in (3, 1, 2, 0)]
    fetch_ahead(cache, [ShardCopy(path, stat) for path, stat, _ in served])
    finish_ahead()
    assert kept(cache) == ["1.bin", "2.bin", "3.bin"]
    assert [name for _, name, first in server.requests if first == 4 * CHUNK] == ["3.bin", "1.bin", "2.bin"]
    server.forget()
    assert cache.file(*served[0][:2]).read(7, 7) == served[0][2][7:14]
    assert server.requests == []


def test_a_reader_waits_for_the_transfer_that_is_under_way(tmp_path: Path, server: Server) -> None:
    path, stat, data = serve(server)
    server.fault = lambda number: time.sleep(0.05)
    fetch_ahead(cache_in(tmp_path), [ShardCopy(path, stat)])
    wait_until(server.starts)
    assert cache_in(tmp_path).file(path, stat).read(0, len(data)) == data
    assert len(server.starts()) == 5
    finish_ahead()


def test_what_fails_ahead_is_left_to_the_reader(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path)
    served = [serve(server, f"{number}.bin", seed=number) for number in range(2)]
    server.fault = lambda number: "refuse" if number <= 3 else None
    fetch_ahead(cache, [ShardCopy(path, stat) for path, stat, _ in served])
    finish_ahead()
    assert kept(cache) == ["1.bin"]
    assert f"fetching ahead failed: {served[0][0]}" in caplog.text
    path, stat, data = served[0]
    assert cache.file(path, stat).read(0, len(data)) == data


def test_fetching_ahead_takes_no_room_from_readers(tmp_path: Path, server: Server) -> None:
    cache = cache_in(tmp_path, "620kB")  # two
    held = [cache.file(*serve(server, f"{number}.bin")[:2]) for number in range(2)]
    for file in held:
        file.read(0, 1)
    fetch_ahead(cache, [ShardCopy(*serve(server, "2.bin", seed=2)[:2])])
    finish_ahead()
    assert kept(cache) == ["0.bin", "1.bin"]


def test_a_process_ends_while_it_fetches_ahead(tmp_path: Path, server: Server) -> None:
    path, stat, _ = serve(server)
    hold = threading.Event()
    server.fault = lambda number: hold.wait(120) and None
    script = "cache_module.fetch_ahead(cache, [ShardCopy(path, stat)]); sys.stdin.readline()"
    process = start(cache_in(tmp_path), path, stat, script)
    wait_until(server.starts)
    process.communicate("\n", timeout=100)
    assert process.returncode == 0
    hold.set()


# ---------------------------------------------------------------------------------------------------- rows of parquet

PARQUET = [{"image": "image"}, {"text": "text"}]


def write_rows(path: Path, rows: int, group: int, first: int = 0, pictures: bool = True, **more: Any) -> Path:
    """A parquet file. Row i has a picture i + 8 pixels wide, as Hugging Face keeps it, and caption ``caption i``."""
    numbers = range(first, first + rows)
    images = [{"bytes": jpeg(i + 8, 9), "path": None} if pictures else None for i in numbers]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"caption {i}" for i in numbers],
            "unread": ["x" * 1000] * rows,
        }
    )
    pq.write_table(table, path, row_group_size=group, **more)
    return path


def parquet_card(folder: Path, shards: str, cache: ShardCache | None, sample: Any = None) -> Card:
    return replace(Card.load(write_card(folder, shards, sample or PARQUET, format="parquet")), cache=cache)


def all_places(shard: ParquetShard) -> list[tuple[int, int]]:
    return [(group, row) for group, rows in enumerate(shard.row_groups()) for row in range(rows)]


def overwrite(path: Path) -> None:
    """Destroys the content of a file under its size and date, so that reading it would be noticed."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("group", [1, 63, 64, 65, 150])
def test_kept_rows_are_those_of_the_file(tmp_path: Path, group: int) -> None:
    rows = range(150)
    table = pa.table(
        {
            "image": [{"bytes": bytes([i]) * i, "path": None if i % 2 else f"{i}.jpg"} for i in rows],
            "chat": [[{"from": "human", "value": f"{n}"} for n in range(i % 4)] if i % 5 else None for i in rows],
            "label": pa.array([f"class {i // 40}" for i in rows]).dictionary_encode(),
            "number": pa.array([None if i % 7 == 0 else i / 3 for i in rows]),
            "when": pa.array([i * 10**6 for i in rows], pa.timestamp("us", "UTC")),
        }
    )
    path = tmp_path / "0.parquet"
    pq.write_table(table, path, row_group_size=group)
    stat = LocalFile(str(path)).stat()
    for read in ((), ("label", "image"), ("chat.value", "chat")):
        plain = ParquetShard(LocalFile(str(path)), stat, read)
        kept_rows = RowShard(cache_in(tmp_path), str(path), stat, read)
        places = all_places(plain)
        order = np.random.default_rng(0).permutation(len(places)).tolist()
        assert [kept_rows.read(places[n]) for n in order] == [plain.read(places[n]) for n in order]
        for beyond in ((0, group), (len(plain.row_groups()), 0)):
            with pytest.raises(ShardChanged, match="no row"):
                kept_rows.read(beyond)
    assert len(kept(cache_in(tmp_path))) == 3


def test_shuffled_reads_of_local_parquet_read_the_file_once(tmp_path: Path) -> None:
    for number in range(2):
        write_rows(tmp_path / f"{number}.parquet", 90, 30, first=90 * number)
    index = index_card(parquet_card(tmp_path, "*.parquet", cache_in(tmp_path)), "train", tmp_path / "index")
    assert not cache_in(tmp_path).folder.exists()  # a scan reads every row group once as it is
    index.sample(0), index.sample(90)
    for number in range(2):
        overwrite(tmp_path / f"{number}.parquet")
    assert texts(index) == [f"caption {i}" for i in range(180)]
    again = Index(index.card, index.split, index.folder, index.shards)
    as_a_new_process()
    assert texts(again, seed=1) == [f"caption {i}" for i in range(180)]


def test_remote_parquet_is_transferred_once(tmp_path: Path, server: Server) -> None:
    path = write_rows(server.folder / "0.parquet", 400, 100, compression="none", use_dictionary=False)
    card = parquet_card(tmp_path, f"{server.url}/0.parquet", cache_in(tmp_path))
    index = index_card(card, "train", tmp_path / "index", progress=False)
    assert server.sent <= path.stat().st_size + 64 * KB  # Arrow's first look at a footer
    server.forget()
    assert texts(index) == [f"caption {i}" for i in range(400)]
    columns.compute(index, "letters", "v1", text_length, pa.int32(), progress=False)
    assert server.requests == []


def damage(path: Path, group: int, share: float) -> None:
    """Overwrites bytes in the captions of a row group, after a share of them."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(2)
    start = column.data_page_offset + int(column.total_compressed_size * share)
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)


def test_an_index_of_damaged_parquet_is_the_same_with_and_without_a_cache(tmp_path: Path, server: Server) -> None:
    form = {"compression": "snappy", "use_dictionary": False, "data_page_size": 2000}
    paths = [write_rows(server.folder / f"{n}.parquet", 4000, 2000, first=0, pictures=False, **form) for n in range(3)]
    damage(paths[0], group=0, share=0)
    damage(paths[1], group=1, share=0.7)
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    shards, sample = f"{server.url}/{{0..2}}.parquet", [{"text": "text"}]
    plain = index_card(parquet_card(tmp_path, shards, None, sample), "train", tmp_path / "plain", progress=False)
    with_cache = parquet_card(tmp_path, shards, cache_in(tmp_path), sample)
    cached = index_card(with_cache, "train", tmp_path / "cached", progress=False)
    lost = [int(reason.split()[3]) if "lost" in reason else None for reason in plain.errors["reason"].to_pylist()]
    assert lost[0] == 2000
    assert 0 < lost[1] < 2000
    assert lost[2:] == [None]
    assert cached.errors.equals(plain.errors)
    assert cached.place.tolist() == plain.place.tolist()
    for row in (0, 2000, cached.rows - 1):
        assert words(cached.sample(row)) == words(plain.sample(row))
    server.forget()
    cached.sample(3)
    assert server.requests == []


def test_a_local_parquet_that_changed_is_refused_though_its_rows_are_kept(tmp_path: Path) -> None:
    write_rows(tmp_path / "0.parquet", 10, 5)
    card = parquet_card(tmp_path, "0.parquet", cache_in(tmp_path))
    index = index_card(card, "train", tmp_path / "index", progress=False)
    assert texts(index)[0] == "caption 0"
    write_rows(tmp_path / "0.parquet", 10, 5, first=70)
    with pytest.raises(ShardChanged):
        index.sample(0)
    assert texts(index_card(card, "train", tmp_path / "index", progress=False))[0] == "caption 70"


def test_a_parquet_that_changes_while_its_rows_are_laid_out_is_refused_and_nothing_is_kept(
    tmp_path: Path, server: Server
) -> None:
    write_rows(server.folder / "0.parquet", 400, 100, compression="none", use_dictionary=False)
    path = f"{server.url}/0.parquet"
    stat, cache = RemoteFile(path).stat(), cache_in(tmp_path)

    def change(number: int) -> None:
        if number == 2:
            server.etag = '"v2"'

    server.fault = change
    server.forget()
    with pytest.raises(ShardChanged, match="v2"):
        RowShard(cache, path, stat, ()).read((0, 0))
    assert kept(cache) == kept(cache, ".part") == []


@pytest.mark.parametrize("harm", [flip, forge, cut, lose_stamp, garble_stamp])
def test_damaged_rows_are_laid_out_again(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "0.parquet", 50, 20)
    stat, cache = LocalFile(str(tmp_path / "0.parquet")).stat(), cache_in(tmp_path)
    shard = RowShard(cache, str(tmp_path / "0.parquet"), stat, ("text",))
    shard.read((0, 0))
    shard.close()
    (copy,) = cache.folder.glob("*.shard")
    harm(copy)
    as_a_new_process()
    assert shard.read((1, 3)).fields == {"text": "caption 23"}
    assert caplog.text.count("is not what was written") == 1


def test_rows_that_are_cut_while_they_are_read_cost_no_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "0.parquet", 50, 20)
    stat, cache = LocalFile(str(tmp_path / "0.parquet")).stat(), cache_in(tmp_path)
    shard = RowShard(cache, str(tmp_path / "0.parquet"), stat, ("image", "text"))
    shard.read((0, 0))
    (copy,) = cache.folder.glob("*.shard")
    cut(copy)
    assert shard.read((2, 9)).fields["text"] == "caption 49"
    assert "were cut while they were read" in caplog.text


def test_a_full_disk_means_reading_parquet_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "0.parquet", 50, 20)
    shard = RowShard(
        cache_in(tmp_path), str(tmp_path / "0.parquet"), LocalFile(str(tmp_path / "0.parquet")).stat(), ("text",)
    )

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert shard.read((2, 9)).fields == {"text": "caption 49"}
    assert kept(cache_in(tmp_path)) == kept(cache_in(tmp_path), ".part") == []
    assert "is full" in caplog.text


def test_rows_that_outgrow_what_the_footer_says_keep_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"text": ["repeated " * 1000] * 500}), path)  # one string in a dictionary
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size < 20 * KB
    cache = cache_in(tmp_path, "1MB")
    shard = RowShard(cache, str(path), LocalFile(str(path)).stat(), ("text",))
    assert shard.read((0, 499)).fields == {"text": "repeated " * 1000}
    assert "bytes are more than the cache's limit" in caplog.text
    assert kept(cache) == kept(cache, ".part") == []
    roomy = ShardCache(tmp_path / "roomy", 5 * 10**6)
    other = RowShard(roomy, str(path), LocalFile(str(path)).stat(), ("text",))
    assert other.read((0, 499)).fields == {"text": "repeated " * 1000}
    (copy,) = roomy.folder.glob("*.shard")
    assert 4.5e6 < copy.stat().st_size < 4.6e6


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    reads=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12),
    limit=st.integers(1000, 800_000),
)
def test_any_reads_of_parquet_under_any_limit_give_the_rows_and_keep_the_limit(
    sizes: list[int], reads: list[tuple[int, bool]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache, shards = ShardCache(folder / "cache", limit), []
        for number, rows in enumerate(sizes):
            path = folder / f"{number}.parquet"
            table = {"text": [np.random.default_rng(row).bytes(1000).hex() for row in range(rows)]}
            pq.write_table(pa.table(table), path, row_group_size=70, compression="none")
            shards.append(RowShard(cache, str(path), LocalFile(str(path)).stat(), ()))
        for number, closes in reads:
            number %= len(shards)
            row = sizes[number] - 1
            expected = np.random.default_rng(row).bytes(1000).hex()
            assert shards[number].read((row // 70, row % 70)).fields == {"text": expected}
            if closes:
                shards[number].close()
            assert sum(file.stat().st_size for file in cache.folder.iterdir() if file.suffix != ".json") <= limit
        for shard in shards:
            shard.close()


READER = """
import logging, sys, time
from pathlib import Path
from mm.data.cache import ShardCache
from mm.data.rows import RowShard
from mm.data.shards import ShardStat
logging.basicConfig(level=logging.INFO)
shard = RowShard(ShardCache(Path(sys.argv[1]), 10**8), sys.argv[2], ShardStat(int(sys.argv[3]), sys.argv[4]), ("text",))
"""


def start_reader(cache: ShardCache, path: str, stat: ShardStat, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READER + script, str(cache.folder), path, str(stat.size), stat.version],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_processes_that_race_for_rows_lay_them_out_once(tmp_path: Path, server: Server) -> None:
    write_rows(server.folder / "0.parquet", 300, 50)
    path, cache = f"{server.url}/0.parquet", cache_in(tmp_path)
    stat = RemoteFile(path).stat()
    server.fault = lambda number: time.sleep(0.05)
    script = "sys.stdin.readline(); print(shard.read((5, 49)).fields['text'], flush=True)"
    racers = [start_reader(cache, path, stat, script) for _ in range(3)]
    outputs = [racer.communicate("go\n", timeout=240)[0] for racer in racers]
    assert [output.strip().splitlines()[-1] for output in outputs] == ["caption 299"] * 3
    assert sum("made" in output for output in outputs) == 1


def test_rows_that_a_killed_process_was_laying_out_are_laid_out_by_the_next(tmp_path: Path, server: Server) -> None:
    write_rows(server.folder / "0.parquet", 3000, 500, compression="none", use_dictionary=False)
    path, cache, hold = f"{server.url}/0.parquet", cache_in(tmp_path), threading.Event()
    stat = RemoteFile(path).stat()
    server.forget()
    server.fault = lambda number: hold.wait(20) and None if number == 2 else None
    killed = start_reader(cache, path, stat, "shard.read((0, 0))")
    wait_until(lambda: len(server.starts()) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    hold.set()
    assert kept(cache) == []
    assert RowShard(cache, path, stat, ("text",)).read((5, 499)).fields == {"text": "caption 2999"}
    assert kept(cache, ".part") == []


def test_the_rows_of_coming_shards_are_laid_out_ahead(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"{number}.parquet", 10, 5, first=10 * number)
    index = index_card(parquet_card(tmp_path, "*.parquet", cache_in(tmp_path)), "train", tmp_path / "index")
    samples = SplitSamples(index.card, index.split, index.folder, [entry.shard for entry in index.shards])
    fetch_rows_ahead([samples], np.array([0, 0, 0]), np.array([2, 0, 2]))
    finish_ahead()
    assert kept(cache_in(tmp_path)) == ["0.parquet.rows", "2.parquet.rows"]
    assert texts(index) == [f"caption {i}" for i in range(30)]


# ------------------------------------------------------------------------------------------------- cards and training


def remote_card(folder: Path, server: Server, rows: int = 6, shards: int = 3) -> Card:
    for shard in range(shards):
        write_tar(server.folder / f"{shard}.tar", pairs(rows, shard * rows))
    return Card.load(write_card(folder, f"{server.url}/{{0..{shards - 1}}}.tar"))


def texts(index: Index, seed: int = 0) -> list[str]:
    """Captions of all rows, read in a shuffled order."""
    found = [""] * index.rows
    for row in np.random.default_rng(seed).permutation(index.rows).tolist():
        (found[row],) = words(index.sample(row))
    return found


def test_index_and_samples_take_each_byte_once(tmp_path: Path, server: Server) -> None:
    card = replace(remote_card(tmp_path, server), cache=cache_in(tmp_path))
    size = sum(file.stat().st_size for file in server.folder.iterdir())
    index = index_card(card, "train", tmp_path / "index", progress=False)
    assert texts(index) == [f"caption {row}" for row in range(18)]
    assert server.sent == size


def test_an_index_is_the_same_with_and_without_a_cache(tmp_path: Path, server: Server) -> None:
    card = remote_card(tmp_path, server)
    plain = index_card(card, "train", tmp_path / "plain", progress=False)
    cached = index_card(replace(card, cache=cache_in(tmp_path)), "train", tmp_path / "cached", progress=False)
    assert cached.fingerprint == plain.fingerprint
    assert texts(cached) == texts(plain)


def test_local_tars_are_not_copied(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(3))
    card = replace(Card.load(write_card(tmp_path, "0.tar")), cache=cache_in(tmp_path))
    assert texts(index_card(card, "train", tmp_path / "index", progress=False)) == [f"caption {i}" for i in range(3)]
    assert not cache_in(tmp_path).folder.exists()


def test_an_open_shard_is_given_back_when_its_reader_closes_it(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm.data.index.OPEN_SHARDS", 1)
    card = replace(remote_card(tmp_path, server), cache=cache_in(tmp_path))
    index = index_card(card, "train", tmp_path / "index", progress=False)
    for row in (0, 6, 12):
        index.sample(row)
        held = [hold.content.path for hold in cache_module._held if hold.cache == card.cache]
        assert held == [index.shards[row // 6].shard]


def test_the_shards_of_coming_rows_are_fetched_in_the_order_of_the_rows(tmp_path: Path, server: Server) -> None:
    card = remote_card(tmp_path, server)
    index = index_card(card, "train", tmp_path / "index", progress=False)
    paths = [entry.shard for entry in index.shards]
    samples = SplitSamples(replace(card, cache=cache_in(tmp_path)), index.split, index.folder, paths)
    server.forget()
    fetch_rows_ahead([samples, samples], np.array([0, 1, 0, 1]), np.array([2, 2, 0, 2]))
    finish_ahead()
    assert list(dict.fromkeys(name for _, name, _ in server.requests)) == ["2.tar", "0.tar"]


def planned(recipe: Recipe, folder: Path) -> PlannedData:
    data = open_data(recipe, Blueprint.of(recipe), recipe.data.sources, folder, epochs=2)
    data.plan.total_packs()
    return data


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if hasattr(one, "__dataclass_fields__"):
        return all(equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return one == other


@pytest.fixture
def remote_recipe(tmp_path: Path, server: Server, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    """The small world's recipe over pictures and recordings that lie behind the server."""
    cards = dict(corpus)
    for source in ("pairs", "speech"):
        card = Card.load(corpus[source])
        for shard in card.shards("train"):
            (server.folder / Path(shard).name).write_bytes(Path(shard).read_bytes())
        urls = [f"{server.url}/{Path(shard).name}" for shard in card.shards("train")]
        cards[source] = write_card(tmp_path, urls, card.sample_form, name=source)
    path = write_recipe(tmp_path, cards, tokenizer_folder, ["pairs", "speech"])
    path.write_text(path.read_text().replace(str(cards["text"].parent / "cache"), str(tmp_path / "index")))
    return path


def test_batches_of_cached_remote_shards_are_those_of_local_ones(
    tmp_path: Path, server: Server, corpus: dict[str, Path], tokenizer_folder: Path, remote_recipe: Path
) -> None:
    (tmp_path / "local").mkdir()
    local = write_recipe(tmp_path / "local", corpus, tokenizer_folder, ["pairs", "speech"])
    here = World(0, 1, torch.device("cpu"))
    made = []
    for number, (path, changes) in enumerate(
        [
            (local, []),
            (remote_recipe, []),
            (remote_recipe, [f"data.cache={{folder: {tmp_path / 'cache'}, limit: 10MB}}", "data.workers=2"]),
        ]
    ):
        recipe = Recipe.load(path, changes)
        data = planned(recipe, tmp_path / f"plan-{number}")
        server.forget()
        total = data.plan.total_steps()
        position = Position(0, 0, 0, data.plan.fingerprint)
        made.append(list(load_batches(recipe, here, data, position, total or 0)))
    assert len(made[0]) > 8
    for other in made[1:]:
        assert len(other) == len(made[0])
        assert all(equal(one, two) for one, two in zip(made[0], other, strict=True))
    size = sum(file.stat().st_size for file in server.folder.iterdir())
    assert server.sent <= size  # two epochs


def test_two_runs_share_a_cache(tmp_path: Path, server: Server) -> None:
    card = replace(remote_card(tmp_path, server, rows=20), cache=cache_in(tmp_path))
    index = index_card(replace(card, cache=None), "train", tmp_path / "index", progress=False)
    server.forget()
    script = f"""
import numpy as np
from dataclasses import replace
from mm.data.card import Card
from mm.data.index import index_card
card = replace(Card.load({str(card.path)!r}), cache=cache)
index = index_card(card, "train", {str(index.folder)!r}, progress=False)
order = np.random.default_rng(len(sys.argv)).permutation(index.rows).tolist()
print(sum(index.sample(row).parts[1].text == f"caption {{row}}" for row in order), flush=True)
"""
    runs = [start(cache_in(tmp_path), "memory://none", ShardStat(0, ""), script) for _ in range(2)]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [output.strip().splitlines()[-1] for output in outputs] == ["60", "60"]
    assert server.sent == sum(file.stat().st_size for file in server.folder.iterdir())


@pytest.mark.slow
def test_two_trainings_share_a_cache_and_lose_what_local_ones_do(
    tmp_path: Path, server: Server, corpus: dict[str, Path], tokenizer_folder: Path, remote_recipe: Path
) -> None:
    (tmp_path / "local").mkdir()
    local = write_recipe(tmp_path / "local", corpus, tokenizer_folder, ["pairs", "speech"])
    cached = f"data.cache={{folder: {tmp_path / 'cache'}, limit: 10MB}}"
    runs = [
        train_apart(remote_recipe, f"run={tmp_path / name}", f"data.index={tmp_path / f'index-{name}'}", cached)
        for name in ("one", "two")
    ]
    outputs = [run.communicate(timeout=250)[0] for run in (*runs, train_apart(local))]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert losses(tmp_path / "one") == losses(tmp_path / "two") == losses(tmp_path / "local" / "run")
    assert server.sent == sum(file.stat().st_size for file in server.folder.iterdir())


# ----------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_commands_with_a_cache_transfer_a_set_once_and_leave_it_to_training(
    tmp_path: Path, server: Server, format: str
) -> None:
    if format == "parquet":
        files = [write_rows(server.folder / f"{n}.parquet", 100, 50, first=100 * n) for n in range(3)]
        card = parquet_card(tmp_path, f"{server.url}/{{0..2}}.parquet", None)
    else:
        card = remote_card(tmp_path, server, rows=100)
        files = list(server.folder.iterdir())
    size = sum(file.stat().st_size for file in files)
    cache = ["--cache", "10MB", "--cache-folder", str(tmp_path / "cache")]
    index = ["--folder", str(tmp_path / "index")]

    def run(*command: str) -> str:
        result = CliRunner().invoke(app, [*command, *cache])
        assert result.exit_code in (0, 1), result.output  # 1: the check has something to say
        return result.output

    footers = 3 * 64 * KB if format == "parquet" else 0
    assert "300 samples in 3 shards" in run("index", str(card.path), "--processes", "2", *index)
    assert size <= server.sent + footers <= size + 2 * footers
    server.forget()
    assert "'caption 299'" in run("data", "show", str(card.path), "299", *index)
    run("data", "check", str(card.path), "--processes", "0")
    assert "dropped so far" in run("data", "drop", str(card.path), *index)
    assert server.sent == 0
    rows = index_card(replace(card, cache=cache_in(tmp_path)), "train", tmp_path / "index", progress=False)
    assert texts(rows) == [f"caption {i}" for i in range(300)]
    assert server.sent == 0


def test_what_the_doctor_saw_is_not_transferred_again(tmp_path: Path, server: Server) -> None:
    card = remote_card(tmp_path, server, rows=100)
    cache = ["--cache", "10MB", "--cache-folder", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, ["doctor", *card.shards("train"), *cache])
    assert result.exit_code == 0, result.output
    server.forget()
    rows = index_card(replace(card, cache=cache_in(tmp_path)), "train", tmp_path / "index", progress=False)
    assert texts(rows) == [f"caption {i}" for i in range(300)]
    assert server.sent == 0


def test_a_limit_that_is_no_size_is_refused_by_commands(tmp_path: Path, server: Server) -> None:
    card = remote_card(tmp_path, server)
    result = CliRunner().invoke(app, ["index", str(card.path), "--cache", "lots"])
    assert isinstance(result.exception, RecipeError)
    assert "--cache: 'lots' is no number of bytes" in str(result.exception)


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("text", "count"), [("100GB", 10**11), ("1.5 kB", 1500), ("64GiB", 2**36), ("5000", 5000), (" 2 TB ", 2 * 10**12)]
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "100 gigabytes", "-5GB", "0", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write one such as 100GB"):
        parse_bytes(text)


def test_a_recipe_has_no_cache_unless_it_says_so(remote_recipe: Path) -> None:
    assert Recipe.load(remote_recipe).data.cache is None
    set_up = Recipe.load(remote_recipe, ["data.cache.limit=5GB"]).data.cache
    assert set_up is not None
    assert set_up.open() == ShardCache(Path.home() / ".cache/mm/shards", 5 * 10**9)
    with pytest.raises(RecipeError, match="100GB"):
        Recipe.load(remote_recipe, ["data.cache.limit=lots"])
