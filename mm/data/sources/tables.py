"""Tables that name what a builder uses: columns separated by tabs, names of the columns first."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from mm.data.sources.writer import BuildError


def read_table(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a table whose every column is filled.

    Raises:
        BuildError: it is not UTF-8, has other columns, or a row with an empty one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            header, *rows = [*csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BuildError(f"{path} is no table of columns {', '.join(columns)} in UTF-8: {error}") from error
    if header != list(columns):
        raise BuildError(f"{path}: the columns are {header}, expected {list(columns)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns) or not all(row):
            raise BuildError(f"{path}, line {number}: expected {len(columns)} filled columns, found {row}")
    return rows
