"""What a figure is to be held against: chance, the picture withheld, another picture in its place."""

from __future__ import annotations

from collections.abc import Sequence

from mm.evaluate.suite import Question
from mm.packing.hashing import hash64, shuffled


def chance(questions: Sequence[Question]) -> float:
    """Expected accuracy of a uniform guess."""
    return sum(1 / len(question.options) for question in questions) / len(questions)


def circular_chance(questions: Sequence[Question]) -> float:
    """Expected CircularEval accuracy of uniform guesses, one for each of N rotations."""
    return sum(len(question.options) ** -len(question.options) for question in questions) / len(questions)


def shuffled_pictures(questions: Sequence[Question], seed: int) -> dict[str, str]:
    """A derangement: for each picture, the other one that all its questions are asked about.

    Pictures with the same right answers are laid next to each other in a circle, and everyone takes the picture that is
    at least as many places ahead as the largest such group is long. So nobody gets its own, and nobody gets one with
    the same answers unless more than half of all pictures share them.

    Raises:
        ValueError: fewer than two pictures.
    """
    answers: dict[str, set[str]] = {}
    for question in questions:
        answers.setdefault(question.picture, set()).add(question.options[question.answer])
    if len(answers) < 2:
        raise ValueError(f"shuffled pictures need two pictures or more, found {len(answers)}")
    groups: dict[frozenset[str], list[str]] = {}
    pictures = list(answers)
    for picture in (pictures[number] for number in shuffled(len(pictures), seed, "shuffled pictures")):
        groups.setdefault(frozenset(answers[picture]), []).append(picture)
    circle = [picture for group in groups.values() for picture in group]
    largest = max(map(len, groups.values()))
    nearest = min(largest, len(circle) // 2)
    furthest = len(circle) - nearest
    turn = nearest + int(hash64(seed, "turn")) % (furthest - nearest + 1)
    return {picture: circle[(place + turn) % len(circle)] for place, picture in enumerate(circle)}
