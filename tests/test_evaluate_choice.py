"""Scoring options: rules, ties, asking once; controls and intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from scipy.stats import bootstrap

from mm.evaluate.answerer import Prompt, Scored, ScoredQuestion
from mm.evaluate.choice import MOST_OPTIONS, credit, distinct, likelihood_prompt, option_scores, score_once
from mm.evaluate.controls import chance, circular_chance, shuffled_pictures
from mm.evaluate.intervals import clustered_interval
from mm.evaluate.suite import Question

QUIET = Progress(disable=True)


def test_each_rule_prefers_what_it_says() -> None:
    """Short, long and well shown: one option is likeliest, one likeliest a token, one gains most from the picture."""
    shown = [Scored(-4.0, 1), Scored(-8.0, 8), Scored(-6.0, 2)]
    withheld = [Scored(-4.5, 1), Scored(-9.0, 8), Scored(-12.0, 2)]
    assert option_scores("sum", shown, withheld) == (-4.0, -8.0, -6.0)
    assert option_scores("per_token", shown, withheld) == (-4.0, -1.0, -3.0)
    assert option_scores("minus_text_only", shown, withheld) == (0.5, 1.0, 6.0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2], 1), ([1, 3, 2], 0), ([3, 3, 2], 1 / 2), ([1, 3, 3], 0), ([2, 2, 2, 2], 1 / 4)],
)
def test_options_that_tie_for_the_highest_score_share_the_credit(scores: list[float], expected: float) -> None:
    assert credit(scores, answer=0) == expected


def test_the_prompt_fills_in_question_and_hint_and_leaves_other_braces_alone() -> None:
    question = Question(0, "p", "Is {hint} {x}?", ("a", "b"), 0, hint="seen")
    assert likelihood_prompt("{question} {y}:", question) == "Is seen {x}? {y}:"


class Counting:
    """Scores by what was asked, and keeps what was asked."""

    def __init__(self) -> None:
        self.calls: list[list[ScoredQuestion]] = []

    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        self.calls.append(list(questions))
        return [[Scored(-float(len(f"{q.picture}{q.prompt}{option}")), 1) for option in q.options] for q in questions]

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        return [prompt.text[:max_tokens] for prompt in prompts]


def test_each_picture_prompt_and_option_is_asked_once_and_every_question_gets_its_scores() -> None:
    pictures = [None, b"one", b"two"]
    questions = [
        ScoredQuestion(pictures[n % 3], "ab"[n % 2], tuple(f"option {m}" for m in range(n % 5, n % 5 + 3)))
        for n in range(60)
    ]
    answerer = Counting()
    scored = score_once(answerer, questions, batch=2, progress=QUIET)
    asked = Counter((q.picture, q.prompt, option) for call in answerer.calls for q in call for option in q.options)
    assert set(asked.values()) == {1}
    assert max(map(len, answerer.calls)) == 2
    assert scored == [tuple(answer) for answer in Counting().score(questions)]


def test_questions_of_one_picture_are_asked_next_to_each_other_and_many_options_in_parts() -> None:
    options = tuple(map(str, range(MOST_OPTIONS + 1)))
    asked = distinct(
        [ScoredQuestion(b"1", "a", options), ScoredQuestion(b"2", "a", ("x",)), ScoredQuestion(b"1", "b", ("y",))]
    )
    assert [(q.picture, q.prompt, len(q.options)) for q in asked] == [
        (b"1", "a", MOST_OPTIONS),
        (b"1", "a", 1),
        (b"1", "b", 1),
        (b"2", "a", 1),
    ]


@pytest.mark.parametrize("broken", [Scored(math.nan, 1), Scored(-math.inf, 1), Scored(-1.0, 0)])
def test_a_likelihood_that_cannot_be_compared_is_an_error(broken: Scored) -> None:
    class Broken(Counting):
        def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
            return [[broken] * len(question.options) for question in questions]

    with pytest.raises(ValueError, match="option 'x' after 'q' scored"):
        score_once(Broken(), [ScoredQuestion(b"1", "q", ("x", "y"))], batch=1, progress=QUIET)


# Controls


def questions_of(answers: Sequence[str], each: int = 1) -> list[Question]:
    """So many questions on each of several pictures, whose answers are given."""
    return [
        Question(number * each + turn, f"picture {number}", "?", (answer, "other"), 0)
        for number, answer in enumerate(answers)
        for turn in range(each)
    ]


@given(answers=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), seed=st.integers(0, 2**16))
def test_no_picture_is_shuffled_onto_itself_nor_onto_its_own_answer_where_that_is_possible(
    answers: list[str], seed: int
) -> None:
    questions = questions_of(answers, each=2)
    others = shuffled_pictures(questions, seed)
    answer = {question.picture: question.options[0] for question in questions}
    assert sorted(others) == sorted(others.values()) == sorted(answer)
    assert all(picture != other for picture, other in others.items())
    if max(Counter(answers).values()) <= len(answers) // 2:
        assert all(answer[picture] != answer[other] for picture, other in others.items())


def test_shuffled_pictures_follow_the_seed() -> None:
    questions = questions_of("abcdefgh")
    assert shuffled_pictures(questions, 1) == shuffled_pictures(questions, 1)
    assert len({tuple(sorted(shuffled_pictures(questions, seed).items())) for seed in range(20)}) > 10


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="need two pictures or more, found 1"):
        shuffled_pictures(questions_of("a"), 0)


def test_chance_follows_from_the_number_of_options() -> None:
    questions = [Question(0, "p", "q", ("a", "b"), 0), Question(1, "p", "q", ("a", "b", "c", "d"), 0)]
    assert chance(questions) == (1 / 2 + 1 / 4) / 2
    assert circular_chance(questions) == (1 / 4 + 1 / 256) / 2


# Intervals


def test_with_one_question_a_picture_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(size=150)
    theirs = bootstrap((values,), np.mean, n_resamples=8000, method="percentile", rng=0).confidence_interval
    ours = clustered_interval(values, [str(n) for n in range(150)], seed=0, resamples=8000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_repeating_every_question_narrows_nothing() -> None:
    values = (np.random.default_rng(0).random(100) < 0.6).astype(float)
    pictures = [str(n) for n in range(100)]
    once = clustered_interval(values, pictures, seed=0)
    assert clustered_interval(np.tile(values, 4), pictures * 4, seed=0) == pytest.approx(once)
    independent = clustered_interval(np.tile(values, 4), list(map(str, range(400))), seed=0)
    assert independent[1] - independent[0] < 0.6 * (once[1] - once[0])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Pictures of unequal numbers of questions whose difficulty differs between pictures; the mean is 0.6."""
    draw = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        sizes = draw.integers(1, 6, size=80)
        ease = np.repeat(draw.beta(1.5, 1.0, size=80), sizes)
        right = (draw.random(len(ease)) < ease).astype(float)
        low, high = clustered_interval(
            right, np.repeat(np.arange(80), sizes).astype(str).tolist(), trial, resamples=400
        )
        covered += low <= 0.6 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    draw = np.random.default_rng(0)
    ease = draw.normal(size=200)
    one, other = ease + 0.1 * draw.normal(size=200) + 0.1, ease + 0.1 * draw.normal(size=200)
    pictures = list(map(str, range(200)))
    low, high = clustered_interval(one - other, pictures, seed=0)
    assert 0 < low < 0.1 < high
    assert high - low < 0.3 * np.ptp(clustered_interval(one, pictures, seed=0))


def test_one_picture_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two or more, found 1"):
        clustered_interval(np.ones(3), ["a"] * 3, seed=0)
