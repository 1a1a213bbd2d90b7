"""The files below a folder that a builder may read: plain files of a bounded size, in the folder itself.

A link is followed where it leads to a place inside of the folder. One that leads out of it is left out and counted,
unless the user says ``follow_links=true``. The paths in a record come from outside: none of them leaves the folder,
whatever the user says. Devices, pipes and folders are never opened as files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mm.data.hidden import is_hidden
from mm.data.shards import MAX_RECORD
from mm.data.sources.writer import Skips, Unusable

LEADS_OUT = "a link that leads out of the folder; follow_links=true reads it"
NOT_THERE = "the file is not there"
_REASONS = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG), NOT_THERE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission to read"),
}


class Folder:
    """A folder of the user's, see the module.

    Args:
        path: the folder; may itself be a link.
        follow_links: read also what links outside of it lead to.

    Raises:
        FileNotFoundError: no folder there.
    """

    def __init__(self, path: Path, follow_links: bool) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"no folder at {path}")
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  `Path.absolute` keeps ..
        self.root = path.resolve()
        self.follow_links = follow_links

    def inside(self, name: str) -> PurePosixPath:
        """The path below the folder that a record gives, absolute or from the folder on.

        Raises:
            Unusable: it leads out of the folder.
        """
        path = PurePosixPath(os.path.normpath(self.path / name))
        for root in (self.path, self.root):
            if path.is_relative_to(root):
                return path.relative_to(root)
        raise Unusable("the path of a picture leads out of the folder")

    def read(self, place: PurePosixPath, limit: int = MAX_RECORD) -> bytes:
        """The content of a file.

        Args:
            place: path below the folder.
            limit: bytes of it at most.

        Raises:
            Unusable: it is not there, not a plain file, larger than the limit, or not to be read.
            OSError: the disk failed.
        """
        try:
            path = self._real(place)
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise Unusable(f"not a plain file: {_kind(found.st_mode)}")
            if found.st_size > limit:
                raise Unusable(f"file too large: over the limit of {MAX_RECORD} bytes of a record")
            with path.open("rb") as file:
                data = file.read(limit + 1)  # of some files the size is not known
        except OSError as error:
            raise _unusable(error) from error
        if len(data) > limit:
            raise Unusable(f"file too large: over the limit of {MAX_RECORD} bytes of a record")
        return data

    def files(self, skips: Skips) -> list[PurePosixPath]:
        """The paths of all files below the folder, sorted. Hidden ones and links that are not followed are counted.

        A folder to which several links lead is read through the first of them, and none is read below itself.
        """
        files: list[PurePosixPath] = []
        linked: set[tuple[int, int]] = set()
        pending = [(PurePosixPath(), frozenset({_identity(self.root.stat())}))]
        while pending:
            folder, above = pending.pop()
            for place, is_link in self._entries(folder, skips):
                try:
                    found = (self.root / place).stat()
                    if not stat.S_ISDIR(found.st_mode):
                        files.append(place)
                        continue
                    identity = _identity(found)
                    if is_link:
                        self._real(place)
                        if identity in above or identity in linked:
                            raise Unusable("a link to a folder that is read already")
                        linked.add(identity)
                    pending.append((place, above | {identity}))
                except (OSError, Unusable) as error:
                    skips.add_broken(error if isinstance(error, Unusable) else _unusable(error), place)
        return sorted(files)

    def _entries(self, folder: PurePosixPath, skips: Skips) -> Iterator[tuple[PurePosixPath, bool]]:
        """Path and whether it is a link of all that lies in a folder and is not hidden, by name."""
        try:
            with os.scandir(self.root / folder) as entries:
                found = sorted((entry.name, entry.is_symlink()) for entry in entries)
        except OSError as error:
            skips.add_broken(_unusable(error), folder)
            return
        for name, is_link in found:
            if is_hidden(name):
                skips.add("a hidden file or folder", folder / name)
            else:
                yield folder / name, is_link

    def _real(self, place: PurePosixPath) -> Path:
        """Where a file or folder really is.

        Raises:
            Unusable: out of the folder, behind a link that is not to be followed; or the path is no name of a file.
        """
        try:
            path = Path(os.path.realpath(self.root / place, strict=True))
        except ValueError as error:  # a zero byte, half a surrogate pair
            raise Unusable(NOT_THERE) from error
        if not self.follow_links and not path.is_relative_to(self.root):
            raise Unusable(LEADS_OUT)
        return path


def _unusable(error: OSError) -> Unusable:
    """Why a file cannot be read. A failing disk is no reason to leave it out: that error is raised again."""
    if error.errno not in _REASONS:
        raise error
    return Unusable(_REASONS[error.errno])


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
