"""Suites: the TSV form, its settings, and errors that name row and column."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm.configure import RecipeError
from mm.evaluate.circular import group, group_is_right, rotations, with_rotations
from mm.evaluate.suite import Question, Settings, Suite, SuiteError, read_suite, write_suite

RED, BLUE = b"red picture " * 20, b"blue picture " * 20_000
IMAGE = base64.b64encode(RED).decode()
HEADER = "index\timage\tquestion\tA\tB\tC\tanswer\n"


def question(index: int = 0, picture: str = "red", **changes: Any) -> Question:
    return replace(Question(index, picture, "Which colour?", ("red", "green", "blue"), 0), **changes)


def suite(*questions: Question, **settings: Any) -> Suite:
    return Suite("colours", questions, {"red": RED, "blue": BLUE}, Settings(**settings))


def read(folder: Path, text: str) -> Suite:
    path = folder / "colours.tsv"
    path.write_text(text, encoding="utf-8")
    return read_suite(path)


def test_a_written_suite_reads_back_equal_with_its_settings(tmp_path: Path) -> None:
    written = suite(
        question(hint='tab\t, "quotes"\nand a second line', category="c", l2_category="l", split="test"),
        question(1, "blue", answer=2, difficulty="hard", extra={"licence": "CC0"}),
        question(2, "red", options=("rouge", "vert"), answer=1, extra={"licence": ""}),
        score="per_token",
        prompt="Q: {question} A:",
        seed=7,
        made={"from": "a test"},
    )
    written = replace(written, questions=(replace(written.questions[0], extra={"licence": ""}), *written.questions[1:]))
    write_suite(written, tmp_path / "colours.tsv")
    assert read_suite(tmp_path / "colours.tsv") == written


def test_every_picture_is_written_once_and_referred_to_by_index(tmp_path: Path) -> None:
    write_suite(suite(question(5), question(6, "blue"), question(9)), tmp_path / "colours.tsv")
    assert (tmp_path / "colours.tsv").read_text().splitlines()[3].endswith("\t5")


def test_rows_may_refer_to_later_rows_and_unnamed_pictures_are_named_by_their_first_row(tmp_path: Path) -> None:
    found = read(tmp_path, f"{HEADER}3\t4\tq\tx\ty\tz\tC\n4\t{IMAGE}\tq\tx\ty\t\tB\n")
    assert [(each.picture, each.options, each.letter) for each in found.questions] == [
        ("3", ("x", "y", "z"), "C"),
        ("3", ("x", "y"), "B"),
    ]
    assert found.pictures == {"3": RED}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tquestion\tA\tB\tanswer\n", "no column image"),
        (f"{HEADER}x\t{IMAGE}\tq\ta\tb\tc\tA\n", "row 1, column index: 'x' is not a whole number"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\tb\tc\tA\n1\t7\tq\ta\tb\tc\tA\n", "row 2, column image: '7' is neither"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\tb\tc\tA\n1\t\tq\ta\tb\tc\tA\n", "row 2, column image: '' is neither"),
        (f"{HEADER}0\t{IMAGE[:-1]}é\tq\ta\tb\tc\tA\n", "row 1, column image: not the base64"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\tb\tc\tD\n", "row 1, column answer: 'D' is none of the options A, B, C"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\t\t\tA\n", "row 1, column B: empty"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\t\tc\tA\n", "row 1, column B: empty"),
        (HEADER.replace("\tC", "\tC\tD") + f"0\t{IMAGE}\tq\ta\tb\t\td\tA\n", "row 1, column C: empty, but column D"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\tb\tA\n", "row 1: 6 columns, but the header has 7"),
        (f"{HEADER}0\t{IMAGE}\tq\ta\tb\tc\tA\n0\t0\tq\ta\tb\tc\tA\n", "index 0 occurs twice"),
        (f'{HEADER}0\t{IMAGE}\t"q\ta\tb\tc\tA\n', "line 2"),
        (HEADER, "no question with an index below 1000000"),
        (
            HEADER.replace("index", "picture\tindex")
            + f"p\t0\t{IMAGE}\tq\ta\tb\tc\tA\np\t1\t{IMAGE[4:]}\tq\ta\tb\tc\tA\n",
            "row 2, column picture: 'p' is the id of another picture",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named_by_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("settings", ["score: best", "sore: sum", "seed: one", "- sum", "made: !!python/tuple [1]"])
def test_settings_that_make_no_sense_are_named_with_their_file(tmp_path: Path, settings: str) -> None:
    (tmp_path / "colours.suite.yaml").write_text(settings)
    with pytest.raises(RecipeError, match=re.escape("colours.suite.yaml")):
        read(tmp_path, f"{HEADER}0\t{IMAGE}\tq\ta\tb\tc\tA\n")


def test_an_option_that_pandas_takes_for_an_empty_cell_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="question 0, column B: VLMEvalKit reads 'None'"):
        write_suite(suite(question(options=("red", "None"))), tmp_path / "colours.tsv")


def test_one_file_under_two_ids_is_refused() -> None:
    with pytest.raises(SuiteError, match="'a' and 'b' are the same file"):
        Suite("colours", (question(picture="a"),), {"a": RED, "b": RED})


def test_the_fingerprint_changes_with_a_question_and_with_a_picture() -> None:
    one = suite(question())
    assert one.fingerprint == suite(question()).fingerprint
    assert one.fingerprint != suite(question(answer=1)).fingerprint
    assert one.fingerprint != replace(one, pictures={"red": BLUE}).fingerprint


def test_the_letter_prompt_is_that_of_vlmevalkit() -> None:
    assert question(hint="Look.").letter_prompt == (
        "Hint: Look.\nQuestion: Which colour?\nOptions:\nA. red\nB. green\nC. blue\n"
        "Please select the correct answer from the options above. \n"
    )
    assert question().letter_prompt.startswith("Question: Which colour?\n")


# Rotations


def test_every_rotation_keeps_the_right_text_and_each_letter_is_right_once() -> None:
    turned = rotations(question(3))
    assert [each.index for each in turned] == [3, 1_000_003, 2_000_003]
    assert [each.options[each.answer] for each in turned] == ["red"] * 3
    assert [each.letter for each in turned] == ["A", "C", "B"]


def test_rotations_that_a_suite_holds_are_used_as_they_are(tmp_path: Path) -> None:
    held = suite(question(3), question(2_000_003, options=("blue", "red", "green"), answer=1))
    assert group(held, held.first_rotations[0]) == held.questions
    write_suite(with_rotations(suite(question(3), question(4, "blue"))), tmp_path / "colours_circular.tsv")
    circular = read_suite(tmp_path / "colours_circular.tsv")
    assert len(circular.questions) == 6
    assert [each.index for each in circular.first_rotations] == [3, 4]


@pytest.mark.parametrize(
    ("letters", "right"), [("ACB", True), ("AAA", False), ("ACZ", False), (("A", "C", None), False)]
)
def test_a_group_is_right_only_if_every_rotation_is(letters: str, right: bool) -> None:
    assert group_is_right(rotations(question()), tuple(letters)) == right
