"""What differs between two runs: recipes, versions, plans, length, figures, and where their losses part.

    RUN/recipe.yaml  versions.json  plan*/plan.json  metrics.jsonl  ──▶  tables with a column a run

Only the files of a run folder are read: neither the data nor the code that a run was made with need be there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from mm import configure
from mm.configure import RecipeError

TOLERANCE = 1e-3
"""Relative difference from which two losses differ by more than rounding."""

_MISSING = "–"


class DiffError(ValueError):
    """A folder that is no run, or whose files are damaged; the message says which."""


@dataclass(frozen=True)
class Side:
    """A run as its folder records it.

    recipe: resolved, by dotted key; versions: by package; plans: content of every ``plan.json``, by dotted key
    reports: the lines of ``metrics.jsonl``; checkpoints: steps that can be resumed from
    """

    folder: Path
    recipe: dict[str, Any]
    versions: dict[str, Any]
    plans: dict[str, Any]
    reports: tuple[dict[str, Any], ...]
    checkpoints: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            DiffError: no such folder, no run, or a file of it that is damaged.
        """
        if not folder.is_dir():
            raise DiffError(f"{folder} is no folder; give the folder of a run, which `run:` of its recipe names")
        if not (folder / "recipe.yaml").is_file():
            inner = next((path.parent for path in sorted(folder.glob("*/recipe.yaml"))), None)
            hint = f"; is {inner} meant?" if inner else "; a run writes its recipe when its training begins"
            raise DiffError(f"{folder} is no run: it holds no recipe.yaml{hint}")
        if not (folder / "versions.json").is_file():
            raise DiffError(
                f"{folder} holds a recipe.yaml but no versions.json: its training has not begun, or it is an export"
            )
        try:
            recipe = configure.resolve((folder / "recipe.yaml").resolve())
        except RecipeError as error:
            raise DiffError(f"{folder}/recipe.yaml cannot be read: {error}") from error
        return cls(
            folder,
            flattened(recipe),
            flattened(_json(folder / "versions.json")),
            {
                f"{path.parent.name}: {key.removeprefix('parts.')}": value
                for path in sorted(folder.glob("*/plan.json"))
                for key, value in flattened(_json(path)).items()
                if not key.startswith("shares.")  # which follow from the rest
            },
            tuple(_reports(folder / "metrics.jsonl")),
            tuple(
                sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*") if path.name[5:].isdecimal())
            ),
        )

    def figure(self, name: str) -> dict[int, float | None]:
        """A figure by step, wherever it was reported; None where it was not finite."""
        return {report["step"]: report[name] for report in self.reports if name in report}

    def last(self, name: str) -> float | None:
        """The last value of a figure."""
        return next((report[name] for report in reversed(self.reports) if name in report), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the run, weighted by time; validation and saving are left out."""
        steps = [report["step"] for report in self.reports]
        spans = [later - earlier for earlier, later in pairwise([0, *steps])]
        seconds = [
            span * (report.get("seconds_per_step") or 0) for span, report in zip(spans, self.reports, strict=True)
        ]
        tokens = [
            time * (report.get("tokens_per_second") or 0) for time, report in zip(seconds, self.reports, strict=True)
        ]
        return sum(tokens) / sum(seconds) if sum(seconds) else None


def diff(first: Path, second: Path) -> Iterator[Table]:
    """Tables of all that differs between two runs, a column each.

    Raises:
        DiffError: one of the folders is no run.
    """
    runs = Side.read(first), Side.read(second)
    for title, name in (("recipe", "recipe"), ("versions", "versions"), ("plans and data", "plans")):
        yield _differences(title, runs, getattr(runs[0], name), getattr(runs[1], name))
    yield _figures_table(runs)
    yield _parting_table(runs)


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """Values that hold no others by dotted key; empty mappings and lists are values too."""
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    below: dict[str, Any] = {}
    for key, one in inside:
        below |= flattened(one, f"{path}.{key}" if path else str(key))
    return below or ({path: value} if path else {})


def parting(first: Mapping[int, float | None], second: Mapping[int, float | None], tolerance: float) -> int | None:
    """The first step that both report at which they differ by more than this, relative to the larger; None: nowhere."""
    for step in sorted(first.keys() & second.keys()):
        one, other = first[step], second[step]
        if one is None or other is None:
            if one is not other:
                return step
        elif one != other and abs(one - other) > tolerance * max(abs(one), abs(other)):
            return step
    return None


# ------------------------------------------------------------------------------------------------------------- tables


def _table(title: str, first: str, runs: tuple[Side, Side]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in _names(runs):
        table.add_column(name, overflow="fold")
    return table


def _names(runs: tuple[Side, Side]) -> tuple[str, str]:
    """The ends of the two paths from where they differ."""
    first, second = (run.folder.resolve() for run in runs)
    if first.name != second.name:
        return first.name, second.name
    return str(runs[0].folder), str(runs[1].folder)


def _differences(title: str, runs: tuple[Side, Side], first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    keys = [*first, *(key for key in second if key not in first)]
    missing = object()
    differing = [key for key in keys if not _same(first.get(key, missing), second.get(key, missing))]
    if not differing:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_row(f"no difference in {len(keys):,} entries" if keys else "neither run has any")
        return table
    table = _table(f"{title}: {len(differing):,} of {len(keys):,} differ", "key", runs)
    for key in differing:
        table.add_row(key, *(_shown(side[key]) if key in side else _MISSING for side in (first, second)))
    return table


def _same(first: Any, second: Any) -> bool:
    comparable = type(first) is type(second) or (_number(first) and _number(second))
    return comparable and first == second


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def _figures_table(runs: tuple[Side, Side]) -> Table:
    """Length and last figures side by side, with what the second is relative to the first."""
    table = _table("figures", "figure", runs)
    table.add_column("second / first", justify="right")
    steps = [run.reports[-1]["step"] if run.reports else None for run in runs]
    _add_row(table, "steps", steps, "{:,}")
    _add_row(table, "tokens", [run.last("tokens") for run in runs], "{:,.0f}")
    checkpoints = [f"{run.checkpoints[-1]:,}" if run.checkpoints else _MISSING for run in runs]
    table.add_row("last checkpoint", *checkpoints, "")
    names = sorted({name for run in runs for report in run.reports for name in report if "loss" in name}, key=_order)
    for name in names:
        _add_row(table, f"{name}, last", [run.last(name) for run in runs], "{:.6g}")
    _add_row(table, "tokens_per_second, mean", [run.tokens_per_second for run in runs], "{:,.0f}")
    return table


def _order(name: str) -> tuple[bool, bool, str]:
    """Losses of all before parts, training before validation."""
    return "/" in name, name.startswith("validation"), name


def _add_row(table: Table, name: str, values: list[Any], format: str) -> None:
    first, second = values
    shown = [_MISSING if value is None else format.format(value) for value in values]
    known = _number(first) and _number(second) and first and math.isfinite(second / first)
    table.add_row(name, *shown, f"{second / first:.4g}" if known else "")


def _parting_table(runs: tuple[Side, Side]) -> Table:
    """Where the loss curves part: at all, and by more than rounding."""
    first, second = (run.figure("loss") for run in runs)
    common = first.keys() & second.keys()
    title = f"losses, at {len(common):,} steps that both report"
    table = Table("they differ", "first at step", title=title, title_justify="left")
    for name in _names(runs):
        table.add_column(name, overflow="fold")
    for name, tolerance in (("by a bit", 0.0), (f"by more than {TOLERANCE:g}, relative", TOLERANCE)):
        step = parting(first, second, tolerance)
        if step is None:
            table.add_row(name, "nowhere", "", "")
        else:
            values = ("not finite" if curve[step] is None else repr(curve[step]) for curve in (first, second))
            table.add_row(name, f"{step:,}", *values)
    return table


# -------------------------------------------------------------------------------------------------------------- files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DiffError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DiffError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _reports(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, if there is one; not a last line that a run has only half written."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            return
        try:
            report = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DiffError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(report, dict) or not isinstance(report.get("step"), int):
            raise DiffError(f"{path}, line {number} is no JSON object with a `step`")
        yield report
