"""Results: figures with intervals and controls, and one line for every question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from mm.evaluate.intervals import clustered_interval
from mm.terminal import printable, styled

Summary = dict[str, Any]
FIGURES = {
    "accuracy": ("accuracy_likelihood", "accuracy_easy", "accuracy_hard"),
    "shuffled images": ("shuffled_images", "shuffled_images_easy", "shuffled_images_hard"),
    "accuracy − shuffled": ("accuracy_minus_shuffled", "accuracy_easy_minus_shuffled", "accuracy_hard_minus_shuffled"),
    "text only": ("text_only", "text_only_easy", "text_only_hard"),
    "nearest captions": ("nearest_captions", "nearest_captions_easy", "nearest_captions_hard"),
    "linear probe": ("linear_probe", "linear_probe_easy", "linear_probe_hard"),
}
"""Rows of the table: figure on all, easy and hard questions."""
GENERATED = {"by generation": "accuracy_generation", "circular": "circular"}


@dataclass(frozen=True, slots=True)
class Answered:
    """What came out for one question.

    answer, prediction: letters of the right option and of the one that scored highest (the first of those that tie)
    right, text_only, shuffled: credit with the picture, without it, and with `shuffled_picture` in its place
    scores: of the options, under the suite's rule
    generated, letters: text and extracted letter for each rotation of the options; empty if the question was not asked
    """

    index: int
    picture: str
    category: str
    difficulty: str
    options: tuple[str, ...]
    answer: str
    prediction: str
    right: float
    scores: tuple[float, ...]
    text_only: float
    shuffled_picture: str
    shuffled: float
    generated: tuple[str, ...]
    letters: tuple[str | None, ...]


@dataclass(frozen=True)
class Results:
    """summary: what ``results.json`` holds; answers: one a question, what ``answers.jsonl`` holds."""

    summary: Summary
    answers: tuple[Answered, ...]

    def save(self, folder: str | Path) -> None:
        """Writes ``answers.jsonl`` and then ``results.json``, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in self.answers]
        _write_whole(folder / "answers.jsonl", "".join(lines))
        _write_whole(
            folder / "results.json", json.dumps(self.summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def tables(self) -> list[Table]:
        """The figures in percent with their intervals, and the categories."""
        return [_figures(self.summary), _categories(self.summary)]


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(text.encode("utf-8", "backslashreplace"))  # which is how JSON spells a lone surrogate
    part.replace(path)


def summarise(
    figures: dict[str, np.ndarray], clusters: Sequence[str], seed: int, resamples: int
) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
    """Means and intervals of figures.

    Args:
        figures: name → (Q,) value per question; NaN where the question is not part of the figure
        clusters: Q picture ids

    Returns:
        name → mean, None if no question is part of it; and name → [low, high] where there are two pictures or more.
    """
    means: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float]] = {}
    pictures = np.asarray(clusters)
    for name, values in figures.items():
        part = ~np.isnan(values)
        means[name] = float(values[part].mean()) if part.any() else None
        if len(set(pictures[part].tolist())) > 1:
            intervals[name] = clustered_interval(values[part], pictures[part].tolist(), seed, resamples)
    return means, intervals


def by_group(right: np.ndarray, groups: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """Accuracy and number of questions of every group that has a name, in alphabetical order."""
    names = np.asarray(groups)
    return {
        name: {"accuracy": float(right[names == name].mean()), "questions": int((names == name).sum())}
        for name in sorted(set(groups) - {""})
    }


def _percent(summary: Summary, name: str) -> RenderableType:
    value = summary.get(name, summary["baselines"].get(name))
    if value is None:
        return "–"
    if name not in summary["intervals"]:
        return f"{100 * value:.1f}"
    low, high = summary["intervals"][name]
    return styled(f"{100 * value:.1f} ", (f"({100 * low:.1f} to {100 * high:.1f})", "dim"))


def _figures(summary: Summary) -> Table:
    title = f"{summary['suite']}: {summary['questions']} questions, {summary['pictures']} pictures, in %"
    rule = f"score {summary['score']}, chance {100 * summary['chance']:.1f}, 95 % intervals over pictures"
    table = Table("", "all", "easy", "hard", title=title, caption=rule)
    for label, names in FIGURES.items():
        if names[0] in summary or names[0] in summary["baselines"]:
            table.add_row(label, *(_percent(summary, name) for name in names))
    if summary["generation_questions"]:
        table.add_section()
        for label, name in GENERATED.items():
            table.add_row(f"{label}, {summary['generation_questions']} questions", _percent(summary, name))
    return table


def _categories(summary: Summary) -> Table:
    table = Table("category", "questions", "accuracy")
    for name, found in summary["categories"].items():
        table.add_row(printable(name), str(found["questions"]), f"{100 * found['accuracy']:.1f}")
    return table
