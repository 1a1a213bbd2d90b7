"""From a record to a sample: what is wrong with a record costs that record only, and what the words may hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mm.cli import app
from mm.data.card import Card, CardError
from mm.data.index import Index, index_shards
from mm.data.mapping import parse_mapping, reading_a_record
from mm.packing.plan import PlanChanged
from mm.sample import LONGEST, BrokenSample, Text
from mm.train.doctor import Look, LookOptions, look
from tests.shard_files import as_json, cloud, jpeg, words, write_card, write_tar
from tests.small_world import picture, train_here, write_recipe, write_source

DEEP = 800
MESSAGES = {"chat": "messages"}


def indexed(card: Path) -> Index:
    """The index of a card's split, which may have no rows."""
    loaded = Card.load(card)
    return index_shards(loaded, "train", loaded.shards("train"), card.parent / "index", progress=False)


def lines_card(folder: Path, records: list[Any], sample: Any, **more: Any) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return write_card(folder, "a.jsonl", sample, format="jsonl", **more)


def reasons(index: Index) -> list[str]:
    return index.errors.column("reason").to_pylist()


def deep(value: Any, depth: int = DEEP) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def parts_of(sample: Any, **fields: Any) -> list[Any]:
    """Parts of a record: words, and the bytes of files."""
    parts = parse_mapping(sample).parts(fields, 0)
    return [part.text if isinstance(part, Text) else part.data for part in parts]


def refused(sample: Any, **fields: Any) -> str:
    with pytest.raises(BrokenSample) as caught:
        parse_mapping(sample).parts(fields, 0)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- boundary

POISONED = {
    "surrogate in the words": ([{"text": "text"}], {"text": "a \ud800"}),
    "surrogate in a field name": ([{"text": "text"}], {"\ud800": 1}),
    "surrogate in a turn without markers": (
        MESSAGES,
        {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "a"}]},
    ),
    "surrogate in a typed item": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    "surrogate in an answer": (
        MESSAGES,
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud800"}]},
    ),
    "surrogate in a page": ({"texts": "texts", "images": "images"}, {"texts": ["\ud800"], "images": [None]}),
    "surrogate in a role": (MESSAGES, {"messages": [{"role": "\ud800", "content": "a"}]}),
    "surrogate in the keys of a turn": (MESSAGES, {"messages": [{"\ud800": 1}]}),
    "a role that is a number": (MESSAGES, {"messages": [{"role": 7, "content": "a"}]}),
    "a role that is a list": (MESSAGES, {"messages": [{"role": deep("user"), "content": "a"}]}),
    "nested files": ([{"image": {"from": "image", "encoding": "base64"}}], {"image": deep("aaaa")}),
    "a nested picture of a page": (
        {"texts": "texts", "images": "images"},
        {"texts": [None, "a"], "images": [deep("a"), None]},
    ),
    "a nested place of a page": (
        {"texts": "texts", "images": "images", "at": "at", "file": "file"},
        {"texts": ["a"], "images": [{"at": deep(1), "file": "x"}]},
    ),
    "a place of a page that is true": (
        {"texts": "texts", "images": "images", "at": "at", "file": "file"},
        {"texts": ["a", "b"], "images": [{"at": True, "file": "x"}]},
    ),
    "a key that is no text": ([{"text": "text"}], {"text": "a", "id": deep(1)}),
}


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_record_costs_that_record_only(tmp_path: Path, name: str) -> None:
    sample, record = POISONED[name]
    card = lines_card(tmp_path, [record, record], sample, key="id") if name == "a key that is no text" else None
    index = indexed(card or lines_card(tmp_path, [record, record], sample))
    assert index.rows == 0
    assert len(index.errors) == 2
    for text in (*reasons(index), *index.errors.column("key").to_pylist(), index.summary()):
        text.encode()


def test_a_good_record_next_to_poisoned_ones_is_kept(tmp_path: Path) -> None:
    records = [{"text": "\ud800"}, {"text": "good"}, {"\ud800": deep(1, 500)}, {"text": "too"}]
    index = indexed(lines_card(tmp_path, records, [{"text": "text"}]))
    assert [words(index.sample(row)) for row in range(index.rows)] == [["good"], ["too"]]
    assert [reason.partition(":")[0] for reason in reasons(index)] == ["text is not UTF-8", "missing field"]


def test_keys_and_reasons_are_short_and_different_keys_stay_different(tmp_path: Path) -> None:
    long = "k" * 100_000
    records = [{"text": "a", "id": f"{long}{n}"} for n in range(2)] + [{"text": "b", "id": "\ud800"}, {long: 1}]
    index = indexed(lines_card(tmp_path, records, [{"text": "text"}], key="id"))
    keys = index.key.to_pylist()
    assert keys[2] == "\\ud800"
    assert len(set(keys)) == 3
    assert all(len(text) <= LONGEST for text in (*keys, *reasons(index)))
    assert index.rows == 3


def test_a_failing_disk_and_spent_memory_are_no_broken_samples() -> None:
    for error in (OSError("disk"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading_a_record():
            raise error
    with pytest.raises(BrokenSample, match="unreadable record: KeyError: 'x'"), reading_a_record():
        raise KeyError("x")


def npy(header: str) -> bytes:
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(12)


def test_a_header_of_numbers_that_are_bools_costs_no_other_row(tmp_path: Path) -> None:
    odd = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}")
    members = [("1.npy", odd), ("1.txt", b"odd"), ("2.npy", cloud(7)), ("2.txt", b"good")]
    write_tar(tmp_path / "a.tar", members)
    index = indexed(write_card(tmp_path, "a.tar", [{"point": "npy"}, {"text": "txt"}]))
    assert "good" in [words(index.sample(row))[0] for row in range(index.rows)]
    assert index.media.dtype == np.int32


def test_every_command_survives_poisoned_records(tmp_path: Path) -> None:
    records = [record for _, record in POISONED.values()] + [{"text": "good"}]
    card = lines_card(tmp_path, records, [{"text": "text"}])
    for command in (
        ["data", "show", str(card), "0", "--folder", str(tmp_path / "index")],
        ["data", "check", str(card), "--processes", "0"],
        ["index", str(card), "--folder", str(tmp_path / "index")],
        ["doctor", str(tmp_path / "a.jsonl")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code in (0, 1), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output


def test_a_row_beyond_the_end_is_a_sentence(tmp_path: Path) -> None:
    card = lines_card(tmp_path, [{"text": "good"}], [{"text": "text"}])
    result = CliRunner().invoke(app, ["data", "show", str(card), "1", "--folder", str(tmp_path / "index")])
    assert str(result.exception) == f"{card}: no row 1; its split 'train' has 1 rows, counted from 0"


# -------------------------------------------------------------------------------------------------------------- cards


def card_text(folder: Path, **changes: str) -> Path:
    entries = {
        "name": "a",
        "licence": "CC0",
        "origin": "a test",
        "format": "jsonl",
        "splits": "{train: {shards: [a.jsonl]}}",
        "sample": "[{text: text}]",
    }
    path = folder / "card.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**entries, **changes}.items()))
    return path


BOMB = "\n  a0: &a0 [x, x]" + "".join(f"\n  a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": BOMB, "sample": "*a40"}, r"card\.yaml:\d+: YAML aliases"),
        ({"statistics": BOMB, "? *a40": "1"}, r"card\.yaml:\d+: "),
        ({"statistics": "&a [*a]"}, "YAML aliases"),
        ({"statistics": "[" * 100_000}, "nested too deep"),
        ({"statistics": "{a: 1, a: 2}"}, r"card\.yaml:7: key `a` stands twice"),
        ({"statistics": "{? [a, b] : 1}"}, "a list or a mapping is no key"),
        ({"statistics": "!!python/object/apply:os.getcwd []"}, "YAML tags"),
        ({"statistics": "!!int many"}, "cannot be read as int"),
        ({"statistics": "!!bool many"}, "cannot be read as bool"),
        ({"statistics": '{a: "\\ud800"}'}, "cannot be read as str"),
        ({"statistics": '{a: "\\UFFFFFFFF"}'}, "not readable as YAML"),
        ({"statistics": "{a: \x01}"}, "not readable as YAML"),
        ({"statistics": f"{{a: {'9' * 5000}}}"}, "a number of 5,000 digits"),
        ({"statistics": "[1]"}, "statistics: .* expected a mapping"),
        ({"origin": "x" * (1 << 20)}, "at most 1048576"),
        ({"splits": '{train: {shards: ["{0..99999999}.tar"]}}'}, "at most 1,000,000"),
        ({"sample": f"[{', '.join(['{text: [{from: a, p: 0.5}, {from: b, p: 0.5}]}'] * 11)}]"}, "at most"),
    ],
)
def test_a_card_may_be_hostile(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(CardError, match=message) as caught:
        Card.load(card_text(tmp_path, **changes))
    assert "card.yaml" in str(caught.value)


def test_words_of_a_card_that_yaml_1_1_would_convert_stay_words(tmp_path: Path) -> None:
    assert Card.load(card_text(tmp_path, name="no", origin="2024-01-01")).origin == "2024-01-01"


def test_a_shard_that_no_path_can_name_is_an_error_of_the_card(tmp_path: Path) -> None:
    for shard in ("~nobody-of-this-name/a.jsonl", "a" * 5000):
        card = Card.load(card_text(tmp_path, splits=f"{{train: {{shards: ['{shard}']}}}}"))
        with pytest.raises(CardError, match="cannot be looked for"):
            card.shards("train")


# -------------------------------------------------------------------------------------------------------------- words

CAPTION = [{"text": "txt"}]


@pytest.mark.parametrize(
    "written",
    [b"\xef\xbb\xbfA cat", " \ufeffA cat\n", "\ufeff\ufeffA cat", b"A cat\0\0\0", "\ufeff\0A cat", "\0A cat"],
)
def test_byte_order_marks_and_nuls_around_a_text_are_no_words(written: bytes | str) -> None:
    assert parts_of(CAPTION, txt=written) == ["A cat"]


@pytest.mark.parametrize(
    "written", ["\ufeff", "\0\0", "\u200b", "\u200b \x1b\n", "\u2060\u00ad", "\u3164", "\ufe0f", ""]
)
def test_a_text_in_which_nothing_shows_is_empty(written: str) -> None:
    assert refused(CAPTION, txt=written) == "empty text: 'txt'"
    assert refused(CAPTION, txt=written.encode()) == "empty text: 'txt'"


def test_a_nul_inside_a_text_is_an_error() -> None:
    assert refused(CAPTION, txt="A cat".encode("utf-16-le")[:-1]).startswith("text with a NUL: 'txt', at character 1")


def test_json_may_begin_with_a_byte_order_mark() -> None:
    caption = json.dumps({"caption": "\ufeffA cat"})
    for written in (f"\ufeff{caption}", f"\ufeff{caption}".encode()):
        assert parts_of([{"text": "json.caption"}], json=written) == ["A cat"]


@pytest.mark.parametrize("fields", [["json.caption", "txt"], ["txt", "json.caption"]])
def test_broken_json_does_not_cost_a_good_text(fields: list[str]) -> None:
    sample = [{"text": {"from": fields}}]
    assert parts_of(sample, json=b"{oops", txt=b"A cat") == ["A cat"]
    assert refused(sample, json=b"{oops", txt=b" ").startswith("broken JSON: 'json'")
    assert refused([{"text": "json.caption"}], json=b"{oops", txt=b"A cat").startswith("broken JSON")


# -------------------------------------------------------------------------------------------------------------- files


def test_an_empty_file_is_passed_over_for_one_that_is_not() -> None:
    sample = [{"image": ["webp", "jpg"]}]
    for empty in (b"", {"bytes": b"", "path": "a.webp"}):
        assert parts_of(sample, webp=empty, jpg=b"good") == [b"good"]
        assert refused(sample, webp=empty) == "empty file: 'webp'"


NULL_IN = {
    "in a list": [b"a", None, b"b"],
    "in a nested list": [[b"a"], [None]],
    "of a struct": [b"a", {"bytes": None}],
}


@pytest.mark.parametrize("files", NULL_IN.values(), ids=NULL_IN)
def test_a_null_among_files_is_an_error(files: list[Any]) -> None:
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    assert refused([{"image": "images"}], images=files).startswith("no file: 'images' holds a")
    chat = {"chat": "messages", "images": "images", "place": "front"}
    assert refused(chat, messages=turns, images=files).startswith("no file: 'images' holds a")
    assert parts_of(chat, messages=turns, images=None) == ["Which?", "This."]


def test_a_null_in_a_parquet_list_of_pictures_is_counted(tmp_path: Path) -> None:
    files = [{"bytes": jpeg(n), "path": None} for n in (9, 10)]
    rows = [[files[0], None, files[1]], files]
    pq.write_table(pa.table({"images": rows, "text": ["a", "b"]}), tmp_path / "a.parquet")
    index = indexed(write_card(tmp_path, "a.parquet", [{"image": "images"}, {"text": "text"}], format="parquet"))
    assert [fact[0] for fact in index.facts(0)] == [9, 10]
    assert reasons(index) == ["no file: 'images' holds a null at place 1 of its list"]


def test_a_blank_text_next_to_a_picture_is_no_text() -> None:
    page = {"texts": "texts", "images": "images"}
    assert parts_of(page, texts=["a", "", " ", "b"], images=[None, b"1", b"2", ""]) == ["a", b"1", b"2", "b"]
    assert "a text and a picture at place 0" in refused(page, texts=["a"], images=[b"1"])


# ------------------------------------------------------------------------------------------------------------ markers


def chat(question: Any, answer: Any, files: int = 1, **sample: str) -> list[Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    images = [b"1", b"2", b"3"][:files]
    return parts_of({"chat": "messages", "images": "images", **sample}, messages=turns, images=images)


def test_a_marker_in_an_answer_is_a_word_unless_the_card_says_otherwise() -> None:
    assert chat("<image>How?", "Use the <image> element.") == [b"1", "How?", "Use the <image> element."]
    with pytest.raises(BrokenSample, match="0 markers, 1 files in the record; `place` and `markers` of the card"):
        chat("How?", "Use the <image> element.")
    assert chat("Draw one.", "Here: <image>", markers="all") == ["Draw one.", "Here: ", b"1"]


def test_typed_items_stand_for_files_in_every_turn() -> None:
    typed = [{"type": "text", "text": "Here, no <image>:"}, {"type": "image"}]
    assert chat("Draw one.", typed) == ["Draw one.", "Here, no <image>:", b"1"]
    assert chat([{"type": "text", "text": "<image>What?"}], "A cat.") == [b"1", "What?", "A cat."]


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ("<image>\nWhat?", "What?"),
        ("<image>\r\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("What is <image> here?", "What is here?"),
        ("What?", "What?"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "What?"),
        ([{"type": "text", "text": "<image>\nWhat?"}], "What?"),
    ],
)
def test_files_in_front_leave_no_marker_in_the_words(question: Any, left: str) -> None:
    assert chat(question, "An <image>.", place="front") == [b"1", left, "An <image>."]


def test_files_in_front_are_not_fewer_than_the_markers() -> None:
    assert chat("<image>\nWhat?", "A cat.", files=3, place="front") == [b"1", b"2", b"3", "What?", "A cat."]
    with pytest.raises(BrokenSample, match="2 markers, 1 files"):
        chat("<image><image>What?", "A cat.", place="front")


def test_half_marked_chats_have_their_files_at_the_markers_or_in_front() -> None:
    assert chat("Is <image> it?", "Yes.", place="either") == ["Is ", b"1", " it?", "Yes."]
    assert chat("Is it?", "Yes.", place="either") == [b"1", "Is it?", "Yes."]


# ------------------------------------------------------------------------------------------------------ dots in names


def test_files_that_no_field_reads_are_counted_with_an_example(tmp_path: Path) -> None:
    members = [(f"photo 2.{n}.{end}", data) for n in range(4) for end, data in (("jpg", jpeg()), ("txt", b"a"))]
    write_tar(tmp_path / "a.tar", members)
    index = indexed(write_card(tmp_path, "a.tar", [{"image": "0.jpg"}, {"text": "0.txt"}]))
    assert index.rows == 1
    assert [(one.kind, one.files, one.beside, one.example) for one in index.unread] == [
        ("jpg", 3, 1, "photo 2.1.jpg"),
        ("txt", 3, 1, "photo 2.1.txt"),
    ]
    assert "3 '.jpg' files are read by no field" in index.summary()
    assert "a key ends at the first dot" in index.summary()
    assert indexed(tmp_path / "pairs.yaml").unread == index.unread  # from the stamp


def test_a_file_beside_another_of_its_kind_is_counted_and_other_kinds_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", [("b.jpg", jpeg()), ("b.txt", b"b"), ("b.json", b"{}")])
    assert [one.kind for one in indexed(write_card(tmp_path, "a.tar")).unread] == ["json"]
    assert not caplog.records
    write_tar(tmp_path / "a.tar", [("cat.2.jpg", jpeg()), ("cat.2.txt", b"2"), ("cat.jpg", jpeg()), ("cat.txt", b"1")])
    index = indexed(tmp_path / "pairs.yaml")
    assert [(one.kind, one.files, one.beside) for one in index.unread] == [("jpg", 1, 1), ("txt", 1, 1)]
    assert "'cat.2.jpg'; in 1 record the card reads one of several" in caplog.text


# ------------------------------------------------------------------------------------------------------------- doctor


def seen(shard: Path) -> Look:
    return look([str(shard)], LookOptions(), progress=False)


def chats(folder: Path, turns: list[tuple[str, str]]) -> Look:
    records = [
        [("json", as_json([{"from": "human", "value": q}, {"from": "gpt", "value": a}])), ("png", picture(n))]
        for n, (q, a) in enumerate(turns)
    ]
    members = [(f"{n}.{field}", data) for n, record in enumerate(records) for field, data in record]
    return seen(write_tar(folder / "a.tar", members))


@pytest.mark.parametrize(
    ("turns", "keys"),
    [
        ([("<image>one two?", "a <image> element"), ("<image>two?", "three four")], {}),
        ([("draw a cat", "here: <image>"), ("draw a dog", "so: <image>")], {"markers": "all"}),
        ([("one two?", "three four"), ("two?", "four five")], {"place": "front"}),
        ([("one two?", "three four"), ("<image>two?", "four five")], {"place": "either"}),
    ],
)
def test_doctor_proposes_where_the_files_of_chats_belong(
    tmp_path: Path, turns: list[tuple[str, str]], keys: dict[str, str]
) -> None:
    found = chats(tmp_path, turns)
    assert found.proposal.sample == {"chat": "json", "images": "png", **keys}
    assert not found.bad


def test_doctor_counts_the_files_that_its_card_does_not_read(tmp_path: Path) -> None:
    members = [(f"photo 2.{n}.{end}", data) for n in range(4) for end, data in (("jpg", jpeg()), ("txt", b"a cat"))]
    said = "\n".join(part for part in seen(write_tar(tmp_path / "a.tar", members)).report() if isinstance(part, str))
    assert "3 '.jpg' files are read by no field of the card, such as 'photo 2.1.jpg'" in said
    assert "a key ends at the first dot" in said


# --------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_that_an_older_version_made_is_refused_with_what_to_do(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = write_source(tmp_path, "text", 24)
    recipe = write_recipe(tmp_path, {"text": card, "held_out": card}, tokenizer_folder, ["text"], steps=1)
    with monkeypatch.context() as before:
        before.setattr("mm.data.index.INDEX_VERSION", 1)
        before.setattr("mm.train.dataset.INDEX_VERSION", 1)
        train_here(recipe)
    with pytest.raises(PlanChanged, match=r"version of samples: \[1, 3\] → \[2, 3\]") as caught:
        train_here(recipe, "steps=2")
    assert "end the stage and add one" in str(caught.value)
