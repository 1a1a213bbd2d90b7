"""Tars as strangers write them: extended headers, hidden folders, scattered samples, numbers that lie."""

from __future__ import annotations

import os
import socket
import tarfile
import time
from pathlib import Path

import pytest
from shard_files import pairs, words, write_card, write_tar

from mm.data import tar
from mm.data.card import Card, CardError
from mm.data.hidden import is_hidden
from mm.data.index import IndexingError, index_card
from mm.data.shards import Scanned, ShardError, open_shard
from mm.data.tar import BLOCK, MAX_EXTENDED


def header(name: str, size: int, kind: bytes = b"0", number: bytes | None = None) -> bytes:
    """A header with a right checksum, whatever is written where its size belongs."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:BLOCK])
    if number is not None:
        block[124:136] = number
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0", number: bytes | None = None) -> bytes:
    return header(name, len(data), kind, number) + data + bytes(-len(data) % BLOCK)


def pax(*records: bytes) -> bytes:
    """An extended header; records are ``key=value``."""
    lines = []
    for record in records:
        length = len(record) + 3
        while len(line := b"%d %s\n" % (length, record)) != length:
            length = len(line)
        lines.append(line)
    return member("PaxHeader", b"".join(lines), b"x")


def scan(folder: Path, *parts: bytes) -> list[Scanned]:
    path = folder / "0.tar"
    path.write_bytes(b"".join(parts) + bytes(2 * BLOCK))
    return list(open_shard(str(path), "webdataset").scan())


def found(scanned: list[Scanned]) -> dict[str, dict[str, bytes]]:
    return {one.key: one.record.fields for one in scanned if one.record}


def reasons(scanned: list[Scanned]) -> list[str]:
    return [one.error for one in scanned if one.error]


NEXT = member("next.txt", b"words")


# ---------------------------------------------------------------------------------------------------- extended headers


@pytest.mark.parametrize("size_in_header", [5, 0])
def test_a_pax_size_is_the_size_of_its_member(tmp_path: Path, size_in_header: int) -> None:
    data = header("0.txt", size_in_header) + b"words" + bytes(BLOCK - 5)
    scanned = scan(tmp_path, pax(b"path=long/0.txt", b"size=5"), data, NEXT)
    assert found(scanned) == {"long/0": {"txt": b"words"}, "next": {"txt": b"words"}}
    assert not reasons(scanned)
    shard = open_shard(str(tmp_path / "0.tar"), "webdataset")
    assert shard.read(scanned[0].place) == scanned[0].record


@pytest.mark.parametrize("size", [b"6", b"-5", b"5.0", b"0x5", b"1_0", b"\xff", b"9" * 30])
def test_a_pax_size_that_cannot_be_its_members_is_damage(tmp_path: Path, size: bytes) -> None:
    scanned = scan(tmp_path, member("0.txt", b"words"), pax(b"size=" + size), member("1.txt", b"words"), NEXT)
    assert "1" not in found(scanned)
    assert found(scanned)["next"] == {"txt": b"words"}
    assert "extended header" in reasons(scanned)[0]


def test_a_pax_size_over_the_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    path, size = tmp_path / "0.tar", 2 * 1024**3
    with path.open("wb") as file:
        file.write(pax(b"size=%d" % size) + header("0.bin", 0))
        file.seek(size, os.SEEK_CUR)  # sparse
        file.write(NEXT + bytes(2 * BLOCK))
    scanned = list(open_shard(str(path), "webdataset").scan())
    assert reasons(scanned) == [f"member too large: {size} bytes, the limit is 1073741824"]
    assert list(found(scanned)) == ["next"]


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
def test_an_extended_header_over_a_mebibyte_is_refused_and_costs_its_member_only(tmp_path: Path, kind: bytes) -> None:
    data = b"6 a=b\n" * (MAX_EXTENDED // 6 + 500)
    scanned = scan(tmp_path, member("big", data, kind), member("0.txt", b"words"), NEXT)
    assert found(scanned) == {"next": {"txt": b"words"}}
    assert reasons(scanned)[0].startswith("extended header too large")


def test_extended_headers_one_after_another_are_one_budget(tmp_path: Path) -> None:
    scanned = scan(tmp_path, *[pax(b"a=" + b"b" * 60_000)] * 20, member("0.txt", b"words"), NEXT)
    assert found(scanned) == {"next": {"txt": b"words"}}
    assert reasons(scanned)[0].startswith("extended header too large")


def test_an_extended_header_is_walked_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_EXTENDED", 4 * MAX_EXTENDED)
    data = b"6 a=b\n" * (3 * MAX_EXTENDED // 6)
    begun = time.process_time()
    assert list(found(scan(tmp_path, member("pax", data, b"x"), member("0.txt", b"words")))) == ["0"]
    assert time.process_time() - begun < 6  # 0.7 s; 25 s when every record copied what is left


def test_a_member_behind_a_damaged_extended_header_is_not_read_under_its_short_name(tmp_path: Path) -> None:
    scanned = scan(tmp_path, member("pax", b"99 path=a.txt\n", b"x"), member("0.txt", b"words"), NEXT)
    assert list(found(scanned)) == ["next"]
    assert reasons(scanned)[0].startswith("damaged extended header at byte 0")


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "number",
    [
        b"\xff" + b"\xff" * 10 + b"\xf0",  # -16 in base 256
        b"\x80" + (2**63).to_bytes(11, "big"),
        b"-0000000005\0",
        b"+0000000005\0",
        b"0000_000005\0",
        b"0o000000005\0",
        b"00000000009\0",
    ],
)
def test_a_size_that_is_no_number_costs_its_member_only(tmp_path: Path, number: bytes) -> None:
    bad = header("0.txt", 5, number=number) + b"words" + bytes(BLOCK - 5)
    scanned = scan(tmp_path, bad, NEXT)
    assert list(found(scanned)) == ["next"]
    assert reasons(scanned)[0].startswith("damaged tar header at byte 0")


def test_sparse_files_are_refused_by_their_name(tmp_path: Path) -> None:
    scanned = scan(tmp_path, pax(b"GNU.sparse.major=1", b"GNU.sparse.realsize=99"), member("0.txt", b"words"), NEXT)
    assert list(found(scanned)) == ["next"]
    assert reasons(scanned)[0].startswith("sparse file in the tar")


# ------------------------------------------------------------------------------------------------------------- records


def test_the_members_of_a_record_are_limited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_RECORD", 1000)
    parts = [member(f"0.{number}", bytes(400)) for number in range(9)]
    scanned = scan(tmp_path, *parts, NEXT)
    assert list(found(scanned)) == ["next"]
    assert reasons(scanned) == ["record too large: 1200 bytes up to its member '2', the limit is 1000"]


def test_members_of_a_sample_that_are_apart_are_named_as_such(tmp_path: Path) -> None:
    by_kind = sorted(pairs(3), key=lambda pair: pair[0].rpartition(".")[2])
    scanned = scan(tmp_path, *(member(name, data) for name, data in by_kind))
    assert list(found(scanned)) == ["000000", "000001", "000002"]  # the pictures alone
    assert [one.key for one in scanned if one.error] == ["000000", "000001", "000002"]
    assert reasons(scanned)[0].startswith("members of a sample are not adjacent: txt of '000000'")


def test_memory_of_earlier_keys_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_KEYS", 2)
    scanned = scan(tmp_path, *(member(f"{n}.{kind}", b"x") for kind in ("a", "b") for n in range(5)))
    assert [one.key for one in scanned if one.error] == ["0"]  # its key and field were remembered, then was no room


# -------------------------------------------------------------------------------------------------------- hidden files


@pytest.mark.parametrize(
    "path",
    [
        *(".0.jpg", "a/._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "a/.git/x/0.jpg", "./.cache/0.jpg"),
        *("@eaDir/0.jpg", "a/@eaDir/0.jpg/SYNO.jpg", "__MACOSX/0.jpg", "a/Thumbs.db", "#recycle/0.jpg"),
    ],
)
def test_hidden_files_and_files_of_hidden_folders_are_hidden(path: str) -> None:
    assert is_hidden(path)


@pytest.mark.parametrize("path", ["0.jpg", "./0.jpg", "../0.jpg", "a.b/0.jpg", "a/eaDir/0.jpg", "/a/0.jpg", "0..jpg"])
def test_other_files_are_not_hidden(path: str) -> None:
    assert not is_hidden(path)


def test_hidden_members_are_skipped_and_counted_where_the_user_looks(tmp_path: Path) -> None:
    hidden = [("@eaDir/000000.jpg", b"x"), (".ipynb_checkpoints/0-checkpoint.txt", b"old"), ("._000000.txt", b"y")]
    whole = pairs(2)
    write_tar(tmp_path / "0.tar", [whole[0], *hidden, *whole[1:]])
    index = index_card(Card.load(write_card(tmp_path, "0.tar")), "train", tmp_path / "index", progress=False)
    assert [words(index.sample(row)) for row in range(2)] == [["caption 0"], ["caption 1"]]
    assert index.errors.num_rows == 0
    assert "3 hidden files, or files in hidden folders, are skipped" in index.summary()


# ------------------------------------------------------------------------------------------------------- what is no tar


def test_empty_tars_say_so(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(IndexingError, match="empty shard: the file has 0 bytes"):
        index_card(Card.load(write_card(tmp_path, "0.tar")), "train", tmp_path / "index", progress=False)
    assert reasons(scan(tmp_path)) == ["empty tar: no file in it"]


@pytest.mark.parametrize("format", ["webdataset", "parquet", "jsonl"])
@pytest.mark.parametrize("link", [False, True], ids=["itself", "link"])
def test_special_files_are_refused_without_being_opened(tmp_path: Path, format: str, link: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for path, kind in (
            (Path("/dev/zero"), "a device"),
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "folder", "a folder"),
            (tmp_path / "socket", "a socket"),
        ):
            shown = path
            if link:
                shown = tmp_path / f"link-{path.name}"
                shown.symlink_to(path)
            shard = open_shard(str(shown), format)
            with pytest.raises(ShardError, match=f"{shown} is {kind}, not a file"):
                list(shard.scan())
            with pytest.raises(ShardError, match="not a file"):
                shard.read((0, 0))
            with pytest.raises(ShardError, match="not a file"):
                index_card(
                    Card.load(write_card(tmp_path, str(shown), [{"text": "txt"}], format)),
                    "train",
                    tmp_path / "index",
                    progress=False,
                )


@pytest.mark.parametrize("address", ["pipe:curl -s -L https://example.org/0.tar", "pipe:cat 0.tar", "pipe:touch ran"])
def test_a_pipe_is_never_run_and_the_address_is_named(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CardError, match=r"a command, which is never run: write the (address|path)"):
        Card.load(write_card(tmp_path, address)).shards("train")
    with pytest.raises(ShardError, match="never run"):
        open_shard(address, "webdataset")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("format", ["webdataset", "parquet", "jsonl"])
def test_a_git_lfs_pointer_says_how_to_get_the_file(tmp_path: Path, format: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "0.shard").write_text(pointer)
    with pytest.raises(ShardError, match=r"is a git-lfs pointer .*: run `git lfs pull`"):
        list(open_shard(str(tmp_path / "0.shard"), format).scan())


def test_keys_of_a_tar_can_always_be_written(tmp_path: Path) -> None:
    name = b"\xed\xa0\x80\xff.txt"  # half a surrogate pair, and a byte that UTF-8 never has
    raw = bytearray(header("name.txt", 5))
    raw[:100] = name.ljust(100, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw):06o}\0 ".encode()
    scanned = scan(tmp_path, bytes(raw) + b"words" + bytes(BLOCK - 5), pax(b"path=2" + name), member("1.txt", b"words"))
    assert [one.key.encode() for one in scanned] == [rb"\xed\xa0\x80\xff", rb"2\xed\xa0\x80\xff"]


def test_tars_of_every_format_are_read_alike(tmp_path: Path) -> None:
    long = "x" * 150
    members = [(f"{long}/{name}", data) for name, data in pairs(3)]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "0.tar", members, format)
        shard = open_shard(str(path), "webdataset")
        scanned = list(shard.scan())
        assert list(found(scanned)) == [f"{long}/00000{n}" for n in range(3)]
        assert [shard.read(one.place) for one in scanned] == [one.record for one in scanned]
        with tarfile.open(path) as reference:
            names = [name.rpartition(".")[0] for name in reference.getnames()[::2]]
        assert names == [one.key for one in scanned]
