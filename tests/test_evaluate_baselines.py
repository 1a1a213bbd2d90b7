"""What frozen features do without a language model."""

from __future__ import annotations

import numpy as np
import pytest

from mm.evaluate.baselines import (
    PENALTIES,
    FrozenFeatures,
    fit_probe,
    nearest_captions,
    probe_categories,
    word_overlap,
)
from mm.evaluate.suite import Question


def test_word_overlap_is_the_f1_of_the_two_sets_of_words() -> None:
    assert word_overlap("A red bus.", "the RED bus") == pytest.approx(2 * 2 / (3 + 3))
    assert word_overlap("bus bus bus", "a bus") == pytest.approx(2 * 1 / (1 + 2))
    assert word_overlap("", "a bus") == word_overlap("!", "!") == 0.0


def test_an_option_scores_by_the_captions_of_near_training_pictures() -> None:
    common = np.array([0.0, 100.0])
    features = FrozenFeatures(
        pictures={"east": common + np.array([2.0, 1.1]), "north": common + np.array([1.1, 2.0])},
        train=common + np.array([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]),
        captions=["a red bus", "a grey cat", "fog", "rain"],
        categories=["x"] * 4,
    )
    options = ("red bus on a road", "grey cat on a sofa", "nothing like it", "no word shared")
    questions = [Question(0, "east", "?", options, 0), Question(1, "north", "?", options, 0)]
    assert nearest_captions(questions, features, neighbours=1).tolist() == [1.0, 0.0]
    unshared = Question(2, "east", "?", ("wind", "snow"), 0)
    assert nearest_captions([unshared], features).tolist() == [0.5]


def clouds(rows: int, seed: int, classes: int = 3, width: int = 12) -> tuple[np.ndarray, list[str]]:
    """Gaussian clouds around class means, on top of a large common offset."""
    draw = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(classes, width)) * 2
    numbers = np.arange(rows) % classes
    return 50 + means[numbers] + draw.normal(size=(rows, width)), [f"class {number}" for number in numbers]


def test_the_penalty_is_the_one_that_brute_force_leaving_one_out_chooses() -> None:
    train, categories = clouds(24, seed=0)
    train += np.random.default_rng(5).normal(size=train.shape) * 4
    probe = fit_probe(train, categories)
    rows = (train - train.mean(axis=0)) / train.std(axis=0)
    targets = (np.asarray(categories)[:, None] == np.asarray(probe.categories)).astype(float)

    def error(penalty: float) -> float:
        """Squared error with each row left out in turn: ridge with a free intercept, solved by normal equations."""
        total = 0.0
        for out in range(len(rows)):
            kept = np.arange(len(rows)) != out
            mean, bias = rows[kept].mean(axis=0), targets[kept].mean(axis=0)
            centred = rows[kept] - mean
            weights = np.linalg.solve(
                centred.T @ centred + penalty * np.eye(rows.shape[1]), centred.T @ (targets[kept] - bias)
            )
            total += np.square((rows[out] - mean) @ weights + bias - targets[out]).sum()
        return total

    grid = PENALTIES * np.square(np.linalg.svd(rows, compute_uv=False)).mean()
    assert probe.penalty == pytest.approx(min(grid, key=error))
    assert grid[0] < probe.penalty < grid[-1]


def test_the_probe_sees_the_category_and_decides_easy_questions_but_not_hard_ones() -> None:
    train, categories = clouds(90, seed=1)
    test, seen = clouds(30, seed=2)
    pictures = {str(number): row for number, row in enumerate(test)}
    features = FrozenFeatures(pictures, train, [""] * 90, categories)
    names = [f"class {number}" for number in range(3)]
    easy = [
        Question(n, str(n), "?", tuple(f"one {name}" for name in names), names.index(seen[n]), category=seen[n])
        for n in range(30)
    ]
    hard = [
        Question(30 + n, str(n), "?", (f"{first} {seen[n]}", f"{second} {seen[n]}"), 0, category=seen[n])
        for n in range(30)
        for first, second in [(("one", "two") if n % 2 else ("two", "one"))]
    ]
    probed = probe_categories(easy + hard, features)
    assert probed.category[:30].mean() > 0.95
    assert probed.choice[:30].tolist() == probed.category[:30].tolist()
    assert probed.choice[30:].tolist() == [0.5] * 30


def test_unequal_training_arrays_are_an_error() -> None:
    with pytest.raises(ValueError, match="differ in number: 3, 2 and 3"):
        FrozenFeatures({}, np.zeros((3, 2)), ["a"] * 2, ["b"] * 3)
