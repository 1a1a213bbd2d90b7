"""What the frozen picture features alone are good for, without a language model: two baselines on the same questions.

nearest captions  an option scores by the captions of the most similar training pictures
linear probe      an option scores by the category that a ridge classifier sees in the picture
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm.evaluate.choice import credit
from mm.evaluate.suite import Question

NEIGHBOURS = 5
PENALTIES = np.logspace(-4, 2, 13)
"""Ridge penalties tried, as multiples of the mean squared singular value."""
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FrozenFeatures:
    """Pooled encoder features of the suite's pictures and of captioned training pictures.

    pictures: picture id → (C,) features, for every picture of the suite
    train: (n, C) features of the training pictures; none of them is in the suite
    captions, categories: n texts
    """

    pictures: Mapping[str, np.ndarray]
    train: np.ndarray
    captions: Sequence[str]
    categories: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.train) == len(self.captions) == len(self.categories):
            counts = f"{len(self.train)}, {len(self.captions)} and {len(self.categories)}"
            raise ValueError(f"training features, captions and categories differ in number: {counts}")


def word_overlap(first: str, second: str) -> float:
    """F1 of the two sets of lower-cased words: 2 · shared / (words of the first + words of the second)."""
    a, b = (set(WORD.findall(text.lower())) for text in (first, second))
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0


def nearest_captions(
    questions: Sequence[Question], features: FrozenFeatures, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """(Q,) credit when an option scores max over the k nearest training pictures of similarity · word overlap.

    Similarity is the cosine after the training mean is subtracted, and not below 0.
    """
    centre = features.train.mean(axis=0)
    train = _unit(features.train - centre)
    captions = list(features.captions)
    nearest: dict[str, list[tuple[float, str]]] = {}
    for picture in {question.picture for question in questions}:
        similarity = train @ _unit(features.pictures[picture] - centre)
        best = np.argsort(-similarity, kind="stable")[:neighbours]
        nearest[picture] = [(max(float(similarity[number]), 0.0), captions[number]) for number in best.tolist()]

    def score(question: Question, option: str) -> float:
        return max(similar * word_overlap(option, caption) for similar, caption in nearest[question.picture])

    scores = ([score(question, option) for option in question.options] for question in questions)
    return np.array([credit(each, question.answer) for each, question in zip(scores, questions, strict=True)])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class LinearProbe:
    """A ridge classifier of the category on standardised features, fitted to one-hot targets.

    penalty: the one of `PENALTIES` with the least squared error when each training picture is left out in turn
    """

    categories: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    penalty: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(n, categories) scores of (n, C) features; the highest is the predicted category."""
        return (features - self.mean) / self.scale @ self.weights + self.bias


def fit_probe(train: np.ndarray, categories: Sequence[str]) -> LinearProbe:
    """The probe of (n, C) features and n categories, in closed form.

    With X = U S Vᵀ centred, the fit has hat matrix H = 11ᵀ/n + U diag(s²/(s² + λ)) Uᵀ, and leaving out row i changes
    its residual to eᵢ / (1 − Hᵢᵢ).
    """
    names = tuple(sorted(set(categories)))
    targets = (np.asarray(categories)[:, None] == np.asarray(names)).astype(float)
    bias = targets.mean(axis=0)
    mean, scale = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
    left, singular, right = np.linalg.svd((train - mean) / scale, full_matrices=False)
    projected = left.T @ (targets - bias)

    def left_out_error(penalty: float) -> float:
        shrink = singular**2 / (singular**2 + penalty)
        residual = targets - bias - left @ (shrink[:, None] * projected)
        leverage = 1 / len(train) + np.square(left) @ shrink
        return float(np.square(residual / (1 - leverage)[:, None]).mean())

    penalty = min(PENALTIES * np.square(singular).mean(), key=left_out_error)
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * projected)
    return LinearProbe(names, mean, scale, weights, bias, float(penalty))


@dataclass(frozen=True)
class Probed:
    """Outcome of the linear probe.

    category: (Q,) 1 where the picture's category was predicted
    choice: (Q,) credit when an option scores as the probe scores its category: chance where all options share one
    """

    category: np.ndarray
    choice: np.ndarray
    penalty: float


def probe_categories(questions: Sequence[Question], features: FrozenFeatures) -> Probed:
    """The probe's predictions for the questions' pictures.

    An option's category is that of the questions which it answers; an option that answers none scores lowest.
    """
    probe = fit_probe(features.train, features.categories)
    pictures = sorted({question.picture for question in questions})
    rows = probe.scores(np.stack([features.pictures[picture] for picture in pictures]))
    scores = {
        picture: dict(zip(probe.categories, row.tolist(), strict=True))
        for picture, row in zip(pictures, rows, strict=True)
    }
    meant: dict[str, set[str]] = {}
    for question in questions:
        meant.setdefault(question.options[question.answer], set()).add(question.category)

    def score(question: Question, option: str) -> float:
        seen = scores[question.picture]
        return max((seen.get(category, -np.inf) for category in meant.get(option, ())), default=-np.inf)

    predicted = {picture: max(seen, key=seen.__getitem__) for picture, seen in scores.items()}
    category = [predicted[question.picture] == question.category for question in questions]
    choice = [
        credit([score(question, option) for option in question.options], question.answer) for question in questions
    ]
    return Probed(np.array(category, dtype=float), np.array(choice), probe.penalty)
