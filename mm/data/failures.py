"""Memory, disks and permissions that end a command, in sentences: what was done, what failed where, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ACCESS = "Change the permissions, or name another place"
_NO_FOLDER = "A folder is expected there: name another place, or remove what is in the way"
_ADVICE = {
    errno.ENOSPC: "Free some space, or write to another disk",
    errno.EDQUOT: "The quota is used up: free some space, or write to another disk",
    errno.EFBIG: "No file may be so large (`ulimit -f`, or the file system): raise the limit, or write smaller shards",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: "Nothing can be written there: name another place",
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "A file is expected there: name another place, or remove the folder",
    errno.ENAMETOOLONG: "Name a place with a shorter path",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
}


class Stopped(RuntimeError):
    """Work that memory, a disk or permissions ended; the message says what to do."""


@contextmanager
def in_sentences(work: str, place: Path, memory: str) -> Iterator[None]:
    """Turn errors of memory, disk space and permissions into `Stopped`; all others pass.

    Args:
        work: names it in the message, such as ``mm index``.
        place: where it writes, for errors that name no file.
        memory: says what to do if memory runs out.
    """
    try:
        yield
    except MemoryError as error:
        raise Stopped(f"{work}: not enough memory. {memory}") from error
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        where = place if error.filename is None else error.filename
        raise Stopped(f"{work}: {os.strerror(error.errno)}: {where}. {_ADVICE[error.errno]}") from error
