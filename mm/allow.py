"""Modules that a recipe may import: those of the suite, installed ones, and those that the user allows.

Importing a module runs it, a recipe may come from anybody, and a file of any name may lie in the working directory. So
a module that is not installed is imported only if the user names it, in one of three places that no recipe can reach:

    mm train recipe.yaml --allow my_encoders      this command, and the processes that it starts
    MM_ALLOW=my_encoders,my_losses                every command of the shell
    ~/.config/mm/allow                            every command of the user: one module a line, # opens a comment

A name allows the module or package, and everything inside it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

VARIABLE = "MM_ALLOW"
SUITE = "mm"


class AllowError(ValueError):
    """A module that is neither installed nor allowed, or a list of allowed ones that names no module."""


def allow(modules: Iterable[str]) -> None:
    """Allow modules in this process and in those that it starts.

    Raises:
        AllowError: no name of a module.
    """
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_from_variable(), *_names(",".join(modules), "--allow")]))


def keep_working_directory_out() -> None:
    """Let processes that this one starts look for no module in the working directory.

    A spawned process is ``python -c``, which looks there first, for Python's own modules too, until it is given the
    path of the process that spawned it.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def allowed() -> list[str]:
    """Names of the modules that the user allows.

    Raises:
        AllowError: one of them is no name of a module.
    """
    lines: list[str] = []
    file = allow_file()
    if file.is_file():
        lines = [line.partition("#")[0] for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [*_from_variable(), *_names(",".join(lines), str(file))]


def allow_file() -> Path:
    """The user's own list, below ``~/.config`` or ``XDG_CONFIG_HOME``.

    A relative ``XDG_CONFIG_HOME`` is ignored, as its specification demands: it would name a file of the working
    directory.
    """
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".config") / "mm" / "allow"


def import_allowed(path: str) -> ModuleType | None:
    """The module at a dotted path whose parent has been imported; None if there is none.

    A module that the user allows is found in the working directory as well, after all other places.

    Raises:
        AllowError: it is there, neither installed nor allowed. Nothing was imported.
        ImportError: it does not import.
    """
    spec, in_working_directory = _find(path)
    if spec is None:
        return None
    if not (_is_installed(spec) or any(_within(path, name) or _within(name, path) for name in allowed())):
        raise AllowError(_refusal(path, spec))
    if in_working_directory:
        sys.path.append(str(Path.cwd()))  # spawned processes are given this list
    return import_module(path)


def is_available(package: str) -> bool:
    """Whether an optional package is installed, or there and allowed.

    Raises:
        AllowError: something else of that name lies where Python would find it.
    """
    spec, in_working_directory = _find(package)
    if spec is None or in_working_directory:
        return False
    if not (_is_installed(spec) or package in allowed()):
        raise AllowError(_refusal(package, spec))
    return True


def _from_variable() -> list[str]:
    return _names(os.environ.get(VARIABLE, ""), VARIABLE)


def _names(text: str, where: str) -> list[str]:
    names = [name for name in re.split(r"[\s,]+", text) if name]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise AllowError(f"{where}: expected names of modules, such as my_encoders; found {name!r}")
    return names


def _within(path: str, package: str) -> bool:
    return f"{path}.".startswith(f"{package}.")


def _find(path: str) -> tuple[ModuleSpec | None, bool]:
    """How Python would import a module, without importing it; and whether only the working directory holds it."""
    parent = path.rpartition(".")[0]
    if parent and not hasattr(sys.modules[parent], "__path__"):
        return None, False  # a module holds no modules
    try:
        spec = find_spec(path)
    except ValueError:  # the program itself, ``__main__``, cannot be imported
        return None, False
    if spec is not None or parent:
        return spec, False
    spec = PathFinder.find_spec(path, [str(Path.cwd())])
    return spec, spec is not None


def _places(spec: ModuleSpec) -> list[Path]:
    """Files and folders that a module is loaded from; a namespace may have many, a part of the interpreter none."""
    places = [spec.origin] if spec.has_location and spec.origin else spec.submodule_search_locations or ()
    return [Path(os.path.abspath(place)) for place in places]  # noqa: PTH100  (links are not followed)


def _is_installed(spec: ModuleSpec) -> bool:
    top = spec.name.partition(".")[0]
    places = _places(spec)
    folders = [Path(__file__).parent] if top == SUITE else [*_site_folders(), *_projects(top)]
    known = [form for folder in folders for form in (folder.absolute(), folder.resolve())]
    # Where a module is linked to is of no account: installers may link packages into place.
    return all(any(place.is_relative_to(folder) for folder in known) for place in places)


@functools.cache
def _site_folders() -> tuple[Path, ...]:
    """Where installers put modules, and the standard library."""
    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return tuple(dict.fromkeys(map(Path, folders)))


@functools.cache
def _projects(top: str) -> tuple[Path, ...]:
    """Folders that the user installed as editable (``pip install -e``) and that declare a top-level module."""
    found = []
    for distribution in distributions(path=[str(folder) for folder in _site_folders()]):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        declared = distribution.read_text("top_level.txt") or re.sub(r"[-.]+", "_", distribution.name)
        if origin.get("dir_info", {}).get("editable") and top in declared.split():
            found.append(Path(url2pathname(urlsplit(origin["url"]).path)))
    return tuple(found)


def _refusal(path: str, spec: ModuleSpec) -> str:
    top = path.partition(".")[0]
    places = " and ".join(str(place) for place in _places(spec))
    return (
        f"module {path} is not installed; it lies in {places}, and importing it runs what is written there. If you "
        f"trust it, add `--allow {top}` to the command, or allow it always: {VARIABLE}={top} in the environment, or a "
        f"line `{top}` in {allow_file()}"
    )
