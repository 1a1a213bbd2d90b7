"""The built suite: what its options are, and that words alone give exactly chance on it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.evaluate.build import CaptionedPicture, build_choice_suite, distractor_counts
from mm.evaluate.choice import credit
from mm.evaluate.suite import Question, Suite


def records(categories: int, pictures: int, seed: int = 0) -> list[CaptionedPicture]:
    """Pictures of animals in places; captions repeat, heads have several captions, two categories share a head."""
    draw = random.Random(seed)
    found = []
    for category in range(categories):
        for number in range(pictures):
            kind = draw.randrange(20)
            head = ("Bat", " bat")[category] if kind < 8 and category < 2 else f"animal {category}-{kind}"
            caption = f"{draw.choice(('A', 'The', 'One'))} {head} in place {category}"
            found.append(
                CaptionedPicture(f"{category}/{number}", draw.randbytes(60), caption, f"class {category}", head)
            )
    return found


RECORDS = [
    *records(11, 38),
    *(CaptionedPicture(f"few/{n}", bytes([n]) * 60, f"few {n}", "few", f"few {n % 3}") for n in range(5)),
]
SUITE = build_choice_suite(RECORDS, easy_per_picture=1, hard_per_picture=2, seed=3)
BY_CAPTION = {record.caption: record for record in RECORDS}
BY_ID = {record.id: record for record in RECORDS}


def part(suite: Suite, difficulty: str) -> list[Question]:
    return [question for question in suite.questions if question.difficulty == difficulty]


def test_the_suite_is_as_large_as_promised() -> None:
    assert len(SUITE.questions) >= 1000
    assert len(SUITE.pictures) >= 400
    assert len(part(SUITE, "hard")) >= 600


def test_the_answer_is_the_pictures_caption_and_no_distractor_shares_caption_or_head() -> None:
    for question in SUITE.questions:
        record = BY_ID[question.picture]
        assert question.options[question.answer] == record.caption
        heads = [BY_CAPTION[option].head.strip().lower() for option in question.options]
        assert len(set(heads)) == len(set(question.options)) == 4


def test_equal_captions_with_different_heads_never_meet() -> None:
    few = [
        CaptionedPicture(f"{c}/{n}", bytes([c, n]) * 30, f"thing {n % 4}", f"class {c}", f"head {c}/{n}")
        for c in range(5)
        for n in range(8)
    ]
    suite = build_choice_suite(few, 2, 2, seed=0)
    assert {question.difficulty for question in suite.questions} == {"easy", "hard"}
    assert all(len(set(question.options)) == 4 for question in suite.questions)


def test_distractors_of_hard_questions_share_the_category_and_those_of_easy_ones_never() -> None:
    for question in SUITE.questions:
        categories = {BY_CAPTION[option].category for option in question.options}
        assert len(categories) == (1 if question.difficulty == "hard" else 4)
        assert question.category in categories


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_every_caption_is_three_times_as_often_a_distractor_as_the_answer(difficulty: str) -> None:
    counts = distractor_counts(part(SUITE, difficulty))
    assert counts
    assert all(shown == 3 * answered for answered, shown in counts.values())


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_right_letters_are_exactly_balanced(difficulty: str) -> None:
    assert len(set(Counter(question.letter for question in part(SUITE, difficulty)).values())) == 1


def accuracy(questions: list[Question], score: Callable[[Question, str], float]) -> float:
    scores = ([score(question, option) for option in question.options] for question in questions)
    return sum(credit(each, question.answer) for each, question in zip(scores, questions, strict=True)) / len(questions)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.sampled_from([1, 2, 1000]))
@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_any_taste_for_captions_gives_exactly_chance(difficulty: str, seed: int, levels: int) -> None:
    """Whatever a caption's fixed score, and if all captions of a question are weighed against each other as well."""
    taste = {caption: random.Random(f"{seed} {caption}").randrange(levels) for caption in BY_CAPTION}
    questions = part(SUITE, difficulty)
    assert accuracy(questions, lambda question, option: taste[option]) == pytest.approx(0.25, abs=1e-12)

    def contextual(question: Question, option: str) -> float:
        return random.Random(f"{seed} {option} {sorted(question.options)}").random()

    assert accuracy(questions, contextual) == pytest.approx(0.25, abs=1e-12)


def test_no_picture_is_asked_the_same_twice() -> None:
    asked = Counter((question.picture, frozenset(question.options)) for question in SUITE.questions)
    assert max(asked.values()) == 1
    several = Counter((question.picture, question.difficulty) for question in SUITE.questions)
    assert max(count for (_, difficulty), count in several.items() if difficulty == "easy") == 1
    assert max(count for (_, difficulty), count in several.items() if difficulty == "hard") == 2


def test_what_was_left_out_is_counted() -> None:
    made = SUITE.settings.made
    assert made["categories_too_small_for_hard"] == {"few": 3}
    assert made["pictures_without_hard"] == len(RECORDS) - len({q.picture for q in part(SUITE, "hard")}) >= 5
    assert made["pictures_without_easy"] == len(RECORDS) - len({q.picture for q in part(SUITE, "easy")}) <= 3


def test_four_pictures_have_one_block_and_a_second_round_adds_nothing() -> None:
    four = [CaptionedPicture(str(n), bytes([n]) * 60, f"caption {n}", "one", str(n)) for n in range(4)]
    assert len(build_choice_suite(four, 0, 5, seed=0).questions) == 4


def test_the_same_seed_gives_the_same_suite_and_another_seed_another() -> None:
    few = records(5, 8)
    assert build_choice_suite(few, 1, 1, seed=1) == build_choice_suite(few, 1, 1, seed=1)
    assert build_choice_suite(few, 1, 1, seed=1).questions != build_choice_suite(few, 1, 1, seed=2).questions


def test_easy_questions_need_four_categories_and_ids_occur_once() -> None:
    with pytest.raises(ValueError, match="need 4 categories, found 3"):
        build_choice_suite(records(3, 8), 1, 0, seed=0)
    with pytest.raises(ValueError, match="'0/0' occurs more than once"):
        build_choice_suite(records(4, 8) * 2, 1, 0, seed=0)
