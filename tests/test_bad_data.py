"""The data room on bad data: every case is written for real, has a reason, and costs no more than what is broken."""

from __future__ import annotations

import gzip
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from shard_files import RangeServer, as_json, jpeg, pairs, text_length, words, write_card, write_tar

from mm.data import columns
from mm.data.card import BrokenSample, Card, CardError
from mm.data.index import Index, IndexingError, index_card, index_shards
from mm.data.shards import Scanned, ShardError, open_shard
from mm.data.tar import BLOCK


def indexed(card: Path, folder: Path) -> Index:
    return index_card(Card.load(card), "train", folder / "index", progress=False)


def errors(index: Index) -> list[tuple[str, str]]:
    """(key, reason) of what was no sample."""
    return [(key, reason) for key, reason in zip(*(c.to_pylist() for c in index.errors.columns[1:]), strict=True)]


def scan(path: Path, format: str = "webdataset") -> list[Scanned]:
    return list(open_shard(str(path), format).scan())


def keys(scanned: list[Scanned]) -> list[str]:
    return [one.key for one in scanned if one.record]


def reasons(scanned: list[Scanned]) -> list[str]:
    return [one.error for one in scanned if one.error]


# -------------------------------------------------------------------------------------------------------------- cards


def card_with(folder: Path, **changes: Any) -> Path:
    path = write_card(folder, "x.tar")
    card = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in card.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": "CC0"}, r"unknown key 'license', allowed are name, licence, origin"),
        ({"licence": None}, r"missing key 'licence'"),
        ({"name": 3}, r"name: 3, expected a text"),
        ({"format": "zip"}, r"format: 'zip', allowed are webdataset, parquet"),
        ({"splits": {"train": {"shard": "x.tar"}}}, r"splits\.train: unknown key 'shard', allowed are shards"),
        ({"splits": {"train": {"shards": []}}}, r"splits\.train\.shards"),
        ({"splits": {"train": {"shards": "{9..1}.tar"}}}, r"runs backwards"),
        ({"sample": "txt"}, r"sample: expected a list of parts, or a mapping with `chat`"),
        ({"sample": []}, r"sample: expected a list of parts"),
        ({"sample": [{"picture": "jpg"}]}, r"sample\[0\].*text, image, speech, point"),
        ({"sample": [{"text": {"from": "txt", "weight": 1}}]}, r"sample\[0\]\.text: unknown key 'weight'"),
        ({"sample": [{"text": {"from": "txt", "loss": "yes"}}]}, r"sample\[0\]\.text\.loss: 'yes'"),
        ({"sample": [{"text": {"from": "txt", "role": "bot"}}]}, r"sample\[0\]\.text\.role: 'bot', allowed are system"),
        ({"sample": [{"text": {"from": "q", "role": "user"}}, {"text": "a"}]}, r"every part a `role`"),
        ({"sample": [{"text": [{"from": "a", "p": 0.5}, {"from": "b", "p": 0.6}]}]}, r"add up to 1\.1, expected 1"),
        ({"sample": [{"text": [{"from": "a", "p": -1}, {"from": "b", "p": 2}]}]}, r"p: -1, expected a probability"),
        ({"sample": [{"image": []}]}, r"sample\[0\]\.image: \[\], expected the name of a field"),
        ({"sample": {"chat": "json", "image": "jpg"}}, r"sample: unknown key 'image', allowed are chat, place, images"),
        ({"sample": {"chat": "json", "place": "end"}}, r"sample\.place: 'end', allowed are markers, front"),
    ],
)
def test_a_card_with_a_mistake_names_file_key_and_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = card_with(tmp_path, **changes)
    with pytest.raises(CardError, match=message) as caught:
        Card.load(path)
    assert str(path) in str(caught.value)


def test_a_card_that_is_no_yaml_or_runs_code_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    for text in ("name: [", f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]", "just words", ""):
        path.write_text(text)
        with pytest.raises(CardError, match=r"card\.yaml"):
            Card.load(path)
    assert not (tmp_path / "touched").exists()


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    for pattern in ("shards/*.tar", "{000..001}.tar"):
        with pytest.raises(CardError, match="no shard matches"):
            Card.load(write_card(tmp_path, pattern)).shards("train")


def test_an_unknown_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="no split 'test', the card has train"):
        Card.load(write_card(tmp_path, "x.tar")).shards("test")


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(1))
    with pytest.raises(CardError, match="twice"):
        Card.load(write_card(tmp_path, ["0.tar", "*.tar"])).shards("train")


@pytest.mark.parametrize(("suffix", "command"), [(".gz", "gunzip"), (".zst", "unzstd"), (".bz2", "bunzip2")])
def test_a_compressed_shard_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, suffix: str, command: str
) -> None:
    card = Card.load(write_card(tmp_path, f"https://example.org/0.tar{suffix}"))
    with pytest.raises(CardError, match=rf"{command} \S*0\.tar\{suffix}"):
        card.shards("train")


def test_a_tar_that_is_compressed_under_a_plain_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(gzip.compress(write_tar(path, pairs(1)).read_bytes()))
    with pytest.raises(ShardError, match="gunzip"):
        indexed(write_card(tmp_path, "0.tar"), tmp_path)


# --------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("cut", ["header", "data"])
def test_of_a_truncated_tar_only_the_last_sample_is_lost(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "0.tar", pairs(4))
    places = [one.place for one in scan(path)]
    start = places[3][0]
    path.write_bytes(path.read_bytes()[: start + (BLOCK + 100 if cut == "data" else places[3][1] - BLOCK - 200)])
    scanned = scan(path)
    assert keys(scanned) == ["000000", "000001", "000002"]
    assert [one.key for one in scanned if one.error] == ["000003"]
    assert "truncated shard" in reasons(scanned)[0]
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert [words(index.sample(row)) for row in range(3)] == [["caption 0"], ["caption 1"], ["caption 2"]]


def test_a_tar_cut_between_members_is_told_by_its_missing_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pairs(3))
    start, size = scan(path)[1].place
    path.write_bytes(path.read_bytes()[: start + size])
    scanned = scan(path)
    assert keys(scanned) == ["000000", "000001"]
    assert "no end marker" in reasons(scanned)[0]


def test_an_empty_file_and_an_empty_tar_have_no_samples(tmp_path: Path) -> None:
    (tmp_path / "nothing.tar").touch()
    write_tar(tmp_path / "empty.tar", [])
    assert keys(scan(tmp_path / "nothing.tar")) == keys(scan(tmp_path / "empty.tar")) == []
    with pytest.raises(IndexingError, match="no usable sample"):
        indexed(write_card(tmp_path, "*.tar"), tmp_path)


def test_after_a_damaged_header_the_scan_goes_on_at_the_next_sound_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pairs(5))
    data = bytearray(path.read_bytes())
    start = scan(path)[2].place[0]
    data[start + 124 : start + 136] = b"999999999999"
    path.write_bytes(data)
    scanned = scan(path)
    # The record before the damage may lack a member; of the damaged record only its text is left, which the card sees.
    assert keys(scanned) == ["000000", "000002", "000003", "000004"]
    assert [one.key for one in scanned if one.error] == ["000001"]
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert index.key.to_pylist() == ["000000", "000003", "000004"]
    assert words(index.sample(2)) == ["caption 4"]


def test_a_file_that_is_no_tar_is_an_error_of_the_shard(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"plain words " * 1000)
    assert keys(scan(tmp_path / "0.tar")) == []
    assert "damaged tar header at byte 0" in reasons(scan(tmp_path / "0.tar"))[0]


def test_a_member_that_claims_more_bytes_than_memory_is_truncated_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pairs(2))
    start = scan(path)[1].place[0]
    data = bytearray(path.read_bytes())
    data[start + 124 : start + 136] = b"\x80" + (2**60).to_bytes(11, "big")
    header = bytes(data[start : start + 148]) + b" " * 8 + bytes(data[start + 156 : start + BLOCK])
    data[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(data)
    assert keys(scan(path)) == ["000000"]
    assert str(2**60) in reasons(scan(path))[0]


def test_a_member_of_no_bytes_is_an_error_of_its_sample(tmp_path: Path) -> None:
    members = pairs(3)
    members[2], members[5] = ("000001.jpg", b""), ("000002.txt", b"")
    write_tar(tmp_path / "0.tar", members)
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert errors(index) == [("000001", "empty file: 'jpg'"), ("000002", "empty text: 'txt'")]


def test_a_member_that_lost_its_extension_is_an_error_and_so_is_its_sample(tmp_path: Path) -> None:
    members = pairs(3)
    members[2] = ("000001", members[2][1])
    write_tar(tmp_path / "0.tar", members)
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert index.key.to_pylist() == ["000000", "000002"]
    assert [key for key, _ in errors(index)] == ["000001", "000001"]
    assert "without extension" in errors(index)[0][1]
    assert "missing field: 'webp' or 'jpg'; the record has txt" in errors(index)[1][1]


def test_samples_with_equal_keys_are_two_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*pairs(2), *pairs(1)])
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert index.key.to_pylist() == ["000000", "000001", "000000"]
    assert index.errors.num_rows == 0


def test_a_member_repeated_within_a_sample_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*pairs(1), ("000000.txt", b"another caption"), *pairs(1, 1)])
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert index.key.to_pylist() == ["000001"]
    assert errors(index) == [("000000", "member repeated within the sample: 'txt'")]


def test_links_and_devices_are_counted_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("000000.link", tarfile.SYMTYPE),
            ("000000.hard", tarfile.LNKTYPE),
            ("d.x", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(member)
        for name, data in pairs(1):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    scanned = scan(tmp_path / "0.tar")
    assert [one.error and one.error.partition(" in")[0] for one in scanned] == [
        "symbolic link",
        "hard link",
        "device",
        None,
    ]
    assert all(b"secret" not in data for one in scanned if one.record for data in one.record.fields.values())


def test_a_tar_with_names_that_leave_the_folder_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["../../escaped", "/tmp/mm-escaped", "..", "a/../../b", "~/c", "$(touch x)", "x\ny"]
    members = [(f"{name}.{field}", data) for name in names for field, data in (("jpg", jpeg()), ("txt", b"words"))]
    write_tar(folder / "0.tar", members)
    card = write_card(folder, "0.tar")
    before = set(tmp_path.rglob("*"))
    index = indexed(card, folder)
    assert index.sample(0).key == "../../escaped"
    columns.compute(index, "letters", "v1", text_length, pa.int32(), progress=False)
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(folder / "index") for path in made)
    assert not Path("/tmp/mm-escaped.jpg").exists()


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": b"words"}, "missing field: 'webp' or 'jpg'"),
        ({"jpg": jpeg()}, "missing field: 'txt'"),
        ({"jpg": jpeg(), "txt": b" \n"}, "empty text"),
        ({"jpg": jpeg(), "txt": b"caf\xe9"}, "text is not UTF-8"),
        ({"jpg": jpeg()[:10], "txt": b"words"}, "broken media: unreadable picture"),
        ({"jpg": b"<html>404</html>", "txt": b"words"}, "broken media: unreadable picture"),
    ],
)
def test_a_broken_pair_is_an_error_with_its_reason(tmp_path: Path, fields: dict[str, bytes], reason: str) -> None:
    write_tar(tmp_path / "0.tar", [*pairs(1), *((f"bad.{field}", data) for field, data in fields.items())])
    index = indexed(write_card(tmp_path, "0.tar"), tmp_path)
    assert index.rows == 1
    ((key, found),) = errors(index)
    assert key == "bad"
    assert reason in found
    assert reason.partition(":")[0] in index.summary()


@pytest.mark.parametrize(
    ("json", "reason"),
    [
        (b"{", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"caption": "\\ud800"}', "text is not UTF-8"),
        (b'{"caption": ["a", "list"]}', "not a text: 'json.caption' holds a list"),
        (b'{"caption": null}', "missing field: 'json.caption'"),
        (b"[]", "missing field: 'json.caption'"),
    ],
)
def test_a_broken_json_is_an_error_with_its_reason(tmp_path: Path, json: bytes, reason: str) -> None:
    write_tar(tmp_path / "0.tar", [("good.json", b'{"caption": "words"}'), ("bad.json", json)])
    index = indexed(write_card(tmp_path, "0.tar", [{"text": "json.caption"}]), tmp_path)
    ((key, found),) = errors(index)
    assert key == "bad"
    assert found.startswith(reason)


HUMAN = {"from": "human", "value": "<image>What?"}
GPT = {"from": "gpt", "value": "That."}


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([{"from": "human", "value": "What?"}, GPT], "image markers and files differ: 0 markers, 1 files"),
        ([{"from": "human", "value": "<image><image>"}, GPT], "image markers and files differ: 2 markers, 1 files"),
        ([{"from": "narrator", "value": "<image>"}, GPT], "unknown role: 'narrator'"),
        ([{"from": ["human"], "value": "<image>"}, GPT], "unknown role"),
        ([HUMAN, {"from": "gpt", "value": ""}], "broken chat: an empty 'assistant' turn"),
        ([HUMAN, {"from": "gpt", "value": None}], "broken chat: the content of a 'assistant' turn is a null"),
        ([HUMAN], "broken chat: no words of the assistant"),
        ([HUMAN, HUMAN, GPT], "broken chat: two 'user' turns in a row"),
        ([{"value": "<image>"}, GPT], "broken chat: a turn with keys ['value']"),
        ([HUMAN, {"role": "assistant", "content": [{"type": "video"}]}], "broken chat: content of type 'video'"),
        ([HUMAN, {"role": "assistant", "content": [{"type": ["text"]}]}], "broken chat: content of type"),
        (["words"], "broken chat: 'json.conversations' is not a list of turns"),
        ("words", "broken JSON: 'json.conversations'"),
        ([], "broken chat: no words of the assistant"),
        (None, "missing field: 'json.conversations'"),
    ],
)
def test_a_broken_chat_is_an_error_with_its_reason(tmp_path: Path, conversation: Any, reason: str) -> None:
    good = [("good.jpg", jpeg()), ("good.json", as_json({"conversations": [HUMAN, GPT]}))]
    bad = [("bad.jpg", jpeg()), ("bad.json", as_json({"conversations": conversation}))]
    write_tar(tmp_path / "0.tar", [*good, *bad])
    sample = {"chat": "json.conversations", "images": "jpg"}
    ((key, found),) = errors(indexed(write_card(tmp_path, "0.tar", sample), tmp_path))
    assert key == "bad"
    assert found.startswith(reason)


def test_of_the_alternatives_all_must_be_there_since_a_plan_may_draw_any(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.a", b"a"), ("1.b", b"b"), ("2.a", b"a")])
    text = {"text": [{"from": "a", "p": 0.5}, {"from": "b", "p": 0.5}]}
    index = indexed(write_card(tmp_path, "0.tar", [text]), tmp_path)
    assert index.key.to_pylist() == ["1"]
    assert errors(index) == [("2", "missing field: 'b'; the record has a")]


def test_a_sample_that_breaks_after_indexing_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(1))
    card = Card.load(write_card(tmp_path, "0.tar"))
    (scanned,) = scan(tmp_path / "0.tar")
    assert scanned.record is not None
    del scanned.record.fields["txt"]
    with pytest.raises(BrokenSample, match="missing field: 'txt'"):
        card.sample(scanned.record)


def test_a_card_that_fits_no_record_shows_what_the_records_have(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(3))
    with pytest.raises(IndexingError, match=r"3 x missing field.*'caption'; the record has jpg, txt"):
        indexed(write_card(tmp_path, "0.tar", [{"image": "jpg"}, {"text": "caption"}]), tmp_path)


# ------------------------------------------------------------------------------------------------------------ parquet


PARQUET_SAMPLE = [{"image": "image"}, {"text": "text"}]


def test_broken_rows_of_a_parquet_are_errors_and_the_others_stay(tmp_path: Path) -> None:
    images = [
        {"bytes": jpeg(), "path": None},
        {"bytes": None, "path": "/etc/passwd"},
        None,
        {"bytes": b"", "path": None},
    ]
    table = pa.table({"image": [*images, {"bytes": jpeg(), "path": None}], "text": ["a", "b", "c", "d", None]})
    pq.write_table(table, tmp_path / "0.parquet")
    index = indexed(write_card(tmp_path, "0.parquet", PARQUET_SAMPLE, format="parquet"), tmp_path)
    assert index.key.to_pylist() == ["0"]
    assert [reason.partition(":")[0] for _, reason in errors(index)] == [
        "no file",
        "missing field",
        "empty file",
        "missing field",
    ]


def test_a_parquet_without_its_end_is_an_error_of_the_shard(tmp_path: Path) -> None:
    for number in range(2):
        table = pa.table({"image": [jpeg()] * 20, "text": ["words"] * 20})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    cut = tmp_path / "1.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    index = indexed(write_card(tmp_path, "*.parquet", PARQUET_SAMPLE, format="parquet"), tmp_path)
    assert index.rows == 20
    ((key, reason),) = errors(index)
    assert key == ""
    assert reason.startswith("not a readable parquet file")


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg(8 + i, 8) for i in range(9)], "text": [f"t{i}" for i in range(9)]})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=3, compression="snappy", write_page_checksum=False)
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "0.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    (tmp_path / "0.parquet").write_bytes(data)
    index = indexed(write_card(tmp_path, "0.parquet", PARQUET_SAMPLE, format="parquet"), tmp_path)
    assert index.key.to_pylist() == ["0", "1", "2", "6", "7", "8"]
    ((_, reason),) = errors(index)
    assert reason.startswith("damaged parquet file: 3 rows of row group 1 are lost")
    assert words(index.sample(3)) == ["t6"]


def test_rows_before_the_damage_in_a_row_group_are_read(tmp_path: Path) -> None:
    texts = [" ".join([f"words {i}"] * 50) for i in range(3000)]
    file, form = tmp_path / "0.parquet", {"compression": "snappy", "use_dictionary": False, "data_page_size": 2000}
    pq.write_table(pa.table({"text": texts}), file, **form)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\xff" * 3000
    file.write_bytes(data)
    index = indexed(write_card(tmp_path, "0.parquet", [{"text": "text"}], format="parquet"), tmp_path)
    ((_, reason),) = errors(index)
    assert reason.startswith(f"damaged parquet file: {3000 - index.rows} rows of row group 0 are lost")
    assert 0 < index.rows < 3000
    assert [words(index.sample(row)) for row in (0, index.rows - 1)] == [[texts[0]], [texts[index.rows - 1]]]


# ------------------------------------------------------------------------------------------------ disks and networks


def test_a_shard_that_is_gone_stops_the_pass(tmp_path: Path) -> None:
    card = Card.load(write_card(tmp_path, "0.tar"))
    with pytest.raises(FileNotFoundError):
        index_shards(card, "train", [str(tmp_path / "0.tar")], tmp_path / "index", progress=False)


def test_a_network_that_stays_away_stops_the_pass_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_tar(tmp_path / "served" / "0.tar", pairs(3))
    with RangeServer(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.failures = 100
        with pytest.raises(OSError, match="failed three times"):
            indexed(write_card(tmp_path, f"{server.url}/0.tar"), tmp_path)
        server.shutdown()
    assert not list((tmp_path / "index").glob("*.parquet"))


def test_a_network_that_stays_away_is_not_taken_for_a_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    table = pa.table({"text": [f"t{i}" for i in range(9)]})
    pq.write_table(table, tmp_path / "served" / "0.parquet", row_group_size=3)
    with RangeServer(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        card = write_card(tmp_path, f"{server.url}/0.parquet", [{"text": "text"}], format="parquet")
        server.failures = 100
        with pytest.raises(OSError, match="failed three times"):
            indexed(card, tmp_path)
        server.failures = 0
        assert indexed(card, tmp_path).rows == 9
        server.shutdown()


def test_a_server_that_ignores_ranges_is_refused(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_tar(tmp_path / "served" / "0.tar", pairs(3))
    with RangeServer(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.ranges = False
        with pytest.raises(ShardError, match="ignores ranges"):
            indexed(write_card(tmp_path, f"{server.url}/0.tar"), tmp_path)
        server.shutdown()
