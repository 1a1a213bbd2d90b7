"""What this machine's disk keeps of shards, under a limit of bytes, shared by all processes and runs.

    Content ──▶ <entry>.part ──fill, fsync──▶ checksum ──▶ <entry>.json, <entry>.shard ──▶ reads
                    └─ a transfer broke off? it goes on here         └─ checked once a process

A content is the copy of a remote shard, or the rows of a parquet file (`mm.data.rows`). It is named by all that its
bytes depend on, the size and version of the shard among it, so that an entry never stands for another shard than the
one that was indexed. Three locks, which the kernel frees with their owner, keep processes apart: one an entry for
whoever makes it, one on the folder for whoever makes room, and a shared one on every entry that is being read, which is
not evicted. (An entry that is removed by hand stays readable, on Linux, to those who have it open.) The folder belongs
on a local disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, NamedTuple, TypeVar

from filelock import FileLock, Timeout

from mm import terminal
from mm.data.files import (
    PinnedFile,
    RemoteFile,
    ShardChanged,
    ShardFile,
    ShardFingerprint,
    ShardStat,
    buffered_stream,
    check_unchanged,
)

logger = terminal.logger(__name__)

T = TypeVar("T")

CHUNK = 16 * 1024**2
"""Bytes of a request, after which a transfer is on disk. One that was broken off repeats at most its last chunk."""
PATIENCE = 60.0
"""Seconds in which another process must write to the entry it makes, or its shard is read in place."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass
class CacheOptions:
    """Local copies of remote shards and of the rows of parquet, see docs/remote.md.

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
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([A-Za-z]*)", text.strip())
    unit = (match[2] or "B") if match else ""
    if match is None or unit not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is no number of bytes; write one such as 100GB, with a unit of {', '.join(_UNITS)}")
    return int(float(match[1]) * _UNITS[unit])


class Entry(NamedTuple):
    """Where a content is or will be.

    stem: path of its files without their suffixes
    """

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

    @property
    def promised(self) -> int:
        """Bytes when it is complete, 0 where that is not known before."""
        size = self.stem.name.rpartition("-")[2]
        return int(size) if size.isdecimal() else 0

    @property
    def size(self) -> int:
        """Bytes that are to be counted: those when it is complete, or those that it takes by now."""
        size = self.promised
        for file in () if size else (self.copy, self.part):
            with suppress(FileNotFoundError):
                size += file.stat().st_size
        return size


class NotKept(RuntimeError):
    """An entry that cannot be made, so that what it is for is read in place.

    kind: of the reason; of each kind a process tells the first
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Content(ABC):
    """What an entry holds.

    path, stat: of the shard that it is made from
    """

    path: str
    stat: ShardStat

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of its entry: depends on all that its bytes depend on, and ends in their number, see `entry_name`."""

    @abstractmethod
    def check(self) -> None:
        """Raises `ShardChanged` where the shard is another one by now."""

    @abstractmethod
    def fill(self, part: Path, reserve: Callable[[int], None]) -> None:
        """Writes all of it to `part`, so that it outlives a power failure.

        Args:
            reserve: is told how many bytes it will take, before it takes them; more than once if need be.

        Raises:
            NotKept: from `reserve`, or because the content has no form on disk.
            OSError: the disk or the network failed.
        """


def entry_name(shard: str, identity: list[str | int], size: int) -> str:
    """Name of an entry: of a shard for people, a digest of all that its bytes depend on, and their number.

    Args:
        size: bytes; 0 where they are not known before.
    """
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
    name = re.sub(r"[^\w.-]", "_", shard.rstrip("/").rpartition("/")[2])[:60]
    return f"{name}-{digest}-{size}"


@dataclass(frozen=True)
class ShardCopy(Content):
    """All bytes of a remote shard."""

    path: str
    stat: ShardStat

    @property
    def name(self) -> str:
        return entry_name(self.path, [self.path, *self.stat], self.stat.size)

    def check(self) -> None:
        check_unchanged(RemoteFile(self.path), self.stat)

    def fill(self, part: Path, reserve: Callable[[int], None]) -> None:
        """Goes on with a part that is there, if the server gives versions to know it by."""
        reserve(self.stat.size)
        remote = RemoteFile(self.path)
        with part.open("r+b") as file:
            written = file.seek(0, os.SEEK_END)
            # The last chunk may have lost the race with a power failure; those before were on disk when it began.
            done = max(0, min(written, self.stat.size) - 1) // CHUNK * CHUNK if self.stat.version else 0
            if done:
                logger.info("%s: going on at byte %d of %d", self.path, done, self.stat.size)
            file.truncate(done)
            file.seek(done)
            while done < self.stat.size:
                chunk = remote.read_exactly(done, min(CHUNK, self.stat.size - done))
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                done += len(chunk)


@dataclass(frozen=True)
class ShardCache:
    """A folder of entries.

    limit: most bytes in it, unfinished transfers counted in full
    """

    folder: Path
    limit: int

    def file(self, path: str, stat: ShardStat) -> CachedFile:
        """A remote shard through its copy, which is fetched on the first read."""
        return CachedFile(self, path, stat)

    def entry(self, content: Content) -> Entry:
        return Entry(self.folder / content.name)

    def acquire(self, content: Content) -> int | None:
        """A descriptor of an entry, made if need be, which bars its eviction; None if it is not kept.

        Raises:
            ShardChanged: the shard is another one than that of this size and version.
            OSError: the disk or the network failed.
        """
        entry = self.entry(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (descriptor := _open(entry)) is not None:
            return descriptor
        with _alone(entry, content) as alone:
            if not alone:
                return None
            if (descriptor := _open(entry)) is not None:
                return descriptor  # another process has just made it
            try:
                self._make(content, entry, self._find_room)
            except NotKept as reason:
                _warn_once(self, content, reason)
                return None
            return _open(entry)

    def fetch_ahead(self, content: Content) -> None:
        """Sees to it that a sound entry is there, unless another process is at it or all room is in use."""
        entry = self.entry(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(entry)
        if descriptor is None:
            with suppress(Timeout, NotKept), FileLock(entry.lock).acquire(timeout=0):
                descriptor = _open(entry)
                if descriptor is None:
                    self._make(content, entry, self._make_room)
        if descriptor is not None:
            os.close(descriptor)

    def _make(self, content: Content, entry: Entry, find_room: Callable[[Entry, int], bool]) -> None:
        """Fills an entry and puts it under its name. Needs the entry's lock.

        One that is there was found damaged and is replaced.
        """

        def reserve(size: int) -> None:
            if size > self.limit:
                raise NotKept("larger", f"its {size} bytes are more than the cache's limit {self.limit}")
            if not find_room(entry, size):
                raise NotKept("full", "no room in the cache, its limit is too small for what is in use")

        try:
            content.check()
            if entry.copy.exists():
                logger.warning("%s: %s is not what was written; making it anew", content.path, entry.copy)
            started = time.monotonic()
            content.fill(entry.part, reserve)
            content.check()
        except (ShardChanged, NotKept):
            entry.part.unlink(missing_ok=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            entry.part.unlink(missing_ok=True)
            raise NotKept("disk", f"the disk of {self.folder} is full: {error}") from error
        _publish(entry, content)
        logger.info("%s: made %s in %.1f s", content.path, entry.copy, time.monotonic() - started)

    def _find_room(self, entry: Entry, size: int) -> bool:
        """Makes room, at the price of what this process has open."""
        while not self._make_room(entry, size):
            if not _release_oldest(self):
                return False
        return True

    def _make_room(self, entry: Entry, size: int) -> bool:
        """Evicts what was used longest ago until `size` bytes fit, and reserves them; False if they cannot."""
        with FileLock(entry.room_lock):
            used: dict[Path, float] = {}
            for file in self.folder.iterdir():
                if file.suffix in (".shard", ".part", ".json"):
                    with suppress(FileNotFoundError):  # a transfer that was given up
                        stem = file.with_suffix("")
                        used[stem] = max(used.get(stem, 0), file.stat().st_mtime)
            used.pop(entry.stem, None)
            sizes = {stem: Entry(stem).size for stem in used}
            excess = sum(sizes.values()) + size - self.limit
            for stem in sorted(used, key=lambda stem: used[stem]):
                if excess <= 0:
                    break
                if _evict(Entry(stem)):
                    excess -= sizes[stem]
            if excess > 0:
                return False
            entry.part.touch()
            if not entry.promised:
                os.truncate(entry.part, size)  # counted by its size, from now on by this one
            return True


class Hold(Generic[T]):
    """This process's hold on an entry, which is made on the first use and not evicted until it is let go.

        with hold as opened: …     None where it is not kept, and what it is for is to be read in place

    Args:
        opens: makes of the entry's descriptor what is read from.
    """

    def __init__(self, cache: ShardCache, content: Content, opens: Callable[[int], T]) -> None:
        self.cache = cache
        self.content = content
        self.used_at = 0.0
        self._opens = opens
        self._process = os.getpid()
        self._lock = threading.Lock()  # another thread may release it
        self._descriptor: int | None = None
        self._opened: T | None = None
        self._close = lambda: None
        self._in_place = False

    def __enter__(self) -> T | None:
        self._lock.acquire()
        try:
            self.used_at = time.monotonic()
            if self._descriptor is None and not self._in_place:
                self._acquire()
            return self._opened
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def give_up(self) -> None:
        """Lets it go for good. The caller is inside of ``with``."""
        self._free()
        self._in_place = True

    def close(self) -> None:
        with self._lock:
            self._free()

    def release(self) -> bool:
        """Gives it up for eviction; False if there is nothing to give, or it is being read.

        Not making it again keeps a limit below what is in use from moving every shard for every sample.
        """
        if self._process != os.getpid() or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._descriptor is None:
                return False
            self.give_up()
            return True
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        self._descriptor = self.cache.acquire(self.content)
        if self._descriptor is None:
            self.give_up()
            return
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._opened = self._opens(self._descriptor)
        _held.add(self)

    def _free(self) -> None:
        if self._descriptor is None:
            return
        self._opened = None
        if self._process == os.getpid():  # a forked child's unlocking would be its parent's
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()
        self._descriptor = None
        _held.discard(self)


class CachedFile(ShardFile):
    """A remote shard read from its copy; in place, by ranges, where the cache has no room for it.

    Size and version are those it was opened with: the copy is of these, whatever the server has by now.
    """

    def __init__(self, cache: ShardCache, path: str, stat: ShardStat) -> None:
        self.path = path
        self._stat = stat
        self._copy = Hold(cache, ShardCopy(path, stat), int)
        self._remote = PinnedFile(path, stat)

    def stat(self) -> ShardStat:
        return self._remote.stat()

    def fingerprint(self) -> ShardFingerprint:
        return self._remote.fingerprint()

    def read(self, offset: int, size: int) -> bytes:
        with self._copy as descriptor:
            if descriptor is not None:
                data = os.pread(descriptor, size, offset)
                if len(data) == max(0, min(size, self._stat.size - offset)):
                    return data
                logger.warning("%s: its copy was cut while it was read; reading it in place", self.path)
                self._copy.give_up()
            return self._remote.read(offset, size)

    def stream(self) -> IO[bytes]:
        return buffered_stream(self, self._stat.size)

    def close(self) -> None:
        self._copy.close()


_held: weakref.WeakSet[Hold] = weakref.WeakSet()
"""What this process has open."""
_sound: set[tuple[str, int, int, int]] = set()
"""Entries whose checksum this process has seen to be right: path, inode, bytes, mtime in ns."""
_warned: set[tuple[Path, str]] = set()


def _warn_once(cache: ShardCache, content: Content, reason: NotKept) -> None:
    if (cache.folder, reason.kind) not in _warned:
        _warned.add((cache.folder, reason.kind))
        what = "reading it in place, and others like it without a word (data.cache.limit)"
        logger.warning("%s: %s: %s", content.path, reason, what)


def _release_oldest(cache: ShardCache) -> bool:
    """Frees the entry of a cache that this process has not read for longest; False if it holds none."""
    held = sorted((hold for hold in _held if hold.cache.folder == cache.folder), key=lambda hold: hold.used_at)
    return any(hold.release() for hold in held)


@contextmanager
def _alone(entry: Entry, content: Content) -> Iterator[bool]:
    """Holds an entry's lock, waiting as long as its holder writes to its part; False where it does not."""
    lock, written = FileLock(entry.lock), -1
    while True:
        try:
            lock.acquire(timeout=PATIENCE)
            break
        except Timeout:
            before, written = written, entry.part.stat().st_mtime_ns if entry.part.exists() else -1
            if written <= before:
                logger.warning("%s: another process's transfer stands still; reading it in place", content.path)
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


def _open(entry: Entry) -> int | None:
    """A descriptor of a sound entry under a shared lock, None if there is none."""
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
    """Whether an entry is what was written, by its checksum, once a process."""
    found = os.fstat(descriptor)
    identity = (str(entry.copy), found.st_ino, found.st_size, found.st_mtime_ns)
    if identity in _sound:
        return True
    try:
        stamp = json.loads(entry.stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(stamp, dict) or stamp.get("checksum") != _checksum(descriptor):
        return False
    _sound.add(identity)
    return True


def _checksum(descriptor: int) -> str:
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _publish(entry: Entry, content: Content) -> None:
    """Puts a complete part under its name, with its stamp beside it."""
    with entry.part.open("rb") as part:
        checksum, found = _checksum(part.fileno()), os.fstat(part.fileno())
    stamp = {"shard": content.path, **content.stat._asdict(), "size": found.st_size, "checksum": checksum}
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


def _evict(entry: Entry) -> bool:
    """Removes an entry, unless somebody makes or reads it."""
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
    """One daemon thread a process that makes the entries of what comes next. It ends with its work, or the process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._wanted: deque[tuple[ShardCache, Content]] = deque()
        self._thread: threading.Thread | None = None

    def want(self, cache: ShardCache, contents: Iterable[Content]) -> None:
        with self._lock:
            self._wanted = deque((cache, content) for content in contents)
            if self._thread is None and self._wanted:
                self._thread = threading.Thread(target=self._work, name="shards ahead", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                cache, content = self._wanted.popleft()
            try:
                cache.fetch_ahead(content)
            except Exception as error:  # the reader who needs the shard meets it again, and knows what to do
                logger.warning("fetching ahead failed: %s: %r", content.path, error)


_ahead = _Ahead()


def fetch_ahead(cache: ShardCache, contents: Iterable[Content]) -> None:
    """Makes entries in the background, in order, instead of those that the call before has left undone.

    Only the first of them, as many as half of the limit holds: what is in use needs room as well.
    """
    global _ahead
    if _ahead.process != os.getpid():
        _ahead = _Ahead()  # a forked child has its parent's locks and none of its threads
    chosen, size = [], 0
    for content in contents:
        size += content.stat.size
        if size > cache.limit // 2:
            break
        chosen.append(content)
    _ahead.want(cache, chosen)
