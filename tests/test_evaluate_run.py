"""Evaluation from suite to results, with answerers whose accuracy is known."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mm.evaluate import (
    CaptionedPicture,
    FrozenFeatures,
    Options,
    Prompt,
    Results,
    Scored,
    ScoredQuestion,
    Settings,
    Suite,
    build_choice_suite,
    evaluate,
)
from mm.evaluate.circular import with_rotations
from mm.evaluate.suite import RULES, Rule

KEYS = {
    *(
        "accuracy_likelihood",
        "accuracy_easy",
        "accuracy_hard",
        "accuracy_generation",
        "circular",
        "chance",
        "text_only",
    ),
    *(
        "shuffled_images",
        "questions",
        "pictures",
        "intervals",
        "categories",
        "baselines",
        "score",
        "prompt",
        "versions",
    ),
    *("accuracy_hard_minus_shuffled", "generation_questions"),
}


def records(categories: int = 5, pictures: int = 12) -> list[CaptionedPicture]:
    return [
        CaptionedPicture(
            f"{c}/{n}", f"picture {c}/{n} ".encode() * 9, f"{'long ' * (n % 3)}thing{c}x{n}", f"class {c}", f"{c}-{n}"
        )
        for c in range(categories)
        for n in range(pictures)
    ]


RECORDS = records()
SUITE = build_choice_suite(RECORDS, easy_per_picture=1, hard_per_picture=2, seed=0)
FEW = Options(generation_questions=20, resamples=300)


class Knowing:
    """Knows the captions of some pictures; of the others, and of none, it has only a taste for captions.

    A caption that it knows to be true gains `gain` over a taste of 0 to −1 a word.
    """

    def __init__(self, records: Sequence[CaptionedPicture], knows: Callable[[str], bool], gain: float = 100.0) -> None:
        self.captions = {record.image: record.caption for record in records if knows(record.caption)}
        self.gain = gain
        self.generated = 0

    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        return [[self._score(question, option) for option in question.options] for question in questions]

    def _score(self, question: ScoredQuestion, option: str) -> Scored:
        words = option.split()
        taste = -len(words) - random.Random(option).random()
        seen = question.picture is not None and self.captions.get(question.picture) == option
        return Scored(taste + (self.gain if seen else 0.0), len(words))

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        self.generated += len(prompts)
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        assert prompt.picture is not None
        lines = [line.partition(". ") for line in prompt.text.splitlines()]
        return next(
            (letter for letter, _, text in lines if text == self.captions.get(prompt.picture)), "I cannot tell."
        )


class Saying(Knowing):
    """Answers every prompt with the same words."""

    def __init__(self, words: str) -> None:
        super().__init__([], knows=bool)
        self.words = words

    def _answer(self, prompt: Prompt) -> str:
        return self.words


def suite_with(rule: Rule) -> Suite:
    return replace(SUITE, settings=replace(SUITE.settings, score=rule))


@pytest.mark.parametrize("rule", RULES)
def test_an_oracle_is_right_under_every_rule_and_its_controls_are_chance(rule: Rule) -> None:
    found = evaluate(suite_with(rule), Knowing(RECORDS, knows=lambda caption: True), FEW).summary
    assert found["accuracy_likelihood"] == found["accuracy_easy"] == found["accuracy_hard"] == 1.0
    assert found["accuracy_generation"] == found["circular"] == 1.0
    assert found["text_only"] == pytest.approx(0.25, abs=1e-12)
    assert found["shuffled_images"] < 0.3
    low, high = found["intervals"]["accuracy_hard_minus_shuffled"]
    assert 0.6 < low <= found["accuracy_hard_minus_shuffled"] <= high < 0.9
    assert found["score"] == rule


def test_a_taste_for_captions_gives_exactly_chance_under_every_rule() -> None:
    found = evaluate(SUITE, Knowing(RECORDS, knows=lambda caption: False), FEW).summary
    for name in ("accuracy_likelihood", "accuracy_easy", "accuracy_hard", "text_only", "shuffled_images"):
        assert found[name] == pytest.approx(0.25, abs=1e-12)
    assert found["rules"] == {rule: pytest.approx(0.25, abs=1e-12) for rule in RULES}
    assert found["accuracy_hard_minus_shuffled"] == 0.0


def test_what_a_weak_signal_is_worth_depends_on_the_rule_that_was_fixed() -> None:
    """A gain of 1 is lost in the taste for short captions, but not once that taste is subtracted."""
    weak = Knowing(RECORDS, knows=lambda caption: True, gain=1.0)
    found = {rule: evaluate(suite_with(rule), weak, FEW).summary for rule in ("sum", "minus_text_only")}
    assert found["sum"]["accuracy_likelihood"] < 0.8
    assert found["minus_text_only"]["accuracy_likelihood"] == 1.0
    assert found["sum"]["rules"] == found["minus_text_only"]["rules"]


def test_always_the_same_letter_is_chance_plainly_and_zero_in_circular_evaluation() -> None:
    found = evaluate(SUITE, Saying("A"), replace(FEW, generation_questions=None)).summary
    assert found["accuracy_generation"] == 0.25
    assert found["circular"] == 0.0


def test_three_of_four_groups_right_is_three_quarters() -> None:
    four = [CaptionedPicture(str(n), bytes([n]) * 60, f"thing {n}", "one", str(n)) for n in range(4)]
    suite = build_choice_suite(four, 0, 1, seed=0)
    found = evaluate(suite, Knowing(four, knows=lambda caption: caption != "thing 2"), FEW)
    assert found.summary["circular"] == found.summary["accuracy_generation"] == 0.75
    assert found.summary["generation_questions"] == 4
    assert [answer.letters for answer in found.answers if answer.picture == "2"] == [(None,) * 4]


def test_rotations_that_a_suite_holds_change_no_figure_and_count_no_question_twice() -> None:
    half = Knowing(RECORDS, knows=lambda caption: hash_of(caption) % 2 == 0)
    every = replace(FEW, generation_questions=None)
    plain, circular = (evaluate(suite, half, every).summary for suite in (SUITE, with_rotations(SUITE)))
    different = {name for name in plain if plain[name] != circular[name]}
    assert different == {"suite", "suite_fingerprint"}
    assert 0.3 < plain["circular"] < 0.7


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def test_results_do_not_depend_on_the_batch() -> None:
    half = Knowing(RECORDS, knows=lambda caption: hash_of(caption) % 2 == 0)
    one, many = (evaluate(SUITE, half, replace(FEW, batch=batch)) for batch in (1, 1000))
    assert one.summary == many.summary
    assert one.answers == many.answers


def test_generation_asks_a_drawn_part_of_the_questions_and_says_how_many() -> None:
    answerer = Knowing(RECORDS, knows=lambda caption: True)
    found = evaluate(SUITE, answerer, FEW)
    asked = [answer for answer in found.answers if answer.generated]
    assert found.summary["generation_questions"] == len(asked) == 20
    assert answerer.generated == 80
    assert asked != list(found.answers[:20])
    none = evaluate(SUITE, answerer, replace(FEW, generation_questions=0)).summary
    assert none["accuracy_generation"] is none["circular"] is None
    assert "circular" not in none["intervals"]


def test_a_suite_without_hard_questions_has_no_hard_figure() -> None:
    easy = replace(SUITE, questions=tuple(q for q in SUITE.questions if q.difficulty == "easy"))
    found = evaluate(easy, Saying("A"), FEW).summary
    assert found["accuracy_hard"] is found["accuracy_hard_minus_shuffled"] is None
    assert "accuracy_hard" not in found["intervals"]
    assert found["accuracy_easy"] == found["accuracy_likelihood"]


def test_results_record_what_they_rest_on() -> None:
    found = evaluate(SUITE, Saying("A"), replace(FEW, prompt="Q: {question}", about={"checkpoint": "step 7"})).summary
    assert found.keys() >= KEYS
    assert found["prompt"] == "Q: {question}"
    assert found["about"] == {"checkpoint": "step 7"}
    assert found["suite_fingerprint"] == SUITE.fingerprint
    assert (found["questions"], found["pictures"]) == (len(SUITE.questions), 60)
    assert found["shuffled_with_the_same_answer"] == 0
    assert {name: each["questions"] for name, each in found["categories"].items()} == {
        f"class {c}": 36 for c in range(5)
    }


def saved(folder: Path) -> tuple[Results, Path]:
    features = np.eye(60)
    frozen = FrozenFeatures(
        pictures={record.id: features[number] for number, record in enumerate(RECORDS)},
        train=features,
        captions=[record.caption for record in RECORDS],
        categories=[record.category for record in RECORDS],
    )
    results = evaluate(SUITE, Knowing(RECORDS, knows=lambda caption: True), FEW, features=frozen)
    results.save(folder / "run")
    return results, folder / "run"


def test_saved_results_read_back_with_one_line_a_question(tmp_path: Path) -> None:
    results, folder = saved(tmp_path)
    assert json.loads((folder / "results.json").read_text()) == results.summary
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [question.index for question in SUITE.questions]
    assert np.mean([line["right"] for line in lines]) == results.summary["accuracy_likelihood"]
    assert np.mean([line["shuffled"] for line in lines]) == results.summary["shuffled_images"]
    assert all(line["prediction"] == line["answer"] for line in lines)
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "results.json"]


def test_baselines_answer_the_same_questions(tmp_path: Path) -> None:
    """Every picture is its own nearest training picture here, so its caption is found."""
    baselines = saved(tmp_path)[0].summary["baselines"]
    assert baselines["nearest_captions"] == 1.0
    assert baselines["linear_probe_hard"] == 0.25


def test_the_tables_show_figures_intervals_and_controls(tmp_path: Path) -> None:
    shown = io.StringIO()
    Console(width=140, file=shown).print(*saved(tmp_path)[0].tables())
    for text in (
        "180 questions, 60 pictures",
        "100.0 (100.0 to 100.0)",
        "text only",
        "25.0",
        "circular, 20",
        "class 4",
    ):
        assert text in shown.getvalue()


def test_one_picture_cannot_be_evaluated() -> None:
    question = replace(SUITE.questions[0], picture="one")
    suite = Suite("single", (question,), {"one": b"x"}, Settings())
    with pytest.raises(ValueError, match="two pictures or more"):
        evaluate(suite, Saying("A"))
