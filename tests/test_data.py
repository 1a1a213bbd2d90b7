"""The data room on sound data: cards, shards, index, columns."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from shard_files import RangeServer, as_json, cloud, jpeg, pairs, text_length, wav, words, write_card, write_tar

from mm.data import columns
from mm.data.card import Card, CardError
from mm.data.index import Index, index_card
from mm.data.shards import ShardChanged, open_shard
from mm.media import ImageFacts, PointFacts, SpeechFacts
from mm.sample import Image, PointCloud, Sample, Speech, Text
from tests.processes import session, wait_until
from tests.small_world import environment


def indexed(card: Path, folder: Path, **options: object) -> Index:
    return index_card(Card.load(card), "train", folder / "index", progress=False, **options)


def key_of(sample: Sample) -> str:
    return sample.key


def nothing(sample: Sample) -> int:
    raise AssertionError(f"{sample.key} was computed again")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A card of three shards with 5, 3 and 4 caption pairs."""
    for number, (size, first) in enumerate([(5, 0), (3, 5), (4, 8)]):
        write_tar(tmp_path / f"{number:05d}.tar", pairs(size, first))
    return write_card(tmp_path, "{00000..00002}.tar")


# -------------------------------------------------------------------------------------------------------------- cards


def test_ranges_globs_and_relative_paths_name_the_shards_in_order(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-2", "b-1"):
        write_tar(tmp_path / f"{name}.tar", pairs(1))
    card = Card.load(write_card(tmp_path, ["a-{08..10}.tar", "b-*.tar"]))
    assert [Path(shard).stem for shard in card.shards("train")] == ["a-08", "a-09", "a-10", "b-1", "b-2"]


def test_several_ranges_in_a_url_run_the_last_one_fastest(tmp_path: Path) -> None:
    card = Card.load(write_card(tmp_path, "s3://bucket/{0..1}/{08..10}.tar"))
    expected = [f"s3://bucket/{folder}/{shard}.tar" for folder in (0, 1) for shard in ("08", "09", "10")]
    assert card.shards("train") == expected


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cards").mkdir()
    shard = write_tar(tmp_path / "0.tar", pairs(1))
    assert Card.load(write_card(tmp_path / "cards", "~/0.tar")).shards("train") == [str(shard)]


def test_choices_are_drawn_with_their_probabilities(tmp_path: Path) -> None:
    text = {"text": [{"from": "txt", "p": 0.3}, {"from": "json.recaption", "p": 0.7}]}
    card = Card.load(write_card(tmp_path, "x.tar", [{"image": "jpg"}, text]))
    assert card.choices == (0.3, 0.7)
    drawn = [card.choice(uniform) for uniform in np.random.default_rng(0).random(20_000)]
    assert np.mean(drawn) == pytest.approx(0.7, abs=0.015)  # 4.6 standard deviations
    assert [card.choice(0.0), card.choice(0.2999), card.choice(0.3), card.choice(1 - 2**-53)] == [0, 0, 1, 1]


def test_alternatives_of_two_texts_multiply(tmp_path: Path) -> None:
    def halves(one: str, other: str) -> dict[str, object]:
        return {"text": [{"from": one, "p": 0.25}, {"from": other, "p": 0.75}]}

    write_tar(tmp_path / "0.tar", [(f"1.{name}", name.encode()) for name in ("a", "b", "c", "d")])
    index = indexed(write_card(tmp_path, "0.tar", [halves("a", "b"), halves("c", "d")]), tmp_path)
    assert index.card.choices == (0.0625, 0.1875, 0.1875, 0.5625)
    assert [words(index.sample(0, choice)) for choice in range(4)] == [["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"]]


def test_orders_multiply_with_alternatives_of_texts_and_move_parts_of_a_kind_together(tmp_path: Path) -> None:
    members = [("1.jpg", jpeg()), ("1.png", jpeg(9, 9, format="PNG")), *((f"1.{one}", one.encode()) for one in "abc")]
    write_tar(tmp_path / "0.tar", members)
    sample = {
        "parts": [
            {"image": "jpg"},
            {"text": [{"from": "a", "p": 0.25}, {"from": "b", "p": 0.75}]},
            {"image": "png"},
            {"text": "c"},
        ],
        "orders": [
            {"p": 0.5, "parts": ["image", "text", "image", "text"]},
            {"p": 0.5, "parts": ["text", "text", "image", "image"]},
        ],
    }
    index = indexed(write_card(tmp_path, "0.tar", sample), tmp_path)
    assert index.card.choices == (0.125, 0.375, 0.125, 0.375)
    drawn, boxed = Image(members[0][1]), Image(members[1][1])
    assert [index.sample(0, choice).parts for choice in range(4)] == [
        (drawn, Text("a"), boxed, Text("c")),
        (drawn, Text("b"), boxed, Text("c")),
        (Text("a"), Text("c"), drawn, boxed),
        (Text("b"), Text("c"), drawn, boxed),
    ]


PAIR = [{"image": "jpg"}, {"text": "txt"}]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"parts": PAIR}, "missing key 'orders'"),
        ({"parts": PAIR, "orders": []}, "expected a list such as"),
        ({"parts": [], "orders": [{"p": 1, "parts": []}]}, "expected a list of parts"),
        ({"parts": PAIR, "orders": [{"p": 1, "parts": ["text"]}]}, r"expected the parts image, text in some order"),
        ({"parts": PAIR, "orders": [{"p": 1, "parts": ["text", "image", "image"]}]}, "expected the parts image, text"),
        ({"parts": PAIR, "orders": [{"p": 0.5, "parts": ["text", "image"]}]}, "add up to 0.5, expected 1"),
        ({"parts": PAIR, "orders": [{"parts": ["text", "image"]}]}, "missing key 'p'"),
    ],
)
def test_orders_that_do_not_go_with_the_parts_are_refused(tmp_path: Path, sample: object, message: str) -> None:
    with pytest.raises(CardError, match=message):
        Card.load(write_card(tmp_path, "x.tar", sample))


def test_a_choice_reads_its_own_text_and_the_index_knows_both_lengths(tmp_path: Path) -> None:
    record = as_json({"recaption": "a longer caption"})
    write_tar(tmp_path / "0.tar", [("1.jpg", jpeg()), ("1.txt", b"short\n"), ("1.json", record)])
    text = {"text": [{"from": "txt", "p": 0.3}, {"from": "json.recaption", "p": 0.7}]}
    index = indexed(write_card(tmp_path, "0.tar", [{"image": "jpg"}, text]), tmp_path)
    assert index.characters.tolist() == [[5, 16]]
    assert [words(index.sample(0, choice)) for choice in (0, 1)] == [["short"], ["a longer caption"]]


def test_the_first_field_that_holds_something_counts(tmp_path: Path) -> None:
    members = [("1.jpg", jpeg()), ("1.json", as_json({"caption": " "})), ("1.txt", b"fallback"), ("2.webp", jpeg(9, 9))]
    write_tar(tmp_path / "0.tar", [*members, ("2.json", as_json({"caption": "first"})), ("2.txt", b"fallback")])
    sample = [{"image": ["webp", "jpg"]}, {"text": ["json.caption", "txt"]}]
    index = indexed(write_card(tmp_path, "0.tar", sample), tmp_path)
    assert [words(index.sample(row)) for row in (0, 1)] == [["fallback"], ["first"]]
    assert index.facts(1) == [ImageFacts(9, 9)]


def test_parts_keep_the_order_of_the_card_and_facts_come_in_it(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar", [("a.jpg", jpeg(5, 6)), ("a.npy", cloud(7, 6)), ("a.txt", b"words"), ("a.wav", wav(80))]
    )
    sample = [{"speech": "wav"}, {"text": {"from": "txt", "loss": False}}, {"point": "npy"}, {"image": "jpg"}]
    index = indexed(write_card(tmp_path, "0.tar", sample), tmp_path)
    assert [type(part) for part in index.sample(0).parts] == [Speech, Text, PointCloud, Image]
    assert index.sample(0).parts[1] == Text("words", loss=False)
    assert index.facts(0) == [SpeechFacts(80, 8000), PointFacts(7, 6), ImageFacts(5, 6)]


def test_columns_with_roles_make_a_chat(tmp_path: Path) -> None:
    table = {"image": [{"bytes": jpeg(), "path": None}], "question": ["How many?"], "answer": ["Two."]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    sample = [
        {"image": {"from": "image", "role": "user"}},
        {"text": {"from": "question", "role": "user"}},
        {"text": {"from": "answer", "role": "assistant"}},
    ]
    index = indexed(write_card(tmp_path, "*.parquet", sample, format="parquet"), tmp_path)
    assert index.sample(0).parts[1:] == (Text("How many?", False, "user"), Text("Two.", True, "assistant"))
    assert index.sample(0).media[0].role == "user"


# ------------------------------------------------------------------------------------------------------ conversations

CHAT = {"chat": "json.conversations", "images": ["jpg", "0.jpg", "1.jpg"]}


def chat_parts(folder: Path, turns: list[dict[str, object]], sample: object = None, files: int = 1) -> list[object]:
    """Parts of a chat record with so many pictures; a picture stands as its width, 10 and up."""
    pictures = [(f"a.{number}.jpg", jpeg(10 + number, 8)) for number in range(files)]
    write_tar(folder / "0.tar", [*pictures, ("a.json", as_json({"conversations": turns}))])
    index = indexed(write_card(folder, "0.tar", sample or CHAT), folder)
    widths = iter(fact[0] for fact in index.facts(0))
    return [part if isinstance(part, Text) else next(widths) for part in index.sample(0).parts]


def test_llava_markers_become_pictures_in_place_and_only_answers_bear_loss(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And this <image>, then?"},
        {"from": "gpt", "value": "A dog."},
    ]
    assert chat_parts(tmp_path, turns, files=2) == [
        10,
        Text("\nWhat is it?", False, "user"),
        Text("A cat.", True, "assistant"),
        Text("And this ", False, "user"),
        11,
        Text(", then?", False, "user"),
        Text("A dog.", True, "assistant"),
    ]


def test_message_lists_take_pictures_where_their_content_has_them(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "Is <image> a"}, {"type": "image"}, {"type": "text", "text": "marker?"}]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    assert chat_parts(tmp_path, turns) == [
        Text("Be brief.", False, "system"),
        Text("Is <image> a", False, "user"),
        10,
        Text("marker?", False, "user"),
        Text("No.", True, "assistant"),
    ]


def test_a_message_may_be_a_string_with_markers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "The first."}]
    assert chat_parts(tmp_path, turns, files=2)[:3] == [10, 11, Text("Which?", False, "user")]


def test_questions_and_answers_without_markers_take_their_pictures_in_front(tmp_path: Path) -> None:
    turns = [{"user": "Which?", "assistant": "This."}, {"user": "Sure?", "assistant": "Yes."}]
    parts = chat_parts(tmp_path, turns, {**CHAT, "place": "front"}, files=2)
    assert parts[:4] == [10, 11, Text("Which?", False, "user"), Text("This.", True, "assistant")]
    assert len(parts) == 6


def test_a_chat_without_pictures_is_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
    assert chat_parts(tmp_path, turns, files=0) == [Text("Hello", False, "user"), Text("Good day.", True, "assistant")]


def test_a_marker_of_a_modality_that_the_card_does_not_name_is_a_word(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>What does <audio> do in HTML?"}, {"from": "gpt", "value": "It plays."}]
    assert chat_parts(tmp_path, turns)[1] == Text("What does <audio> do in HTML?", False, "user")


def test_chats_of_hugging_face_parquet_read_nested_columns_and_lists_of_pictures(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    images = [{"bytes": jpeg(11, 8), "path": "a.jpg"}]
    table = pa.table({"messages": [messages], "images": [images], "ignored": [b"x" * 1000]})
    pq.write_table(table, tmp_path / "0.parquet")
    sample = {"chat": "messages", "images": "images"}
    index = indexed(write_card(tmp_path, "0.parquet", sample, format="parquet"), tmp_path)
    assert index.facts(0) == [ImageFacts(11, 8)]
    assert words(index.sample(0)) == ["What?", "That."]


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_are_those_of_webdataset_whatever_the_tar_format(tmp_path: Path, format: int) -> None:
    folder = "a/" * 60 if format != tarfile.USTAR_FORMAT else "a/" * 30  # beyond 100 bytes: extended headers
    members = [
        (f"{folder}{'long' * 10}{i}.{field}", f"{i}{field}".encode()) for i in range(4) for field in ("a", "b.C")
    ]
    path = write_tar(tmp_path / "0.tar", members, format)
    ours = [scanned.record for scanned in open_shard(str(path), "webdataset").scan()]
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [record and record.key for record in ours] == [sample["__key__"] for sample in theirs]
    for record, sample in zip(ours, theirs, strict=True):
        assert record is not None
        assert record.fields == {field: data for field, data in sample.items() if not field.startswith("__")}


def test_a_place_gives_the_record_that_the_scan_gave(tmp_path: Path) -> None:
    shard = open_shard(str(write_tar(tmp_path / "0.tar", pairs(6), tarfile.PAX_FORMAT)), "webdataset")
    scanned = list(shard.scan())
    assert [shard.read(one.place) for one in reversed(scanned)] == [one.record for one in reversed(scanned)]
    assert len(scanned) == 6


def test_files_that_webdataset_passes_over_are_passed_over(tmp_path: Path) -> None:
    hidden = [("._000000.jpg", b"x"), (".DS_Store", b"x"), ("__meta__/info.json", b"{}")]
    path = write_tar(tmp_path / "0.tar", [pairs(1)[0], *hidden, *pairs(2)[1:]])
    scanned = list(open_shard(str(path), "webdataset").scan())
    assert [(one.key, sorted(one.record.fields)) for one in scanned if one.record] == [
        ("000000", ["jpg", "txt"]),
        ("000001", ["jpg", "txt"]),
    ]
    assert len(scanned) == 2


def test_concatenated_tars_give_the_records_of_both(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{i}.tar", pairs(2, 2 * i)).read_bytes() for i in range(2)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    scanned = list(open_shard(str(tmp_path / "both.tar"), "webdataset").scan())
    assert [one.key for one in scanned] == ["000000", "000001", "000002", "000003"]
    assert all(one.record for one in scanned)


@pytest.mark.parametrize("image", ["bytes", "struct"])
def test_hugging_face_parquet_is_read_in_place_over_row_groups(tmp_path: Path, image: str) -> None:
    files = [jpeg(10 + i, 8) for i in range(7)]
    column = files if image == "bytes" else [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(files)]
    table = pa.table({"image": column, "caption": [[f"c{i}", f"d{i}"] for i in range(7)], "uid": list("abcdefg")})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=3)
    sample = [{"image": "image"}, {"text": [{"from": "caption.0", "p": 0.5}, {"from": "caption.1", "p": 0.5}]}]
    index = indexed(write_card(tmp_path, "0.parquet", sample, format="parquet", key="uid"), tmp_path)
    assert index.place.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    for row in (6, 0, 3, 5):
        assert words(index.sample(row, 1)) == [f"d{row}"]
        assert index.sample(row).media[0].data == files[row]
        assert index.facts(row) == [ImageFacts(10 + row, 8)]
    assert index.key.to_pylist() == list("abcdefg")


def test_img2dataset_shards_are_read_beside_their_sidecar(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        record = {"key": f"{i:09d}", "caption": f"c{i}", "width": 999, "height": 999, "status": "success"}
        members += [(f"{i:09d}.jpg", jpeg(20 + i, 30)), (f"{i:09d}.json", as_json(record)), (f"{i:09d}.txt", b"words")]
    write_tar(tmp_path / "00000.tar", members)
    sidecar = {
        "key": [f"{i:09d}" for i in range(3)],
        "width": [999] * 3,
        "height": [999] * 3,
        "status": ["success"] * 3,
    }
    pq.write_table(pa.table(sidecar), tmp_path / "00000.parquet")
    index = indexed(write_card(tmp_path, "*.tar"), tmp_path)
    # The file's own header counts: the sidecar's sizes are empty or unrotated under some of img2dataset's options.
    assert [index.facts(row) for row in range(3)] == [[ImageFacts(20 + i, 30)] for i in range(3)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    with RangeServer(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def test_shards_behind_http_are_indexed_and_read_by_ranges(tmp_path: Path, server: RangeServer) -> None:
    write_tar(server.folder / "0.tar", pairs(5))
    index = indexed(write_card(tmp_path, f"{server.url}/{{0..0}}.tar"), tmp_path)
    assert [words(index.sample(row)) for row in (4, 0)] == [["caption 4"], ["caption 0"]]
    assert index.facts(4) == [ImageFacts(12, 9)]


def test_parquet_behind_http_is_read(tmp_path: Path, server: RangeServer) -> None:
    table = pa.table({"image": [jpeg(9 + i, 9) for i in range(4)], "text": [f"t{i}" for i in range(4)]})
    pq.write_table(table, server.folder / "0.parquet", row_group_size=2)
    sample = [{"image": "image"}, {"text": "text"}]
    index = indexed(write_card(tmp_path, f"{server.url}/0.parquet", sample, format="parquet"), tmp_path)
    assert words(index.sample(3)) == ["t3"]


def test_a_request_that_fails_is_tried_again(tmp_path: Path, server: RangeServer) -> None:
    write_tar(server.folder / "0.tar", pairs(2))
    index = indexed(write_card(tmp_path, f"{server.url}/0.tar"), tmp_path)
    server.failures = 1
    assert words(index.sample(1)) == ["caption 1"]


def test_connections_of_the_parent_are_not_used_after_a_fork(tmp_path: Path, server: RangeServer) -> None:
    write_tar(server.folder / "0.tar", pairs(3))
    index = indexed(write_card(tmp_path, f"{server.url}/0.tar"), tmp_path)
    index.sample(0)
    fork = get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(words(index.sample(2))))
    child.start()
    answered = receiver.poll(240)
    child.kill()
    assert answered
    assert receiver.recv() == ["caption 2"]


def test_a_url_shard_that_changed_is_noticed(tmp_path: Path, server: RangeServer) -> None:
    write_tar(server.folder / "0.tar", pairs(2))
    index = indexed(write_card(tmp_path, f"{server.url}/0.tar"), tmp_path)
    server.version = "v2"
    with pytest.raises(ShardChanged, match="v2"):
        index.sample(0)


# -------------------------------------------------------------------------------------------------------------- index


def test_rows_are_all_samples_in_the_order_of_shards_and_records(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    assert len(index) == index.rows == 12
    assert index.shard.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert index.key.to_pylist() == [f"{i:06d}" for i in range(12)]
    assert index.media.tolist() == [[1, i + 8, 9] for i in range(12)]
    assert index.media_starts.tolist() == list(range(13))
    assert index.characters[:, 0].tolist() == [len(f"caption {i}") for i in range(12)]
    for row in (11, 0, 5, 7):
        assert words(index.sample(row)) == [f"caption {row}"]
    assert index.errors.num_rows == 0


def test_equal_facts_have_equal_signatures(tmp_path: Path) -> None:
    widths = [8, 9, 8]
    members = [(f"{i}.{f}", d) for i, w in enumerate(widths) for f, d in (("jpg", jpeg(w, 8)), ("txt", b"t"))]
    write_tar(tmp_path / "0.tar", members)
    first, second, third = indexed(write_card(tmp_path, "0.tar"), tmp_path).signature.tolist()
    assert first == third != second


def test_several_processes_give_the_same_index_as_one(corpus: Path, tmp_path: Path) -> None:
    alone = index_card(Card.load(corpus), "train", tmp_path / "one", progress=False)
    together = index_card(Card.load(corpus), "train", tmp_path / "two", processes=2, progress=False)
    assert together.fingerprint == alone.fingerprint
    assert np.array_equal(together.place, alone.place)
    assert together.key.equals(alone.key)


def test_an_index_travels_to_processes_without_its_arrays(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    index.sample(3), index.facts(3)  # loads arrays and opens shards
    assert len(pickle.dumps(index)) < 4000
    for method in ("fork", "spawn"):
        with get_context(method).Pool(1) as pool:
            assert words(pool.apply(index.sample, (9,))) == ["caption 9"]


def test_an_index_is_used_again_until_its_shard_changes(corpus: Path, tmp_path: Path) -> None:
    first = indexed(corpus, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.parquet")}
    write_tar(tmp_path / "00001.tar", pairs(2, 50))
    second = indexed(corpus, tmp_path)
    rewritten = [path for path, mtime in written.items() if path.stat().st_mtime_ns != mtime]
    assert [path.name[:5] for path in rewritten] == ["00001"]
    assert second.rows == 11
    assert second.fingerprint != first.fingerprint


def test_a_shard_with_another_date_but_the_same_bytes_keeps_its_rows(corpus: Path, tmp_path: Path) -> None:
    first = indexed(corpus, tmp_path)
    os.utime(tmp_path / "00001.tar", (1, 1))
    second = indexed(corpus, tmp_path)
    assert second.fingerprint == first.fingerprint
    assert second.shards[1].stat.version == "1000000000"
    assert words(second.sample(6)) == ["caption 6"]


def test_a_card_that_means_something_else_has_another_index(corpus: Path, tmp_path: Path) -> None:
    first = indexed(corpus, tmp_path)
    other = indexed(write_card(tmp_path, "0*.tar", [{"text": "txt"}], name="words"), tmp_path)
    assert other.fingerprint != first.fingerprint
    assert other.media.shape == (0, 3)
    assert indexed(corpus, tmp_path).facts(0) == [ImageFacts(8, 9)]


def test_a_shard_that_changed_since_indexing_is_not_read(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    index.sample(0)
    write_tar(tmp_path / "00000.tar", pairs(5, 20))  # the same names and sizes, while it is open
    with pytest.raises(ShardChanged, match=r"00000\.tar"):
        index.sample(1)


def test_fingerprints_are_checksums_of_the_bytes(corpus: Path, tmp_path: Path) -> None:
    data = (tmp_path / "00000.tar").read_bytes()
    expected = (len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
    assert indexed(corpus, tmp_path).shards[0].fingerprint == expected


KILLED = """
import sys
from mm.data.card import Card
from mm.data.index import index_card
index_card(Card.load(sys.argv[1]), "train", sys.argv[2], progress=False)
"""


def test_an_index_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(60):
        write_tar(tmp_path / f"{number:05d}.tar", pairs(40))
    card, folder = write_card(tmp_path, "{00000..00059}.tar"), tmp_path / "index"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(card), str(folder)])
    wait_until(lambda: len(list(folder.glob("*.parquet"))) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 3 <= len(finished) < 60
    index = indexed(card, tmp_path)
    assert index.rows == 60 * 40
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    assert not list(folder.glob("*.unfinished"))
    assert words(index.sample(59 * 40 + 39)) == ["caption 39"]


TOGETHER = """
import sys
from mm.data.card import Card
from mm.data.index import index_card
if __name__ == "__main__":
    index_card(Card.load(sys.argv[1]), "train", sys.argv[2], processes=2, progress=False)
"""


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    for number in range(60):
        write_tar(tmp_path / f"{number:05d}.tar", pairs(40))
    card, folder, script = write_card(tmp_path, "{00000..00059}.tar"), tmp_path / "index", tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, str(script), str(card), str(folder)]
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    wait_until(lambda: len(list(folder.glob("*.parquet"))) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not session(process.pid))


def test_two_processes_that_index_at_once_agree(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "index")]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert indexed(corpus, tmp_path).rows == 12


# ------------------------------------------------------------------------------------------------------------ columns


def test_a_column_has_the_value_of_every_row(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    column = columns.compute(index, "letters", "v1", text_length, pa.int32(), progress=False)
    assert column.to_pylist() == [len(f"caption {i}") for i in range(12)]
    assert columns.load(index, "letters", "v1").equals(column)


def test_a_column_over_choices_is_a_list_for_each_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.a", b"one"), ("1.b", b"three"), ("2.a", b"x"), ("2.b", b"xy")])
    text = {"text": [{"from": "a", "p": 0.5}, {"from": "b", "p": 0.5}]}
    index = indexed(write_card(tmp_path, "0.tar", [text]), tmp_path)
    column = columns.compute_choices(index, "tokens", "v1", text_length, pa.int32(), progress=False)
    assert column.to_pylist() == [[3, 5], [1, 2]]
    assert column.type == pa.list_(pa.int32())


def test_a_column_skips_the_records_that_are_no_samples(tmp_path: Path) -> None:
    members = pairs(4)
    members[2] = ("000001.jpg", b"not a picture")
    write_tar(tmp_path / "0.tar", members)
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    column = columns.compute(index, "key", "v1", key_of, pa.string(), progress=False)
    assert column.to_pylist() == ["000000", "000002", "000003"]
    assert index.errors.column("key").to_pylist() == ["000001"]


def test_a_computed_shard_is_not_computed_again(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    columns.compute(index, "letters", "v1", text_length, pa.int32(), progress=False)
    assert len(columns.compute(index, "letters", "v1", nothing, pa.int32(), progress=False)) == 12
    with pytest.raises(AssertionError, match="computed again"):
        columns.compute(index, "letters", "v2", nothing, pa.int32(), progress=False)


def test_several_processes_compute_the_same_column(corpus: Path, tmp_path: Path) -> None:
    index = indexed(corpus, tmp_path)
    alone = columns.compute(index, "one", "v1", text_length, pa.int32(), progress=False)
    together = columns.compute(index, "two", "v1", text_length, pa.int32(), processes=2, progress=False)
    assert together.equals(alone)


def test_a_column_of_other_rows_is_refused_and_computed_anew(corpus: Path, tmp_path: Path) -> None:
    columns.compute(indexed(corpus, tmp_path), "letters", "v1", text_length, pa.int32(), progress=False)
    write_tar(tmp_path / "00001.tar", pairs(3, 500))
    changed = indexed(corpus, tmp_path)
    with pytest.raises(columns.ColumnError, match="other rows"):
        columns.load(changed, "letters", "v1")
    column = columns.compute(changed, "letters", "v1", text_length, pa.int32(), progress=False)
    assert column.to_pylist()[5:8] == [len("caption 500")] * 3


def test_a_column_that_was_never_computed_is_an_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(columns.ColumnError, match="not computed"):
        columns.load(indexed(corpus, tmp_path), "clip", "v1")


def test_card_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"pairs\.yaml"):
        Card.load(write_card(tmp_path, "x.tar", format="zip"))


README = Path(__file__).parents[1] / "data_cards" / "README.md"
EXAMPLES = [block for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL) if "name:" in block]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split()[1])
def test_the_examples_of_the_readme_are_cards(tmp_path: Path, example: str) -> None:
    (tmp_path / "card.yaml").write_text(example)
    card = Card.load(tmp_path / "card.yaml")
    assert sum(card.choices) == pytest.approx(1)
