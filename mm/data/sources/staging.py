"""A build is written next to the one that it replaces, and takes its place when it is complete.

    OUT/train-0000.tar …  card.yaml      the earlier build, which is read meanwhile; other files of OUT are not touched
    OUT/.mm-build/lock                   held while a build runs
                  new/                   what the build writes
                  old/  ready/           only while the two change places

No file system replaces several files at once, so the order is what a reader can rely on: the cards of the earlier build
leave first and those of the new one come last. At no time is there a card without all shards of its own build. A build
that fails or is killed leaves the earlier one as it was, and ``.mm-build`` is removed at once or by the next build. One
that is killed in the instant when the two change places leaves no card; the next build first completes the change
if all of the earlier build had left, and undoes it otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mm.data.sources.writer import BuildError

STAGE = ".mm-build"


@contextmanager
def staged(
    out: Path, splits: Collection[str], cards: Collection[str] = ("card.yaml",), extension: str = "tar"
) -> Iterator[Path]:
    """A folder to write a build to. When the block ends without an error, the build replaces the earlier one in `out`.

    Args:
        out: folder of the dataset; is made if it is not there.
        splits: names of all shards that the build owns. Those of an earlier build are removed also where the new one
            has none.
        cards: files that it owns besides.
        extension: of its shards.

    Raises:
        BuildError: another build is writing to `out`.
    """
    owned = re.compile(rf"(?:{'|'.join(map(re.escape, splits))})-\d{{4,}}\.{extension}")
    made, stage = not out.exists(), out / STAGE
    try:
        stage.mkdir(parents=True, exist_ok=True)
        lock = FileLock(stage / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BuildError(f"another build is writing to {out}; wait for it, or name another folder") from None
        try:
            _settle(out, stage)
            shutil.rmtree(stage / "new", ignore_errors=True)
            (stage / "new").mkdir()
            yield stage / "new"
            _take_out([path for path in out.iterdir() if owned.fullmatch(path.name) or path.name in cards], stage)
        finally:
            _settle(out, stage)
            shutil.rmtree(stage, ignore_errors=True)  # what is left of it is removed by the next build
            lock.release()
    finally:
        if made:
            with suppress(OSError):  # it is empty only if the build failed
                out.rmdir()


def _take_out(earlier: list[Path], stage: Path) -> None:
    """Move the files of the earlier build to ``old``; from then on the new one is ``ready``."""
    _sync(stage / "new")
    (stage / "old").mkdir()
    for path in sorted(earlier, key=_cards_last, reverse=True):
        path.replace(stage / "old" / path.name)
    (stage / "new").rename(stage / "ready")


def _settle(out: Path, stage: Path) -> None:
    """Move to `out` a build that is ready, or else what was taken out of it. Does nothing where neither is there."""
    folder = stage / "ready" if (stage / "ready").exists() else stage / "old"
    if folder.exists():
        for path in sorted(folder.iterdir(), key=_cards_last):
            path.replace(out / path.name)
        _sync(out)


def _cards_last(path: Path) -> tuple[bool, str]:
    return path.suffix == ".yaml", path.name


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, so that a crash of the machine does not undo what later steps rely on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
