"""Parquet as strangers write it: rows without a form in Python, and small files that would take much memory."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import words, write_card

from mm.data import json_values, row_groups, values
from mm.data.cache import ShardCache
from mm.data.card import Card
from mm.data.index import index_card
from mm.data.pages import DamagedPages, read_pages
from mm.data.parquet import EMPTY, ParquetShard
from mm.data.rows import RowShard
from mm.data.shards import Record, ShardChanged, open_shard

TEXT = [{"text": "text"}]
NOT_UTF8 = pa.array([b"a", b"\xff", b"c"]).view(pa.string())  # pyright: ignore
UNREADABLE = {
    "text": NOT_UTF8,
    "date": pa.array([0, 2**31 - 1, 0], pa.int32()).cast(pa.date32()),
    "time": pa.array([0, 2**58, 0], pa.timestamp("ms")),
    "nanoseconds": pa.array([0, 1, 0], pa.timestamp("ns")),
    "nested": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), NOT_UTF8),
}


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_row_without_a_form_in_python_costs_itself_only(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "0.parquet", {"number": [0, 1, 2], "odd": UNREADABLE[kind]})
    in_place = open_shard(str(path), "parquet")
    cached = RowShard(ShardCache(tmp_path / "cache", 10**8), str(path), in_place.file.stat(), ())
    for shard in (in_place, cached):
        first, bad, last = shard.scan()
        assert first.record is not None
        assert last.record is not None
        assert (first.record.fields["number"], last.record.fields["number"]) == (0, 2)
        assert bad.error is not None
        assert bad.error.startswith("text is not UTF-8: column 'odd'" if kind in ("text", "nested") else "unreadable")
        assert bad.error.endswith(", in row 1")
        assert [shard.read(one.place) for one in (last, first)] == [last.record, first.record]
        with pytest.raises(ShardChanged, match="no record in row 1 of row group 0"):
            shard.read(bad.place)


def test_durations_decimals_and_nested_values_are_read(tmp_path: Path) -> None:
    columns = {
        "duration": pa.array([5, 7], pa.duration("s")),
        "decimal": pa.array([1, 2], pa.int64()).cast(pa.decimal128(30, 2)),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "struct": pa.array([{"a": [1, None]}, None]),
    }
    shard = open_shard(str(write(tmp_path / "0.parquet", columns)), "parquet")
    assert [one.record and one.record.fields for one in shard.scan()] == pa.table(columns).to_pylist()


def test_an_index_leaves_out_the_bad_row_and_counts_it(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"text": NOT_UTF8})
    card = Card.load(write_card(tmp_path, "0.parquet", TEXT, "parquet"))
    index = index_card(card, "train", tmp_path / "index", progress=False)
    assert [words(index.sample(row)) for row in range(2)] == [["a"], ["c"]]
    assert index.errors.column("key").to_pylist() == ["1"]


def test_a_file_and_a_row_group_without_rows_are_no_damage(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "0.parquet")
    assert [one.error for one in open_shard(str(tmp_path / "0.parquet"), "parquet").scan()] == [EMPTY]
    with pq.ParquetWriter(tmp_path / "1.parquet", empty.schema) as writer:
        for table in (pa.table({"text": ["a"]}), empty, pa.table({"text": ["b"]})):
            writer.write_table(table)
    shard = open_shard(str(tmp_path / "1.parquet"), "parquet")
    assert isinstance(shard, ParquetShard)
    assert shard.row_groups() == [1, 0, 1]
    assert [(one.key, one.record and one.record.fields) for one in shard.scan()] == [
        ("0", {"text": "a"}),
        ("1", {"text": "b"}),
    ]


def test_json_in_a_field_has_no_more_values_than_a_line_of_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "MAX_VALUES", 1000)
    chat = '[{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]'
    written_in_words = chat % ("{}," * 1000)
    of_values = ["[" + "{}," * 1000 + "{}]", chat % r"\\" + "[{}" + ",{}" * 1000 + "]"]
    write(tmp_path / "0.parquet", {"chat": [chat % "a", *of_values, written_in_words]})
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, text in enumerate((chat % "a", *of_values, written_in_words)):
            for encoding in ("utf-8", "utf-16"):
                member = tarfile.TarInfo(f"{key}{encoding}.chat")
                member.size = len(data := text.encode(encoding))
                tar.addfile(member, io.BytesIO(data))
    for format in ("parquet", "webdataset"):
        shard = "0.parquet" if format == "parquet" else "0.tar"
        card = Card.load(write_card(tmp_path, shard, {"chat": "chat"}, format))
        errors = index_card(card, "train", tmp_path / format, progress=False).errors
        assert {key[0] for key in errors.column("key").to_pylist()} == {"1", "2"}
        assert all("JSON too complex: 'chat'" in reason for reason in errors.column("reason").to_pylist())


def test_columns_that_the_file_does_not_have_are_one_error_with_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"caption": ["a", "b"]})
    (one,) = open_shard(str(path), "parquet", ["text"]).scan()
    assert one.error == "missing columns: text; the file has caption"


# ---------------------------------------------------------------------------------------------------------------- cost


def coded(indices: list[int], size: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array([bytes(size), b"x"]))


def lists(ends: list[int], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), values)


ZEROS = bytes(30_000)
BOMBS: dict[str, tuple[pa.Array, int, str | None]] = {
    "one page": (pa.array([ZEROS] * 30), 0, "damaged parquet file: 30 rows of row group 0 are lost: too large: 900"),
    "a page a row": (pa.array([b""] * 1000 + [ZEROS] * 30), 1030, None),
    "one entry of a dictionary": (coded([0] * 60 + [1] * 2, 30_000), 62, None),
    "one entry, in lists": (lists([60, 61, 62], coded([0] * 60 + [1] * 2, 30_000)), 2, "record too large: its row"),
    "a list of pages": (
        lists([30, 31], pa.array([ZEROS] * 30 + [b"x"])),
        *(0, "damaged parquet file: 2 rows of row group 0 are lost: too large: 900"),
    ),
    "a list of numbers": (lists([30_000, 30_001], pa.array(np.zeros(30_001, bool))), 1, "record too large: its row"),
    "a list of many numbers": (
        lists([60_000, 60_001], pa.array(np.zeros(60_001, bool))),
        *(0, "damaged parquet file: 2 rows of row group 0 are lost: too large: 60001 values in the lists"),
    ),
    "columns of lists": (lists([30_000], pa.nulls(30_000)), 0, "record too large: its row"),
}
"""Columns, how many of their rows are records, and why others are not."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pa.MemoryPool]:
    """What Arrow takes from now on, with limits a thousandth of the real ones."""
    monkeypatch.setattr(row_groups, "BATCH_BYTES", 64_000)
    monkeypatch.setattr(row_groups, "MAX_VALUES", 32_000)
    monkeypatch.setattr(values, "AT_ONCE", 64_000)
    monkeypatch.setattr(values, "MAX_ROW", 512_000)
    before = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(before)
    yield counting
    pa.set_memory_pool(before)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_takes_little_memory_whatever_it_holds(tmp_path: Path, pool: pa.MemoryPool, kind: str) -> None:
    column, records, reason = BOMBS[kind]
    options = {"write_batch_size": 1, "data_page_size": 1} if "page a row" in kind or "of pages" in kind else {}
    coded = "entry" in kind or "numbers" in kind
    path = write(tmp_path / "0.parquet", {"a": column}, compression="zstd", use_dictionary=coded, **options)
    pa.set_memory_pool(pool)
    shard = open_shard(str(path), "parquet")
    scanned = list(shard.scan())
    errors = [one.error for one in scanned if one.error]
    assert len(scanned) - len(errors) == records
    assert len(errors) == (reason is not None)
    assert not errors or errors[0].startswith(str(reason))
    read = [shard.read(one.place) for one in scanned if one.record]
    assert read == [one.record for one in scanned if one.record]
    assert 0 < pool.max_memory() < 1_000_000 or not records


def test_a_page_of_zeros_is_not_decoded_at_the_real_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"a": [bytes(2**20)] * 65}, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 20_000
    (one,) = open_shard(str(path), "parquet").scan()
    assert one.error is not None
    assert "65 rows of row group 0 are lost: too large: 681" in one.error
    assert "the limit is 67108864" in one.error


def test_a_footer_that_claims_more_rows_than_its_pages_hold_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"text": [f"caption {n}" for n in range(300)]}, row_group_size=150)
    data = path.read_bytes()
    claimed = data.replace(b"\x16\xac\x02", b"\x16\xae\x02")  # 150 rows, zigzag, to 151
    assert claimed != data
    path.write_bytes(claimed)
    assert all(one.record is None for one in open_shard(str(path), "parquet").scan())


def test_a_footer_of_more_rows_than_its_bytes_can_hold_is_refused(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3 * 2**20, np.int32)), pa.array(["a"]))
    path = write(tmp_path / "0.parquet", {"text": column}, row_group_size=2**20)
    assert path.stat().st_size < 10_000
    (one,) = open_shard(str(path), "parquet").scan()
    assert one.error is not None
    assert "too many rows: 3145728 in" in one.error


def test_a_footer_that_ends_the_process_when_arrow_is_asked_for_its_chunks_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"texts": [["a", "b"]] * 20})
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    program = "import sys; from mm.data.shards import open_shard; list(open_shard(sys.argv[1], 'parquet').scan())"
    footer, histogram = whole[-8 - length : -8], b"\x19\x26"  # a list of two 64-bit numbers: levels by frequency
    assert histogram in footer
    footer = footer.replace(histogram, b"\x19\x36\x02")
    path.write_bytes(whole[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def test_large_honest_rows_come_in_smaller_batches_and_from_the_cache_alike(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = [random.bytes(3_000_000) for _ in range(30)]
    options = {"use_dictionary": False, "write_batch_size": 1, "compression": "none"}
    path = write(tmp_path / "0.parquet", {"data": data, "text": [str(n) for n in range(30)]}, **options)
    in_place = open_shard(str(path), "parquet")
    assert [batch.num_rows for batch in in_place.batches(0)] == [16, 14]  # pyright: ignore
    cached = RowShard(ShardCache(tmp_path / "cache", 10**9), str(path), in_place.file.stat(), ())
    for number in (29, 0, 16):
        wanted = Record(str(number), {"data": data[number], "text": str(number)})
        assert in_place.read((0, number)) == cached.read((0, number)) == wanted
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1


def test_lists_that_stay_coded_are_read_from_the_cache_alike(tmp_path: Path) -> None:
    texts = [[f"{row} {number}" * 200 for number in range(row % 5)] for row in range(200)]
    path = write(tmp_path / "0.parquet", {"texts": texts})
    in_place = open_shard(str(path), "parquet")
    assert pa.types.is_dictionary(next(in_place.batches(0)).schema.field("texts").type.value_type)  # pyright: ignore
    cached = RowShard(ShardCache(tmp_path / "cache", 10**9), str(path), in_place.file.stat(), ())
    for number in (199, 0, 64):
        assert in_place.read((0, number)) == cached.read((0, number)) == Record(str(number), {"texts": texts[number]})
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1


# --------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_page_headers_add_up_to_what_arrow_wrote(tmp_path: Path, version: str, dictionary: bool) -> None:
    table = {"text": [f"{n} words" for n in range(5000)]}
    options = {"data_page_version": version, "use_dictionary": dictionary, "data_page_size": 2000}
    path = write(tmp_path / "0.parquet", table, compression="zstd", **options)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    pages = list(read_pages(path.read_bytes()[start : start + column.total_compressed_size]))
    assert len(pages) > 4
    assert sum(page.values for page in pages if not page.is_dictionary) == 5000
    assert [page.is_dictionary for page in pages] == [dictionary] + [False] * (len(pages) - 1)
    headers = column.total_uncompressed_size - sum(page.size for page in pages)
    assert 0 < headers < 100 * len(pages)


def test_bytes_that_are_no_pages_are_damage_whatever_they_are() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 10, 100, 1000):
        for _ in range(200):
            try:
                list(read_pages(random.bytes(size)))
            except DamagedPages:
                continue
    with pytest.raises(DamagedPages, match="too deeply"):
        list(read_pages(b"\x1c" * 100_000))
