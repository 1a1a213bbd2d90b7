"""Copies of remote shards on this machine's disk, under a limit of bytes, shared by all processes and runs.

    URL, size, version ──▶ <entry>.part ──ranges, fsync──▶ checksum ──▶ <entry>.json, <entry>.shard ──▶ reads
                               └─ broken off? goes on here next time          └─ checked once a process

An entry is a shard of one size and version, so a copy never stands for another shard than the one that was indexed.
Three locks, which the kernel frees with their owner, keep processes apart: one an entry for whoever transfers it, one
on the folder for whoever makes room, and a shared one on every copy that is being read, which is not evicted. (A copy
that is removed by hand stays readable, on Linux, to those who have it open.) The folder belongs on a local disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock, Timeout

from mm.data.shards import (
    RemoteFile,
    ShardChanged,
    ShardFile,
    ShardFingerprint,
    ShardStat,
    buffered_stream,
    check_unchanged,
    remote_fingerprint,
)

logger = logging.getLogger(__name__)

CHUNK = 16 * 1024**2
"""Bytes of a request. A transfer that was broken off repeats at most its last chunk."""
PATIENCE = 60.0
"""Seconds in which another process's transfer must grow, or its shard is read in place."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass
class CacheOptions:
    """Local copies of remote shards, see docs/remote.md.

    folder: on a local disk; safe to share between runs and to delete when none uses it
    limit: most bytes in it, such as ``100GB``; what does not fit is read in place
    """

    folder: str = "~/.cache/mm/shards"
    limit: str = "100GB"

    def __post_init__(self) -> None:
        parse_bytes(self.limit)

    def open(self) -> ShardCache:
        return ShardCache(Path(self.folder).expanduser().absolute(), parse_bytes(self.limit))


def parse_bytes(text: str) -> int:
    """Bytes of ``100GB`` (10⁹ each), ``64 GiB`` (2³⁰ each) or ``5000``.

    Raises:
        ValueError: not such a text, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    unit = (match[2] or "B") if match else ""
    if match is None or unit not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is no number of bytes; write one such as 100GB, with a unit of {', '.join(_UNITS)}")
    return int(float(match[1]) * _UNITS[unit])


class Entry(NamedTuple):
    """A shard of one size and version, and where its copy is or will be.

    path: its URL
    stem: path of the copy's files without their suffixes; ends in the size in bytes
    """

    path: str
    stat: ShardStat
    stem: Path

    @property
    def copy(self) -> Path:
        return Path(f"{self.stem}.shard")

    @property
    def part(self) -> Path:
        return Path(f"{self.stem}.part")

    @property
    def stamp(self) -> Path:
        return Path(f"{self.stem}.json")

    @property
    def lock(self) -> Path:
        return Path(f"{self.stem}.lock")

    @property
    def room_lock(self) -> Path:
        return self.stem.parent / "room.lock"


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies.

    limit: most bytes in it, unfinished transfers counted in full
    """

    folder: Path
    limit: int

    def file(self, path: str, stat: ShardStat) -> CachedFile:
        """A remote shard through its copy, which is fetched on the first read."""
        return CachedFile(self, path, stat)

    def entry(self, path: str, stat: ShardStat) -> Entry:
        digest = hashlib.blake2b(json.dumps([path, *stat]).encode(), digest_size=12).hexdigest()
        name = re.sub(r"[^\w.-]", "_", path.rstrip("/").rpartition("/")[2])[:60]
        return Entry(path, stat, self.folder / f"{name}-{digest}-{stat.size}")

    def acquire(self, path: str, stat: ShardStat) -> int | None:
        """A descriptor of the copy, fetched if need be, which bars its eviction; None if the shard has no room here.

        Raises:
            ShardChanged: the server has another shard than the one of this size and version.
            OSError: the disk or the network failed.
        """
        entry = self.entry(path, stat)
        if stat.size > self.limit:
            _warn_once(self, "larger", f"{path}: its {stat.size} bytes are more than the cache's limit {self.limit}")
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        if (descriptor := _open(entry)) is not None:
            return descriptor
        with _alone(entry) as alone:
            if not alone:
                return None
            if (descriptor := _open(entry)) is not None:
                return descriptor  # another process has just fetched it
            while not self._fetch(entry):
                if not _release_oldest(self):
                    _warn_once(self, "full", f"{path}: no room in the cache, its limit is too small for what is in use")
                    return None
            return _open(entry)

    def fetch_ahead(self, path: str, stat: ShardStat) -> None:
        """Sees to it that a sound copy is there, unless another process is at it or all room is in use."""
        entry = self.entry(path, stat)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(entry)
        if descriptor is None:
            with suppress(Timeout), FileLock(entry.lock).acquire(timeout=0):
                descriptor = _open(entry)
                if descriptor is None:
                    self._fetch(entry)
        if descriptor is not None:
            os.close(descriptor)

    def _fetch(self, entry: Entry) -> bool:
        """Transfers a shard and makes it an entry; False if the limit or the disk has no room. Needs the entry's lock.

        A copy that is there was found damaged and is replaced.
        """
        remote = RemoteFile(entry.path)
        try:
            check_unchanged(remote, entry.stat)
            if entry.copy.exists():
                logger.warning("%s: its copy %s is not what was fetched; fetching it again", entry.path, entry.copy)
            if not self._make_room(entry):
                return False
            started = time.monotonic()
            _transfer(remote, entry)
            check_unchanged(remote, entry.stat)
        except ShardChanged:
            entry.part.unlink(missing_ok=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("%s: the disk of %s is full: %s", entry.path, self.folder, error)
            entry.part.unlink(missing_ok=True)
            return False
        _publish(entry)
        logger.info("fetched %s in %.1f s to %s", entry.path, time.monotonic() - started, entry.copy)
        return True

    def _make_room(self, entry: Entry) -> bool:
        """Evicts what was used longest ago until the entry fits, and reserves its place; False if it cannot fit."""
        with FileLock(entry.room_lock):
            used: dict[Path, float] = {}
            for file in self.folder.iterdir():
                if file.suffix in (".shard", ".part", ".json"):
                    with suppress(FileNotFoundError):  # a transfer that was given up
                        stem = file.with_suffix("")
                        used[stem] = max(used.get(stem, 0), file.stat().st_mtime)
            used.pop(entry.stem, None)
            excess = sum(map(_size, used)) + entry.stat.size - self.limit
            for stem in sorted(used, key=lambda stem: used[stem]):
                if excess <= 0:
                    break
                if _evict(stem):
                    excess -= _size(stem)
            if excess > 0:
                return False
            entry.part.touch()
            return True


class CachedFile(ShardFile):
    """A remote shard read from its copy; in place, by ranges, where the cache has no room for it.

    Size and version are those it was opened with: the copy is of these, whatever the server has by now.
    """

    def __init__(self, cache: ShardCache, path: str, stat: ShardStat) -> None:
        self.cache = cache
        self.path = path
        self.read_at = 0.0
        self._stat = stat
        self._process = os.getpid()
        self._lock = threading.Lock()  # another thread may release the descriptor
        self._descriptor: int | None = None
        self._close = lambda: None
        self._in_place = False
        self._remote: RemoteFile | None = None

    def stat(self) -> ShardStat:
        return self._stat

    def fingerprint(self) -> ShardFingerprint:
        return remote_fingerprint(self._stat)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self.read_at = time.monotonic()
            if self._descriptor is None and not self._in_place:
                self._acquire()
            if self._descriptor is not None:
                data = os.pread(self._descriptor, size, offset)
                if len(data) == max(0, min(size, self._stat.size - offset)):
                    return data
                logger.warning("%s: its copy was cut while it was read; reading it in place", self.path)
                self._give_up()
            if self._remote is None:
                remote = RemoteFile(self.path)
                check_unchanged(remote, self._stat)
                self._remote = remote
            return self._remote.read(offset, size)

    def stream(self) -> IO[bytes]:
        return buffered_stream(self, self._stat.size)

    def close(self) -> None:
        with self._lock:
            self._free()

    def release(self) -> bool:
        """Frees the copy for eviction, reading in place from now on; False if there is none, or it is being read.

        Not fetching it again keeps a limit below what is in use from moving every shard for every sample.
        """
        if self._process != os.getpid() or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._descriptor is None:
                return False
            self._give_up()
            return True
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        self._descriptor = self.cache.acquire(self.path, self._stat)
        if self._descriptor is None:
            self._give_up()
        else:
            self._close = weakref.finalize(self, os.close, self._descriptor)
            _held.add(self)

    def _give_up(self) -> None:
        self._free()
        self._in_place = True

    def _free(self) -> None:
        if self._descriptor is None:
            return
        if self._process == os.getpid():  # a forked child's unlocking would be its parent's
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()
        self._descriptor = None
        _held.discard(self)


_held: weakref.WeakSet[CachedFile] = weakref.WeakSet()
"""What this process has open."""
_sound: set[tuple[str, int, int, int]] = set()
"""Copies whose checksum this process has seen to be right: path, inode, bytes, mtime in ns."""
_warned: set[tuple[Path, str]] = set()


def _warn_once(cache: ShardCache, kind: str, message: str) -> None:
    if (cache.folder, kind) not in _warned:
        _warned.add((cache.folder, kind))
        logger.warning("%s: reading it in place, and others like it without a word (data.cache.limit)", message)


def _release_oldest(cache: ShardCache) -> bool:
    """Frees the copy of a cache that this process has not read for longest; False if it holds none."""
    held = sorted((file for file in _held if file.cache.folder == cache.folder), key=lambda file: file.read_at)
    return any(file.release() for file in held)


@contextmanager
def _alone(entry: Entry) -> Iterator[bool]:
    """Holds an entry's lock, waiting as long as its holder's transfer grows; False where it does not."""
    lock, size = FileLock(entry.lock), -1
    while True:
        try:
            lock.acquire(timeout=PATIENCE)
            break
        except Timeout:
            before, size = size, entry.part.stat().st_size if entry.part.exists() else -1
            if size <= before:
                logger.warning("%s: another process's transfer stands still; reading it in place", entry.path)
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


def _open(entry: Entry) -> int | None:
    """A descriptor of a sound copy under a shared lock, None if there is none."""
    while True:
        try:
            descriptor = os.open(entry.copy, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # evicted since it was opened
    if not _is_sound(entry, descriptor):
        os.close(descriptor)
        return None
    with suppress(FileNotFoundError):  # removed by hand
        os.utime(entry.stamp)  # the date of its last use
    return descriptor


def _is_sound(entry: Entry, descriptor: int) -> bool:
    """Whether a copy is what was fetched, by size and, once a process, checksum."""
    found = os.fstat(descriptor)
    identity = (str(entry.copy), found.st_ino, found.st_size, found.st_mtime_ns)
    if identity in _sound:
        return True
    try:
        stamp = json.loads(entry.stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    if (
        found.st_size != entry.stat.size
        or not isinstance(stamp, dict)
        or stamp.get("checksum") != _checksum(descriptor)
    ):
        return False
    _sound.add(identity)
    return True


def _checksum(descriptor: int) -> str:
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _transfer(remote: RemoteFile, entry: Entry) -> None:
    """Fills the part. A part that is there is gone on with, if the server gives versions to know it by."""
    with entry.part.open("r+b") as part:
        written = part.seek(0, os.SEEK_END)
        # The last chunk may have lost the race with a power failure; those before were on disk when it began.
        done = max(0, min(written, entry.stat.size) - 1) // CHUNK * CHUNK if entry.stat.version else 0
        if done:
            logger.info("%s: going on at byte %d of %d", entry.path, done, entry.stat.size)
        part.truncate(done)
        part.seek(done)
        while done < entry.stat.size:
            chunk = remote.read_exactly(done, min(CHUNK, entry.stat.size - done))
            part.write(chunk)
            part.flush()
            os.fsync(part.fileno())
            done += len(chunk)


def _publish(entry: Entry) -> None:
    """Makes a complete part the copy, with its stamp beside it."""
    with entry.part.open("rb") as part:
        checksum, found = _checksum(part.fileno()), os.fstat(part.fileno())
    stamp = {"url": entry.path, "size": entry.stat.size, "version": entry.stat.version, "checksum": checksum}
    unfinished = entry.stamp.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(stamp, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(entry.stamp)
    with FileLock(entry.room_lock):  # whoever adds up sizes sees the one or the other
        entry.part.replace(entry.copy)
    folder = os.open(entry.copy.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    _sound.add((str(entry.copy), found.st_ino, found.st_size, found.st_mtime_ns))


def _size(stem: Path) -> int:
    """Bytes of an entry when it is complete."""
    size = stem.name.rpartition("-")[2]
    return int(size) if size.isdecimal() else 0


def _evict(stem: Path) -> bool:
    """Removes an entry, unless somebody fetches or reads it."""
    entry = Entry("", ShardStat(0, ""), stem)
    try:
        with FileLock(entry.lock).acquire(timeout=0):
            if entry.copy.exists():
                with entry.copy.open("rb") as copy:
                    fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    entry.copy.unlink()
            entry.part.unlink(missing_ok=True)
            entry.stamp.unlink(missing_ok=True)
            return True
    except (Timeout, BlockingIOError):
        return False


# ------------------------------------------------------------------------------------------------------------- ahead


class _Ahead:
    """One daemon thread a process that fetches what comes next. It ends with its work, or with the process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._wanted: deque[tuple[ShardCache, str, ShardStat]] = deque()
        self._thread: threading.Thread | None = None

    def want(self, cache: ShardCache, shards: Iterable[tuple[str, ShardStat]]) -> None:
        with self._lock:
            self._wanted = deque((cache, path, stat) for path, stat in shards)
            if self._thread is None and self._wanted:
                self._thread = threading.Thread(target=self._work, name="shards ahead", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                cache, path, stat = self._wanted.popleft()
            try:
                cache.fetch_ahead(path, stat)
            except Exception as error:  # the reader who needs the shard meets it again, and knows what to do
                logger.warning("fetching ahead failed: %s: %r", path, error)


_ahead = _Ahead()


def fetch_ahead(cache: ShardCache, shards: Iterable[tuple[str, ShardStat]]) -> None:
    """Fetches copies of shards in the background, in order, instead of what the call before has left undone.

    Only the first of them, as many as half of the limit holds: what is in use needs room as well.
    """
    global _ahead
    if _ahead.process != os.getpid():
        _ahead = _Ahead()  # a forked child has its parent's locks and none of its threads
    chosen, size = [], 0
    for path, stat in shards:
        size += stat.size
        if size > cache.limit // 2:
            break
        chosen.append((path, stat))
    _ahead.want(cache, chosen)
