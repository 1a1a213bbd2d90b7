"""A suite, a model, and what to make of it.

questions ── own picture ─────┐
          ── another's ───────┼─▶ Answerer.score ─▶ credit ─▶ figures ─▶ intervals over pictures ─▶ Results
          ── none ────────────┘
          ── letters, rotated ──▶ Answerer.generate ─▶ extract_letter ─▶ generation, circular
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

import mm
from mm.evaluate import controls
from mm.evaluate.answerer import Answerer, Prompt, Scored, ScoredQuestion
from mm.evaluate.baselines import FrozenFeatures, nearest_captions, probe_categories
from mm.evaluate.choice import TEXT_ONLY, credit, likelihood_prompt, option_scores, score_once
from mm.evaluate.circular import group, group_is_right
from mm.evaluate.letters import RULES_OF, extract_letter
from mm.evaluate.report import Answered, Results, by_group, summarise
from mm.evaluate.suite import LETTERS, RULES, Question, Rule, Suite
from mm.packing.hashing import shuffled
from mm.terminal import Progress


@dataclass(frozen=True)
class Options:
    """How a suite is run; what the suite fixes beforehand (score rule, seed) is not among them.

    prompt: replaces the suite's text between picture and option, for models that were trained on another
    generation_questions: that many, drawn with the suite's seed, are also answered in words, under every rotation of
        their options; None asks all of them
    max_tokens: of a generated answer
    resamples: of the bootstrap
    batch: questions handed to the answerer at a time; results do not depend on it
    about: recorded as it is: run, checkpoint, commit, template, resolution
    """

    prompt: str | None = None
    generation_questions: int | None = 200
    max_tokens: int = 32
    resamples: int = 2000
    batch: int = 64
    about: Mapping[str, str] = field(default_factory=dict)


class Likelihoods(NamedTuple):
    """Per question: what each option scored with its own picture, with another, and with none."""

    own: list[tuple[Scored, ...]]
    other: list[tuple[Scored, ...]]
    none: list[tuple[Scored, ...]]


class Words(NamedTuple):
    """Generated answers and extracted letters of one question, one for each rotation."""

    rotations: tuple[Question, ...]
    generated: tuple[str, ...]
    letters: tuple[str | None, ...]


def evaluate(
    suite: Suite,
    answerer: Answerer,
    options: Options | None = None,
    progress: Progress | None = None,
    features: FrozenFeatures | None = None,
) -> Results:
    """Accuracy of the answerer on the suite, by likelihood and by generation, with controls and intervals.

    With `features`, the frozen-feature baselines answer the same questions.

    Raises:
        ValueError: fewer than two pictures, or an answerer that breaks its contract.
    """
    options = options or Options()
    progress = progress or Progress(disable=True)
    questions = suite.first_rotations
    seed = suite.settings.seed
    prompt = suite.settings.prompt if options.prompt is None else options.prompt
    others = controls.shuffled_pictures(questions, seed)
    likelihoods = _ask_likelihoods(suite, answerer, prompt, others, options.batch, progress)
    words = _ask_words(suite, answerer, options, progress)

    choices = _choices(questions, suite.settings.score, likelihoods)
    figures = _by_difficulty(choices, questions) | _worded(questions, words)
    figures["accuracy_likelihood"] = figures.pop("accuracy")
    baselines = _by_difficulty(_baselines(questions, features), questions) if features is not None else {}
    pictures = [question.picture for question in questions]
    means, intervals = summarise(figures | baselines, pictures, seed, options.resamples)
    summary = {
        "suite": suite.name,
        "questions": len(questions),
        "pictures": len(others),
        **{name: means[name] for name in figures},
        "baselines": {name: means[name] for name in baselines},
        "generation_questions": len(words),
        "chance": controls.chance(questions),
        "chance_circular": controls.circular_chance(questions),
        "shuffled_with_the_same_answer": _same_answers(questions, others),
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "rules": {rule: float(_credits(questions, rule, likelihoods.own, likelihoods.none).mean()) for rule in RULES},
        "categories": by_group(choices["accuracy{}"], [question.category for question in questions]),
        "l2_categories": by_group(choices["accuracy{}"], [question.l2_category for question in questions]),
        "score": suite.settings.score,
        "prompt": prompt,
        "letter_prompt": questions[0].letter_prompt,
        "letters": RULES_OF,
        "max_tokens": options.max_tokens,
        "resamples": options.resamples,
        "seed": seed,
        "suite_fingerprint": suite.fingerprint,
        "suite_made": dict(suite.settings.made),
        "about": dict(options.about),
        "versions": _versions(),
    }
    answers = _answers(questions, suite.settings.score, likelihoods, others, choices, words)
    return Results(summary, answers)


# Asking


def _ask_likelihoods(
    suite: Suite, answerer: Answerer, prompt: str, others: Mapping[str, str], batch: int, progress: Progress
) -> Likelihoods:
    """Three times all questions, in one call: a picture that also stands in for another is encoded once."""
    questions = suite.first_rotations

    def shown(picture: bytes | None, question: Question) -> ScoredQuestion:
        return ScoredQuestion(picture, likelihood_prompt(prompt, question), question.options)

    own = [shown(suite.pictures[question.picture], question) for question in questions]
    other = [shown(suite.pictures[others[question.picture]], question) for question in questions]
    none = [shown(None, question) for question in questions]
    scored = score_once(answerer, own + other + none, batch, progress)
    count = len(questions)
    return Likelihoods(scored[:count], scored[count : 2 * count], scored[2 * count :])


def _ask_words(suite: Suite, answerer: Answerer, options: Options, progress: Progress) -> dict[int, Words]:
    """Answers in words by question index, for the drawn questions, under every rotation."""
    questions = suite.first_rotations
    drawn = shuffled(len(questions), suite.settings.seed, "generation")[: options.generation_questions]
    groups = [group(suite, questions[number]) for number in drawn]
    asked = [rotation for each in groups for rotation in each]
    prompts = [Prompt(suite.pictures[question.picture], question.letter_prompt) for question in asked]
    generated: dict[int, str] = {}
    task = progress.add_task("generation", total=len(prompts))
    for start in range(0, len(prompts), options.batch):
        part = prompts[start : start + options.batch]
        indices = [question.index for question in asked[start : start + options.batch]]
        generated |= zip(indices, answerer.generate(part, options.max_tokens), strict=True)
        progress.advance(task, len(part))
    return {each[0].index: _words(each, generated) for each in groups}


def _words(rotations: tuple[Question, ...], generated: Mapping[int, str]) -> Words:
    texts = tuple(generated[question.index] for question in rotations)
    letters = (extract_letter(text, question.options) for text, question in zip(texts, rotations, strict=True))
    return Words(rotations, texts, tuple(letters))


# Figures: name → (Q,) value per question; NaN where the question is not part of the figure


def _credits(
    questions: Sequence[Question], rule: Rule, shown: Sequence[Sequence[Scored]], withheld: Sequence[Sequence[Scored]]
) -> np.ndarray:
    scored = zip(questions, shown, withheld, strict=True)
    return np.array([credit(option_scores(rule, *both), question.answer) for question, *both in scored])


def _choices(questions: Sequence[Question], rule: Rule, likelihoods: Likelihoods) -> dict[str, np.ndarray]:
    own, other, none = likelihoods
    right, shuffled_images = _credits(questions, rule, own, none), _credits(questions, rule, other, none)
    return {
        "accuracy{}": right,
        "shuffled_images{}": shuffled_images,
        "accuracy{}_minus_shuffled": right - shuffled_images,
        "text_only{}": _credits(questions, TEXT_ONLY[rule], none, none),
    }


def _baselines(questions: Sequence[Question], features: FrozenFeatures) -> dict[str, np.ndarray]:
    probed = probe_categories(questions, features)
    return {
        "nearest_captions{}": nearest_captions(questions, features),
        "linear_probe{}": probed.choice,
        "linear_probe_category{}": probed.category,
    }


def _by_difficulty(measures: Mapping[str, np.ndarray], questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """Every measure over all, easy and hard questions: ``{}`` in its name becomes nothing, ``_easy``, ``_hard``."""
    difficulty = np.array([question.difficulty for question in questions])
    figures = {}
    for name, values in measures.items():
        figures[name.format("")] = values
        for part in ("easy", "hard"):
            figures[name.format(f"_{part}")] = np.where(difficulty == part, values, np.nan)
    return figures


def _worded(questions: Sequence[Question], words: Mapping[int, Words]) -> dict[str, np.ndarray]:
    generation, circular = np.full((2, len(questions)), np.nan)
    for number, question in enumerate(questions):
        if (found := words.get(question.index)) is not None:
            generation[number] = found.letters[0] == question.letter
            circular[number] = group_is_right(found.rotations, found.letters)
    return {"accuracy_generation": generation, "circular": circular}


# Records


def _same_answers(questions: Sequence[Question], others: Mapping[str, str]) -> int:
    """Pictures whose stand-in has one of their own right answers: there, the control is no control."""
    answers: dict[str, set[str]] = {}
    for question in questions:
        answers.setdefault(question.picture, set()).add(question.options[question.answer])
    return sum(not answers[picture].isdisjoint(answers[other]) for picture, other in others.items())


def _answers(
    questions: Sequence[Question],
    rule: Rule,
    likelihoods: Likelihoods,
    others: Mapping[str, str],
    choices: Mapping[str, np.ndarray],
    words: Mapping[int, Words],
) -> tuple[Answered, ...]:
    answers = []
    for number, question in enumerate(questions):
        scores = option_scores(rule, likelihoods.own[number], likelihoods.none[number])
        found = words.get(question.index, Words((), (), ()))
        answers.append(
            Answered(
                index=question.index,
                picture=question.picture,
                category=question.category,
                difficulty=question.difficulty,
                options=question.options,
                answer=question.letter,
                prediction=LETTERS[scores.index(max(scores))],
                right=float(choices["accuracy{}"][number]),
                scores=scores,
                text_only=float(choices["text_only{}"][number]),
                shuffled_picture=others[question.picture],
                shuffled=float(choices["shuffled_images{}"][number]),
                generated=found.generated,
                letters=found.letters,
            )
        )
    return tuple(answers)


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "mm": mm.__version__, **packages}
