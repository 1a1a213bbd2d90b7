"""Filters over header facts and computed columns, and what they refuse."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.data import columns
from mm.data.card import Card
from mm.data.columns import ColumnError
from mm.data.index import Index, index_card
from mm.data.where import WhereError, parse, select
from mm.sample import BrokenSample, Sample
from tests.shard_files import cloud, jpeg, pairs, wav, write_card, write_tar


def number(sample: Sample) -> int:
    return int(sample.key)


def clip(sample: Sample) -> float:
    """No score for every fifth sample, no number for the one after."""
    if number(sample) % 5 == 0:
        raise BrokenSample("the model gave no score")
    return math.nan if number(sample) % 5 == 1 else number(sample) / 20


def indexed(folder: Path) -> Index:
    """20 caption pairs in two shards. Sample i has a picture of i + 8 by 9 pixels and the caption ``caption i``."""
    write_tar(folder / "0.tar", pairs(10))
    write_tar(folder / "1.tar", pairs(10, 10))
    return index_card(Card.load(write_card(folder, ["0.tar", "1.tar"])), "train", folder / "index")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """That with computed columns."""
    index = indexed(tmp_path_factory.mktemp("pairs"))
    columns.compute(index, "clip", "a model", clip, pa.float32())
    columns.compute(index, "safe", "a rule", lambda sample: number(sample) < 15, pa.bool_())
    columns.compute(index, "words", "a tokenizer", lambda sample: [number(sample)], pa.list_(pa.int32()))
    return index


def rows(index: Index, expression: str) -> list[int]:
    return np.flatnonzero(select(index, expression).selected).tolist()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("width >= 20", range(12, 20)),
        ("10 <= width < 13", range(2, 5)),
        ("not width >= 20", range(12)),
        ("width == 8 or width == 27", [0, 19]),
        ("width / height >= 3", [19]),
        ("-width + 9 * 2 > 8", [0, 1]),
        ("width in (9, 11.0, -3)", [1, 3]),
        ("width not in [9]", [0, *range(2, 20)]),
        ('key == "000007"', [7]),
        ('key in {"000007", "000019"}', [7, 19]),
        ('"9" in key', [9, 19]),
        ("characters > 9", range(10, 20)),
        ("images == 1 and recordings == 0 and width <= 9", [0, 1]),
        ("safe and width > 20", [13, 14]),
        ("not safe", range(15, 20)),
        ("clip >= 0.9", [18, 19]),
        ("clip is None and width < 15", [0, 1, 5, 6]),
        ("clip is not None and width < 12", [2, 3]),
    ],
)
def test_an_expression_selects_what_python_would(index: Index, expression: str, expected: range | list[int]) -> None:
    assert rows(index, expression) == list(expected)


def test_what_is_missing_is_not_selected_by_a_condition_nor_by_its_opposite_and_is_counted(index: Index) -> None:
    above, below = select(index, "clip > 0.4"), select(index, "not clip > 0.4")
    missing = [row for row in range(20) if row % 5 < 2]
    assert np.flatnonzero(above.missing).tolist() == np.flatnonzero(below.missing).tolist() == missing
    assert not (above.selected & below.selected).any()
    assert above.selected.sum() + below.selected.sum() + len(missing) == 20
    either = select(index, "clip > 0.4 or width < 10")
    assert either.selected[:2].all()
    assert not either.missing[:2].any()
    assert rows(index, "0 / (width - 8) == 0") == list(range(1, 20))  # 0 / 0 is no number


def test_of_several_items_the_smallest_counts_and_of_none_nothing_is_known(tmp_path: Path) -> None:
    turns = b'[{"from": "human", "value": "%s hi"}, {"from": "gpt", "value": "yes"}]'
    members = [
        *[("a.json", turns % (b"<image> " * 2)), ("a.1.jpg", jpeg(30, 12)), ("a.2.jpg", jpeg(20, 40))],
        *[("b.json", turns % b"<image> "), ("b.1.jpg", jpeg(25, 11))],
        ("c.json", turns % b""),
    ]
    write_tar(tmp_path / "0.tar", members)
    card = write_card(tmp_path, ["0.tar"], {"chat": "json", "images": ["1.jpg", "2.jpg"]})
    chats = index_card(Card.load(card), "train", tmp_path / "index")
    assert rows(chats, "images == 2 and width == 20 and height == 12") == [0]
    assert rows(chats, "width is None and images == 0") == [2]
    assert np.flatnonzero(select(chats, "width > 20").missing).tolist() == [2]


def test_recordings_and_point_clouds_have_facts_of_their_own(tmp_path: Path) -> None:
    sounds = [("d.wav", wav(800, 8000)), ("d.txt", b"a"), ("e.wav", wav(3200, 16000)), ("e.txt", b"b")]
    clouds = [("f.npy", cloud(7)), ("f.txt", b"a"), ("g.npy", cloud(9)), ("g.txt", b"b")]
    indexes = []
    for name, part, members in (("sounds", {"speech": "wav"}, sounds), ("clouds", {"point": "npy"}, clouds)):
        write_tar(tmp_path / f"{name}.tar", members)
        card = write_card(tmp_path, [f"{name}.tar"], [part, {"text": "txt"}], name=name)
        indexes.append(index_card(Card.load(card), "train", tmp_path / "index"))
    assert rows(indexes[0], "seconds > 0.15 and frames == 3200 and recordings == 1") == [1]
    assert rows(indexes[1], "points >= 8 and clouds == 1") == [1]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "width.__class__ == 1",
        "().__class__",
        "open('x') is None",
        "width ** 9999999 > 1",
        "9 ** 9 ** 9 > width",
        "1 << 9999999 > width",
        "[width for width in key] == 1",
        "(lambda: width)() > 1",
        "(width := 3) > 1",
        "width if height else 3",
        "f'{width}' == 'a'",
        "key[0] == 'a'",
        "*width",
        "width @ height > 1",
        "~width > 1",
        "await width",
        "{**width} == 1",
        "b'x' in key",
        "3j > width",
        "... is None",
        "99999999999999999999 > width",
    ],
)
def test_nothing_but_conditions_over_columns_is_allowed(index: Index, expression: str) -> None:
    with pytest.raises(WhereError, match="where: "):
        select(index, expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "is no expression"),
        ("width >", "is no expression"),
        ("width > 3; height", "is no expression"),
        ("width = 3", "is no expression"),
        ("width > 3\0", "is no expression"),
        ("width", "`width`: is a number, not a condition"),
        ("width > 3 and height", "`height`: is a number, not a condition"),
        ("width > 'wide'", "compares a number with a text"),
        ("key + 1 > 3", "`key`: is a text, not a number"),
        ("width in ('a', 3)", "`'a'`: is a text in a list for a number"),
        ("width in (height, 3)", "a list may hold constants only"),
        ("width in key", "needs a list of constants after it, or a text before it"),
        ("width in ()", "an empty list"),
        ("width == (1, 2)", "a list may only stand after `in`"),
        ("width == None", "write `is None`"),
        ("width is 3", "write =="),
        ("1 < 2", "names no column"),
        ("clipp > 0.2", r"no column 'clipp' of pairs/train. Did you mean clip\? There are key, .*width, .*clip, safe"),
        ("words > 3", r"words holds list<.*>, which cannot be compared"),
        ("width > 99", r"selects none of the 20 rows of pairs/train, 0 of them .*; width is 8 to 27"),
        ("clip > 2", r"selects none of the 20 rows of pairs/train, 8 of them .*; clip is 0.1 to 0.95"),
        ("width > 1" + " and width > 1" * 200, "characters, at most 2000"),
        ("not " * 60 + "safe", "nested more than 50 deep"),
        ("(" * 300 + "safe" + ")" * 300, "is no expression"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused_with_the_reason(index: Index, expression: str, message: str) -> None:
    with pytest.raises(WhereError, match=message):
        select(index, expression)


@given(st.text(max_size=40) | st.text("width()<>=!andortk.'\"[]{}+-*/0123456789 :,_", max_size=60))
def test_any_text_is_a_tree_of_conditions_or_a_where_error(text: str) -> None:
    with contextlib.suppress(WhereError):
        parse(text)


def test_a_column_under_several_fingerprints_is_refused_with_their_list(tmp_path: Path) -> None:
    index = indexed(tmp_path)
    columns.compute(index, "score", "model 1", number, pa.int32())
    assert rows(index, "score == 3") == [3]
    columns.compute(index, "score", "model 2", number, pa.int32())
    with pytest.raises(WhereError, match="score could be 2 columns: 'model 1', 'model 2'"):
        select(index, "score == 3")
    columns.compute(index, "height", "mine", number, pa.int32())
    with pytest.raises(WhereError, match="height could be 2 columns: a header fact, 'mine'"):
        select(index, "height == 3")


def test_columns_of_another_card_in_the_same_folder_are_not_seen(index: Index, tmp_path: Path) -> None:
    write_tar(tmp_path / "other.tar", pairs(3))
    other = index_card(Card.load(write_card(tmp_path, ["other.tar"], name="other")), "train", index.folder)
    with pytest.raises(WhereError, match="no column 'clip' of other/train"):
        select(other, "clip > 0.1")


def test_a_column_of_other_rows_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(5))
    card = Card.load(write_card(tmp_path, ["0.tar"]))
    first = index_card(card, "train", tmp_path / "index")
    columns.compute(first, "clip", "a model", number, pa.int32())
    write_tar(tmp_path / "0.tar", pairs(6))
    with pytest.raises(ColumnError, match="computed for other rows"):
        select(index_card(card, "train", tmp_path / "index"), "clip > 1")


def test_one_filter_has_one_spelling(index: Index) -> None:
    spellings = ("width>20 and(clip>.5)", "  width > 20 and clip > 0.5 ")
    assert len({select(index, spelling).expression for spelling in spellings}) == 1
    assert select(index, spellings[0]).columns == {"clip": "a model"}
