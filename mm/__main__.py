"""``python -m mm`` is the command ``mm``."""

import os
import sys

import mm

if not __package__:
    raise SystemExit("Run `mm …` or `python -m mm …`: run as a file, mm/tokenizers would hide the library tokenizers.")

# `python -m` looks in the working directory first, where a file named like a library may come from anybody. It stays on
# the path, as the last folder, if it is the checkout that `mm` comes from: spawned processes are given the path.
if sys.path[0] == os.getcwd():  # noqa: PTH109  (pathlib imports what that directory may hide)
    working = sys.path.pop(0)
    if mm.__path__[0] == os.path.join(working, "mm"):  # noqa: PTH118
        sys.path.append(working)

from mm.cli import main

if __name__ == "__main__":
    main()
