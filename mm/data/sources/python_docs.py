"""Running English that every Python brings: its language reference and the docstrings of its standard library.

Two hundred thousand words of technical prose without a download, for demos. Modules are parsed, not imported. The texts
are those of the Python that builds them; its version stands in the card.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from mm.data.sources.dictionaries import Entry, write_entries
from mm.data.sources.writer import Report, Skips

WORDS = 8
"""Words of the shortest paragraph that is kept: less is a heading, a signature or an example."""
_CODE = re.compile(r">>>|^\s*[|+:]|[{}=_\\]{2}|::=")
_QUOTED = re.compile(r"(?:`+|\*{1,2})([^`'*]+)(?:`+|'|\*{1,2})")
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data")


def build(out: Path, validation: float = 0.05, samples_per_shard: int = 20_000) -> Report:
    """Write the prose of Python: a topic of the reference, or a docstring, a document.

    Args:
        out: folder for the shards and ``card.yaml``.
        validation: share of the topics and modules that are kept for validation.
        samples_per_shard: where shards are cut.
    """
    about = {
        "name": "python-docs",
        "licence": "PSF-2.0 (Python Software Foundation License)",
        "origin": f"Python {platform.python_version()}, by `mm data build python-docs`",
        "description": "The prose of Python's language reference and of its standard library's docstrings.",
    }
    skips = Skips()
    return write_entries(out, _entries(skips), about, validation, samples_per_shard, skips)


def _entries(skips: Skips) -> Iterator[Entry]:
    seen: set[str] = set()
    for headword, text in [*topics.items(), *_docstrings(Path(sysconfig.get_path("stdlib")), skips)]:
        words = prose(text)
        if words in seen:
            skips.add("said before", headword)
        else:
            seen.add(words)
            yield Entry(headword, words)


def _docstrings(library: Path, skips: Skips) -> Iterator[tuple[str, str]]:
    """The path of a module, and each docstring in it."""
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if not set(_LEFT_OUT).isdisjoint(module.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            skips.add("not Python of this version", module)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield module.as_posix(), text


def prose(text: str) -> str:
    """The paragraphs of a text that are sentences, a paragraph a line."""
    paragraphs = (paragraph for paragraph in re.split(r"\n\s*\n", text) if not _CODE.search(paragraph))
    lines = (re.sub(r"\s+", " ", _QUOTED.sub(r"\1", paragraph)).strip() for paragraph in paragraphs)
    return "\n".join(line for line in lines if len(line.split()) >= WORDS and re.search(r"[a-z][.:!?)]", line))
