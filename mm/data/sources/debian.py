"""Files of a Debian package, read from its ``.deb`` without unpacking it, or from a folder it was unpacked to."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mm.data.sources.folder import Folder
from mm.data.sources.writer import BuildError, Unusable

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def package_files(package: Path, folder: PurePosixPath, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Each wanted file's path below `folder` of the package and its content, in the order they are stored.

    Args:
        package: a ``.deb``; or the folder that ``dpkg -x`` filled; or `folder` itself, wherever it lies.
        folder: the folder inside the package, such as ``usr/share/openclipart/png``.
        wanted: paths below `folder`. Links are never followed out of an archive.

    Raises:
        FileNotFoundError: there is no such package, or it lacks wanted files: most likely another version.
    """
    missing = set(wanted)
    for name, content in (_from_archive if package.is_file() else _from_folder)(package, folder, wanted):
        missing.discard(name)
        yield name, content
    if missing:
        raise FileNotFoundError(f"{package} lacks {len(missing)} of {len(wanted)} files, such as {min(missing)}")


def _from_folder(package: Path, folder: PurePosixPath, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    root = package / folder if (package / folder).is_dir() else package
    if not root.is_dir():
        raise FileNotFoundError(f"no package and no folder at {package}")
    files = Folder(root, follow_links=False)
    for name in sorted(wanted):
        with suppress(Unusable):  # then it is missing
            yield name, files.read(files.inside(name))


def _from_archive(package: Path, folder: PurePosixPath, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    names = {f"./{folder / name}": name for name in wanted}
    with package.open("rb") as stream:
        _seek_data(stream, package)
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() and member.name in names else None
                    if content is not None:
                        yield names[member.name], content.read()
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise BuildError(f"{package} is damaged: {error}; download it again") from error


def _seek_data(stream: BinaryIO, package: Path) -> None:
    """Moves to the first byte of ``data.tar.*``. A .deb is an ar archive: 60-byte headers, bodies padded to even."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise BuildError(f"{package} is not a Debian package: it does not begin with {_AR_MAGIC!r}")
    while len(header := stream.read(_AR_HEADER)) == _AR_HEADER:
        if header.startswith(b"data.tar"):
            return
        if not header[48:58].strip().isdigit():
            raise BuildError(f"{package} is damaged: an entry of {header[48:58]!r} bytes; download it again")
        size = int(header[48:58])
        stream.seek(size + size % 2, 1)
    raise BuildError(f"{package} is a truncated Debian package: it has no data.tar")
