"""Writing the measured `statistics:` into a card's file, where everything else stays as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mm import configure
from mm.data.card import Card, CardError


def merged(card: Card, measured: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The card's statistics with the measured numbers of each split in them; other keys stay."""
    statistics = dict(card.statistics)
    for split, counts in measured.items():
        before = statistics.get(split)
        statistics[split] = {**(before if isinstance(before, dict) else {}), **counts}
    return statistics


def as_yaml(statistics: Mapping[str, Any]) -> str:
    """The `statistics:` block of a card."""
    return configure.write_yaml({"statistics": dict(statistics)})


def write_statistics(path: Path, statistics: Mapping[str, Any]) -> bool:
    """Replaces the `statistics:` of a card's file in one rename. Returns whether comments were lost.

    Only that block is written anew: comments within it are lost, those elsewhere stay.

    Raises:
        CardError: the file is not a mapping in block style, so that no block of it can be replaced.
    """
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    start, end = _block(text)
    before, block, after = text[:start], text[start:end], text[end:]
    if before and not before.endswith("\n"):
        before += "\n"
    written = before + as_yaml(statistics) + after
    try:
        meant = configure.parse_yaml(written) == {**configure.parse_yaml(text), "statistics": dict(statistics)}
    except configure.RecipeError:
        meant = False
    if not meant:
        raise CardError(f"{path}: its form is too unusual to replace `statistics:`; paste the printed block by hand")
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(written, encoding="utf-8", newline="")
    unfinished.chmod(path.stat().st_mode)
    unfinished.replace(path)
    return re.search(r"(^|\s)#", block) is not None


def _block(text: str) -> tuple[int, int]:
    """Where `statistics:` and its value are in the text of a card; its end, twice, where there is none."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        return len(text), len(text)
    for key, value in root.value:
        if key.value == "statistics":
            start, end = key.start_mark.index, value.end_mark.index
            return start, start + _without_trailing_comments(text[start:end])
    return len(text), len(text)


def _without_trailing_comments(block: str) -> int:
    """Length of a block without the comments and empty lines after it, which belong to what follows."""
    lines = block.splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return len("".join(lines))
