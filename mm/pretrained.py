"""Loading models, configurations and processors of transformers without running code that comes with them.

A folder or hub name may bring Python files and name their classes in its ``auto_map``. Left to itself, transformers
asks on the terminal whether to run them. Here the answer is always no: classes of transformers are used, or there is an
error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class BringsCode(ValueError):
    """A folder or hub name that can be loaded by code of its own only."""


def from_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(name)`` for a class of transformers, with the classes that transformers has itself.

    Raises:
        BringsCode: it has none that fits.
    """
    with no_code_of(name):
        found = kind.from_pretrained(str(name), trust_remote_code=False, **options)
    _refuse_kernels(found, name)
    return found


OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
"""Implementations of attention that need no kernel from the hub."""


def _refuse_kernels(config: Any, name: str | Path) -> None:
    """Raise `BringsCode` if a configuration, or one inside it, names a kernel, which transformers would fetch and run.

    Args:
        config: what was loaded; anything but a configuration names none.
    """
    from transformers import PreTrainedConfig

    for part in (config, *vars(config).values()) if isinstance(config, PreTrainedConfig) else ():
        attention = getattr(part, "_attn_implementation", None) if isinstance(part, PreTrainedConfig) else None
        if attention not in OWN_ATTENTION:
            raise BringsCode(
                f"{name}: its config.json names the attention kernel {attention!r}, code from the hub, which is not "
                f"fetched or run; remove `attn_implementation` from that file"
            )


@contextmanager
def no_code_of(name: str | Path) -> Iterator[None]:
    """Let transformers refuse code that a folder or hub name brings, also where another library calls it and does not
    say so.

    Raises:
        BringsCode: that code is required.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # of the question on the terminal: it is answered no
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        wanted = _classes_of_its_own(Path(name))
        raise BringsCode(
            f"{name} requires code of its own"
            + (f" ({'; '.join(wanted)})" if wanted else "")
            + ", which is not run: it could do anything. Name one that transformers has classes for; or, if you trust "
            "the code, load it in a program of your own, save it with a standard class, and name that folder"
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _classes_of_its_own(folder: Path) -> list[str]:
    """What the ``auto_map`` of a local folder's files name, each with its file."""
    found = []
    for file in sorted(folder.glob("*config.json")) if folder.is_dir() else []:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # only read for the sake of the message
        wanted = content.get("auto_map") if isinstance(content, dict) else None
        names = list(wanted.values()) if isinstance(wanted, dict) else [wanted] if wanted else []
        if names:
            found.append(f"{', '.join(str(n[0] if isinstance(n, list) else n) for n in names)} in {file.name}")
    return found
