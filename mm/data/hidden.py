"""Files that a file manager, an editor or a disk station put next to the data and that belong to no dataset."""

from __future__ import annotations

_NAMES = frozenset(("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "thumbs.db", "desktop.ini"))


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder on its path, is hidden: ``.ipynb_checkpoints/0.jpg``, ``@eaDir/0.jpg``, ``._0.jpg``.

    Args:
        path: steps separated by ``/``, relative to the folder or the tar that holds the data.
    """
    steps = path.split("/")
    return any((step.startswith(".") and step not in (".", "..")) or step.lower() in _NAMES for step in steps)
