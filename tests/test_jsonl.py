"""JSON lines: text, chats and pairs, read at random from disk and over HTTP, and what breaks them."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.data import columns, jsonl
from mm.data.card import Card, CardError
from mm.data.index import Index, IndexingError, index_card
from mm.data.jsonl import JsonlShard
from mm.data.shards import LocalFile, ShardChanged, ShardError, open_shard
from mm.media import ImageFacts
from mm.sample import Image, Text
from mm.tokenizers.text import TextTokenizer
from tests.shard_files import RangeServer, jpeg, text_length, words, write_card

TEXT = [{"text": "text"}]


def indexed(card: Path, **options: Any) -> Index:
    return index_card(Card.load(card), "train", card.parent / "index", progress=False, **options)


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write(folder: Path, data: bytes, sample: Any = None, **more: Any) -> Index:
    (folder / "0.jsonl").write_bytes(data)
    return indexed(write_card(folder, "0.jsonl", sample or TEXT, format="jsonl", **more))


def texts(index: Index) -> list[str]:
    return [words(index.sample(row))[0] for row in range(len(index))]


def errors(index: Index) -> list[tuple[str, str]]:
    return list(zip(*(index.errors.column(name).to_pylist() for name in ("key", "reason")), strict=True))


# ---------------------------------------------------------------------------------------------------------- sound data


def test_every_line_is_a_sample_and_is_read_at_random(tmp_path: Path) -> None:
    data = lines({"text": "one"}, {"text": "zwei: äöü €"}, {"text": "three\nlines\nin one", "meta": {"url": "x"}})
    index = write(tmp_path, data)
    assert [words(index.sample(row)) for row in (2, 0, 1)] == [["three\nlines\nin one"], ["one"], ["zwei: äöü €"]]
    assert index.characters.tolist() == [[3], [11], [18]]
    offset, size = index.place[1].tolist()
    assert json.loads(data[offset : offset + size]) == {"text": "zwei: äöü €"}
    assert index.key[1].as_py() == index.sample(1).key == f"byte {offset}"


def test_a_key_of_the_lines_may_label_the_samples(tmp_path: Path) -> None:
    index = write(tmp_path, lines({"id": 7, "text": "one"}), key="id")
    assert index.sample(0).key == "7"


def test_empty_lines_other_line_ends_a_mark_and_a_missing_last_end_are_no_faults(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\n\n{"text": "c"}'
    index = write(tmp_path, data)
    assert texts(index) == ["a", "b", "c"]
    assert not errors(index)


def test_chats_in_lines_are_message_lists(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    index = write(tmp_path, lines({"messages": messages}), {"chat": "messages"})
    assert index.sample(0).parts == (Text("Two and two?", False, "user"), Text("Four.", True, "assistant"))


def test_pictures_in_lines_are_base64(tmp_path: Path) -> None:
    coded = base64.b64encode(jpeg(9, 7)).decode()
    sample = [{"image": {"from": "image", "encoding": "base64"}}, {"text": "text"}]
    records = [{"image": coded, "text": "a"}, {"image": f"data:image/jpeg;base64,{coded}", "text": "b"}]
    index = write(tmp_path, lines(*records), sample)
    assert [index.sample(row).parts[0] for row in (0, 1)] == [Image(jpeg(9, 7))] * 2
    assert index.facts(1) == [ImageFacts(9, 7)]


def test_pictures_of_chats_in_lines_are_base64(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
    ]
    record = {"messages": messages, "images": [base64.b64encode(jpeg()).decode()]}
    index = write(tmp_path, lines(record), {"chat": "messages", "images": "images", "encoding": "base64"})
    assert index.sample(0).media == (Image(jpeg(), "user"),)


def test_pages_in_lines_hold_their_pictures_in_base64(tmp_path: Path) -> None:
    record = {"texts": ["a", None, "b"], "images": [None, base64.b64encode(jpeg()).decode(), None]}
    index = write(tmp_path, lines(record), {"texts": "texts", "images": "images", "encoding": "base64"})
    assert index.sample(0).parts == (Text("a"), Image(jpeg()), Text("b"))


def test_columns_are_computed_for_lines(tmp_path: Path) -> None:
    import pyarrow as pa

    index = write(tmp_path, lines({"text": "one"}) + b"broken\n" + lines({"text": "three"}))
    assert columns.compute(index, "length", "1", text_length, pa.int32(), progress=False).to_pylist() == [3, 5]


def test_two_shards_are_indexed_in_processes(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(lines({"text": f"a{number}"}, {"text": f"b{number}"}))
    index = indexed(write_card(tmp_path, "*.jsonl", TEXT, format="jsonl"), processes=2)
    assert texts(index) == ["a0", "b0", "a1", "b1"]


def test_text_becomes_a_document_that_is_learned_whole(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    pieces = tokenizer.render(write(tmp_path, lines({"text": "Grüße, <|im_end|>"})).sample(0))
    ids = [number for piece in pieces for number in piece.ids]
    assert tokenizer.decode(ids) == "Grüße, <|im_end|><|im_end|>"
    assert ids.count(tokenizer.end) == 1  # what the text says is words, whatever it looks like
    assert all(piece.loss for piece in pieces)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.one_of(
            st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none(), max_size=3),
            st.sampled_from([b"", b"  ", b"\r"]),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_any_objects_come_back_from_their_places(tmp_path: Path, contents: list[Any], ended: bool) -> None:
    raw = [one if isinstance(one, bytes) else json.dumps(one, ensure_ascii=False).encode() for one in contents]
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(raw) + (b"\n" if ended else b""))
    shard = open_shard(str(path), "jsonl")
    scanned = [one for one in shard.scan() if path.stat().st_size]  # an empty file has a reason instead
    records = [one for one in contents if isinstance(one, dict)]
    assert [one.record and one.record.fields for one in scanned] == records
    assert [shard.read(one.place).fields for one in reversed(scanned)] == records[::-1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_records_or_reasons(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b'{"a": 1}\n' + data)
    shard = open_shard(str(path), "jsonl")
    first, *others = shard.scan()
    assert first.record is not None
    for one in others:
        assert (one.record is None) != (one.error is None)
        if one.record is not None:
            assert shard.read(one.place) == one.record


# -------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    with RangeServer(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def test_lines_behind_http_are_indexed_and_read_by_ranges(tmp_path: Path, server: RangeServer) -> None:
    (server.folder / "0.jsonl").write_bytes(lines(*({"text": f"line {n}"} for n in range(50))))
    index = indexed(write_card(tmp_path, f"{server.url}/{{0..0}}.jsonl", TEXT, format="jsonl"))
    assert texts(index) == [f"line {n}" for n in range(50)]
    server.failures = 1
    assert words(index.sample(30)) == ["line 30"]
    server.version = "v2"
    with pytest.raises(ShardChanged, match="when it was indexed"):
        indexed(write_card(tmp_path, f"{server.url}/0.jsonl", TEXT, format="jsonl")).card.open(
            index.shards[0].shard, index.shards[0].stat
        )


def test_lines_in_any_file_system_of_fsspec_are_read(tmp_path: Path) -> None:
    with fsspec.open("memory://lines/0.jsonl", "wb") as file:
        file.write(lines({"text": "a"}, {"text": "b"}))  # pyright: ignore
    assert texts(indexed(write_card(tmp_path, "memory://lines/*.jsonl", TEXT, format="jsonl"))) == ["a", "b"]


def test_compressed_lines_behind_http_are_refused(tmp_path: Path, server: RangeServer) -> None:
    (server.folder / "0.jsonl").write_bytes(gzip.compress(lines({"text": "a"})))
    with pytest.raises(ShardError, match="is compressed"):
        indexed(write_card(tmp_path, f"{server.url}/0.jsonl", TEXT, format="jsonl"))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "broken JSON: Expecting value"),
        (b"words", "broken JSON: Expecting value"),
        (b'{"text": "\xff"}', "text is not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        ('{"text": "a"}'.encode("utf-16"), "text is not UTF-8"),
        (b"[1, 2]", "broken record: a list instead of an object with keys"),
        (b"7", "broken record: a int instead of an object with keys"),
        (b"[" * 100_000, "broken JSON: maximum recursion"),
        (b'{"text": "half \\ud800"}', "text is not UTF-8: 'text'"),
        (b'{"words": "a"}', "missing field: 'text'; the record has words"),
        (b'{"text": ["a"]}', "not a text: 'text' holds a list"),
        (b'{"text": ""}', "empty text: 'text'"),
    ],
)
def test_a_broken_line_is_an_error_with_its_reason_and_costs_no_other(tmp_path: Path, line: bytes, reason: str) -> None:
    before = lines({"text": "before"})
    index = write(tmp_path, before + line + b"\n" + lines({"text": "after"}))
    assert texts(index) == ["before", "after"]
    key, found = errors(index)[0]
    assert key == f"byte {len(before)}"
    assert found.startswith(reason)
    if index.errors.num_rows == 1 and reason.startswith(("broken JSON", "broken record")):
        assert found.endswith("in line 2")


def test_a_file_that_ends_within_a_line_is_truncated(tmp_path: Path) -> None:
    whole = lines({"text": "one"}, {"text": "zwei €"})
    for cut in (2, 4, 10):  # before the brace, within the letter, after the key
        index = write(tmp_path, whole[:-cut])
        assert texts(index) == ["one"]
        assert errors(index)[0][1].startswith("truncated shard: the last line has no end and is no JSON")


def test_a_line_over_the_limit_is_passed_over_without_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    fits = json.dumps({"text": "x" * 88}).encode()
    assert len(fits) == 100
    for number, end in enumerate((b"\n", b"")):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = fits + b"\n" + json.dumps({"text": "y" * 1000}).encode() + end + (end and fits + end)
        index = write(folder, data)
        assert [len(text) for text in texts(index)] == [88] * (2 if end else 1)
        ((_, reason),) = errors(index)
        assert reason == "line too long: 1012 bytes, the limit is 100, in line 2"


def test_the_limit_holds_at_its_real_size(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    with path.open("wb") as file:  # sparse
        file.seek(jsonl.MAX_LINE + 10)
        file.write(b"\n" + lines({"text": "after"}))
    first, second = JsonlShard(LocalFile(str(path))).scan()
    assert first.error is not None
    assert first.error.startswith(f"line too long: {jsonl.MAX_LINE + 10} bytes, the limit is {jsonl.MAX_LINE}")
    assert second.record is not None


@pytest.mark.parametrize("array", [b'[{"text": "a"}]', b'\n [\n  {"text": "a"}\n]\n', b"[]\n"])
def test_a_json_array_is_refused_with_what_converts_it(tmp_path: Path, array: bytes) -> None:
    with pytest.raises(IndexingError, match=r"a JSON array, not JSON lines: .* `jq -c "):
        write(tmp_path, array)


def test_compressed_lines_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl.gz"
    path.write_bytes(gzip.compress(lines({"text": "a"})))
    card = write_card(tmp_path, "0.jsonl.gz", TEXT, format="jsonl")
    with pytest.raises(CardError, match=r"is compressed, .* Convert it once: gunzip .*0\.jsonl\.gz"):
        indexed(card)
    with pytest.raises(ShardError, match="Convert it once: gunzip"):
        write(tmp_path, path.read_bytes())


@pytest.mark.parametrize("entry", ["images/1.jpg", "https://example.org/1.jpg", "file:///etc/hostname"])
def test_paths_and_addresses_of_pictures_are_refused(tmp_path: Path, entry: str) -> None:
    with pytest.raises(IndexingError, match=r"no file: 'image' holds the text .* are never opened, and base64 needs"):
        write(tmp_path, lines({"image": entry, "text": "a"}), [{"image": "image"}, {"text": "text"}])
    coded = [{"image": {"from": "image", "encoding": "base64"}}, {"text": "text"}]
    with pytest.raises(IndexingError, match="broken base64: 'image' holds"):
        write(tmp_path, lines({"image": entry, "text": "a"}), coded)


def test_an_encoding_that_there_is_not_is_named(tmp_path: Path) -> None:
    sample = [{"image": {"from": "image", "encoding": "hex"}}, {"text": "text"}]
    with pytest.raises(CardError, match=r"sample\[0\]\.image\.encoding: 'hex', allowed are base64"):
        Card.load(write_card(tmp_path, "0.jsonl", sample, format="jsonl"))


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match="no usable sample"):
        write(tmp_path, b"")


def test_a_file_that_changes_after_indexing_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "0.jsonl").write_bytes(lines({"text": "another"}, {"text": "two"}))
    with pytest.raises(ShardChanged, match="shards must not change under a run"):
        index.sample(1)
    (tmp_path / "0.jsonl").write_bytes(lines({"text": "another"}, {"text": "two"}))
    assert texts(indexed(index.card.path)) == ["another", "two"]


def test_a_place_without_an_object_is_a_changed_shard(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(lines({"text": "one"}))
    shard = open_shard(str(tmp_path / "0.jsonl"), "jsonl")
    with pytest.raises(ShardChanged, match="no record at bytes 3:9: broken JSON"):
        shard.read((3, 6))
    with pytest.raises(ShardChanged, match="no record at bytes 0:99: the file ends after 16 of them"):
        shard.read((0, 99))
