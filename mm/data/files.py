"""Bytes of shards, local or behind any fsspec URL, and what tells that they have not changed.

    LocalFile     a path, read by `pread`
    RemoteFile    a URL, read by ranges; every request is tried three times
    PinnedFile    a URL of known size and version, not asked before it is read from

A disk or a network that fails raises, since it must never change which samples there are.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import aiohttp
import fsspec

from mm import terminal

logger = terminal.logger(__name__)

T = TypeVar("T")

PAUSES = (0.5, 2.0)
"""Seconds to wait before a request that failed is tried again."""

COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gunzip"),
    ".tgz": (b"\x1f\x8b", "gunzip"),
    ".bz2": (b"BZh", "bunzip2"),
    ".xz": (b"\xfd7zXZ", "unxz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
}
"""First bytes of compressed files, and the command that undoes it."""
HEAD = 256
"""First bytes of a shard that tell what it is."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class ShardError(ValueError):
    """A shard that cannot be read as what its card says it is."""


class RequestFailed(OSError):
    """A server or a network that failed. Of its own type, since it must never be taken for a damaged file."""


class ShardChanged(RuntimeError):
    """A shard that is not the one that was indexed: places and columns would silently mean other samples."""


class ShardStat(NamedTuple):
    """What tells cheaply that a shard has not changed: size in bytes, and mtime in ns (disk), ETag or date (URL).

    A date is only ever compared with itself, never with another clock, so that a server's may be wrong.
    """

    size: int
    version: str


class ShardFingerprint(NamedTuple):
    """Size in bytes and checksum of the content; of a URL, which is not downloaded for it, of size and version."""

    size: int
    checksum: str


class ShardFile(ABC):
    """Bytes of a shard, local or remote."""

    path: str

    @abstractmethod
    def stat(self) -> ShardStat:
        """Size and version as they are now."""

    @abstractmethod
    def fingerprint(self) -> ShardFingerprint: ...

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end."""

    @abstractmethod
    def stream(self) -> IO[bytes]:
        """A seekable file for sequential reading."""

    @abstractmethod
    def close(self) -> None:
        """Frees what `read` keeps open."""


class LocalFile(ShardFile):
    """A shard on disk. Anything but a regular file is refused before it is opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def stat(self) -> ShardStat:
        found = os.stat(self.path)  # noqa: PTH116  once a sample: pathlib takes three times as long
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{self.path} is {_kind(found.st_mode)}, not a file: give the path of a shard")
        return ShardStat(found.st_size, str(found.st_mtime_ns))

    def fingerprint(self) -> ShardFingerprint:
        self.stat()
        with Path(self.path).open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return ShardFingerprint(file.tell(), digest.hexdigest())

    def read(self, offset: int, size: int) -> bytes:
        if self._descriptor is None:
            self.stat()  # opening a named pipe would wait for a writer
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return os.pread(self._descriptor, size, offset)

    def stream(self) -> IO[bytes]:
        self.stat()
        return Path(self.path).open("rb", buffering=1024**2)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _kind(mode: int) -> str:
    return next((name for test, name in _SPECIAL if test(mode)), "no regular file")


class RemoteFile(ShardFile):
    """A shard behind an fsspec URL, read by ranges; every request is tried three times."""

    _VERSIONS = (
        *("ETag", "etag", "Content-MD5", "md5Hash"),
        *("Last-Modified", "LastModified", "last_modified", "mtime", "created"),
    )

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = fsspec.url_to_fs(path)

    def stat(self) -> ShardStat:
        info = _retried(self.path, lambda: self._system.info(self._inner))
        if info.get("type", "file") != "file":
            raise ShardError(f"{self.path} is a {info['type']}, not a file: give the address of a shard")
        if info.get("size") is None:
            raise ShardError(f"{self.path}: the server gives no size; download the shard, or use a server with ranges")
        return ShardStat(info["size"], next((str(info[key]) for key in self._VERSIONS if info.get(key)), ""))

    def fingerprint(self) -> ShardFingerprint:
        stat = self.stat()
        digest = hashlib.blake2b(f"{stat.size} {stat.version}".encode(), digest_size=16)
        return ShardFingerprint(stat.size, digest.hexdigest())

    def read(self, offset: int, size: int) -> bytes:
        return _retried(self.path, lambda: self._range(offset, size))

    def read_exactly(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer, of a shard that is known to be longer, are a failed request."""
        return _retried(self.path, lambda: self._whole_range(offset, size))

    def _range(self, offset: int, size: int) -> bytes:
        data = self._system.cat_file(self._inner, start=offset, end=offset + size)
        if len(data) > size:
            # A server without ranges answers with the whole file, whose beginning would pass for the sample.
            raise ShardError(f"{self.path}: the server ignores ranges; download the shard, or use another server")
        return data

    def _whole_range(self, offset: int, size: int) -> bytes:
        data = self._range(offset, size)
        if len(data) != size:
            raise RequestFailed(f"{self.path}: the server gave {len(data)} of {size} bytes at {offset}")
        return data

    def stream(self) -> IO[bytes]:
        return buffered_stream(self, self.stat().size)

    def close(self) -> None:
        """Requests keep nothing open."""


class PinnedFile(RemoteFile):
    """A remote shard of known size and version. The server is not asked before it is read from."""

    def __init__(self, path: str, stat: ShardStat) -> None:
        super().__init__(path)
        self._stat = stat
        self._read = False

    def stat(self) -> ShardStat:
        return super().stat() if self._read else self._stat

    def read(self, offset: int, size: int) -> bytes:
        if not self._read:
            self._read = True
            check_unchanged(self, self._stat)
        return super().read(offset, size)


def buffered_stream(file: ShardFile, size: int) -> IO[bytes]:
    """A seekable file of `size` bytes over `file.read`, so that a long scan survives a failed request."""
    return io.BufferedReader(_Ranges(file, size), 4 * 1024**2)


class _Ranges(io.RawIOBase):
    def __init__(self, file: ShardFile, size: int) -> None:
        self._file, self._size, self._position = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._file.read(self._position, wanted)
        if len(data) != wanted:  # taken for the end of the shard, it would cost the samples that follow
            given = f"the server gave {len(data)} of {wanted} bytes at {self._position}"
            raise RequestFailed(f"{self._file.path}: {given}")
        buffer[:wanted] = data
        self._position += len(data)
        return len(data)


def _retried(path: str, request: Callable[[], T]) -> T:
    """The answer to a request, which is tried three times unless the file is not there or not allowed."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except (OSError, aiohttp.ClientError) as error:
            cause = _true_cause(error)
            if isinstance(cause, FileNotFoundError | PermissionError):
                raise
            if pause is None:
                raise RequestFailed(f"{path}: request failed three times: {cause!r}") from error
            logger.warning("%s: request failed, next try in %s s: %r", path, pause, cause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _true_cause(error: Exception) -> BaseException:
    """What went wrong: fsspec calls whatever befalls a HEAD request `FileNotFoundError`."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) not in (404, 410):
        return cause
    return error


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL (``s3://…``, ``simplecache::https://…``) and not a local file."""
    return "://" in path and not path.startswith("file://")


def check_unchanged(file: ShardFile, expected: ShardStat) -> None:
    """Raises `ShardChanged` where the file is not the expected one by size and version."""
    found = file.stat()
    if found != expected:
        raise ShardChanged(
            f"{file.path}: was {expected} when it was indexed, is {found}; shards must not change under a run. "
            "Restore it, or index again and start a new stage"
        )


def open_file(path: str) -> ShardFile:
    """The bytes of a shard where they lie."""
    if path.startswith("pipe:"):
        refuse_unreadable(path)
    return RemoteFile(path) if is_remote(path) else LocalFile(path.removeprefix("file://"))


def refuse_unreadable(path: str, head: bytes = b"") -> None:
    """Raises `ShardError` for what is no shard to read at random, by its path or its first `HEAD` bytes.

    That is a command (``pipe:``), a compressed file, or the pointer that git-lfs keeps in place of a file.
    """
    if path.startswith("pipe:"):
        address = re.search(r"(?:https?|s3|gs|hdfs|ftp)://[^\s'\"|;]+", path)
        instead = f"the address itself, {address[0]}" if address else "the path or the URL of the file"
        raise ShardError(f"{path}: a command, which is never run: write {instead}, in its place")
    if head.startswith(_LFS_POINTER):
        raise ShardError(
            f"{path} is a git-lfs pointer of {len(head)} bytes, not the file: run `git lfs pull` in its repository"
        )
    for suffix, (magic, command) in COMPRESSED.items():
        if path.endswith(suffix) or head.startswith(magic):
            raise ShardError(
                f"{path} is compressed, so that a sample in it cannot be read without all before it. Convert "
                f"it once: {command} {shlex.quote(path)}"
            )
