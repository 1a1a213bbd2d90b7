"""Letter and yes/no extraction against the recorded outputs of ms-vlmeval 0.0.20 (tests/data/make_letters.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm.evaluate.letters import extract_letter, extract_yes_no

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "letters.jsonl").open(encoding="utf-8")]
OPTION_SETS, CASES = CASES[0], CASES[1:]


def test_every_recorded_letter_is_reproduced() -> None:
    cases = [case for case in CASES if case[0] != "yes/no"]
    different = [case for case in cases if extract_letter(case[1], OPTION_SETS[case[0]]) != case[2]]
    assert len(cases) > 3500
    assert different == []


def test_every_recorded_yes_or_no_is_reproduced() -> None:
    cases = [case for case in CASES if case[0] == "yes/no"]
    different = [case for case in cases if extract_yes_no(case[1]) != case[2]]
    assert len(cases) > 1000
    assert different == []


def test_the_recorded_cases_cover_every_outcome() -> None:
    outcomes = {case[2] for case in CASES}
    assert outcomes >= {"A", "B", "C", "D", "E", "Z", None, "Yes", "No"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", None),
        ("Option A. red", "A"),
        ("The color is green", "B"),
        ("A and B", None),
        ("A picture of a dog", None),
        ("I can't process this file.", "Z"),
    ],
)
def test_the_rules_by_example(answer: str, letter: str | None) -> None:
    assert extract_letter(answer, ["red", "green", "blue", "black"]) == letter
