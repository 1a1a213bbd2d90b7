"""Names that no dataset means: files and folders that programs leave next to the data."""

from __future__ import annotations

from pathlib import PurePosixPath

_LEFTOVERS = {"@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini"}


def is_hidden(path: PurePosixPath | str) -> bool:
    """Whether a component of the path begins with a dot (``.ipynb_checkpoints``) or is what a NAS or a system left."""
    parts = PurePosixPath(path).parts
    return any((part.startswith(".") and part not in (".", "..")) or part in _LEFTOVERS for part in parts)
