"""`mm doctor`: a look at shards that have no card."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.table import Table
from typer.testing import CliRunner

from mm.cli import app
from mm.data.card import Card
from mm.data.index import index_card
from mm.packing.fit import first_fit_decreasing
from mm.tokenizers.text import TextTokenizer
from mm.train.doctor import Look, LookError, LookOptions, _spread, look
from tests.shard_files import RangeServer, as_json, jpeg, pairs, write_tar
from tests.small_world import FORMS, broken_picture, cloud, picture, recording, words, write_source


def seen(*shards: str | Path, **options: Any) -> Look:
    return look([str(shard) for shard in shards], LookOptions(**options), progress=False)


def cells(look: Look) -> dict[str, str]:
    """First column to second of all tables with two, as they are printed."""
    found = {}
    for table in look.report():
        if isinstance(table, Table) and len(table.columns) == 2:
            found |= dict(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    return found


def rows_of_the_card(look: Look, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Samples in the index of the proposed card, saved where it says."""
    monkeypatch.chdir(look.card.path.parent)
    path = folder / "card.yaml"
    path.write_text(look.card_yaml())
    index = index_card(Card.load(path), "train", folder / "index", progress=False)
    assert not len(index.errors)
    return index.rows


@pytest.mark.parametrize("source", FORMS)
def test_the_card_that_is_proposed_for_each_modality_reads_every_record(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path, source, rows=8)
    monkeypatch.chdir(tmp_path)
    found = seen(f"{source}-*.tar")
    assert not found.bad
    assert (found.seen, found.share, found.opened) == (8, 1.0, 2)
    assert rows_of_the_card(found, tmp_path, monkeypatch) == 8


def test_fields_are_told_by_what_they_hold_and_not_by_their_names(tmp_path: Path) -> None:
    members = []
    for n in range(6):
        about = {
            "id": f"x{n:03d}",
            "url": f"https://example.org/{n}.jpg",
            "alt": words(n),
            "size": n,
            "tags": ["a", "b"],
        }
        members += [(f"{n}.img", picture(n)), (f"{n}.meta", as_json(about)), (f"{n}.bin", b"\xff\xfe\x00")]
    found = seen(write_tar(tmp_path / "a.tar", members))
    kinds = {field.path: field.kind for field in found.fields}
    assert kinds == {
        "img": "image",
        "meta": "JSON",
        "bin": "bytes",
        "meta.id": "label",
        "meta.url": "label",
        "meta.alt": "text",
        "meta.size": "number",
        "meta.tags": "JSON",
        "meta.tags.0": "label",
    }
    assert found.proposal.sample == [{"image": "img"}, {"text": "meta.alt"}]


def test_pictures_in_either_of_two_fields_are_alternatives_and_further_ones_are_told(tmp_path: Path) -> None:
    members = []
    for n in range(6):
        members.append((f"{n}.jpg" if n % 3 else f"{n}.png", jpeg(format="JPEG" if n % 3 else "PNG")))
        members += [(f"{n}.mask.png", picture(n)), (f"{n}.txt", words(n).encode()), (f"{n}.title.txt", b"a title")]
    found = seen(write_tar(tmp_path / "a.tar", members))
    assert found.proposal.sample[0] in ({"image": "mask.png"}, {"image": ["jpg", "png"]})
    assert found.proposal.sample[1] == {"text": "txt"}
    assert any("which are not read" in remark for remark in found.proposal.remarks)
    assert any("title.txt" in remark for remark in found.proposal.remarks)


def test_numbered_pictures_of_a_chat_are_proposed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "<image>" * 12 + "How many?"}, {"from": "gpt", "value": "Twelve of them."}]
    numbered = [(f"0.{n}.jpg", jpeg(20 + n, 10)) for n in range(12)]
    found = seen(write_tar(tmp_path / "a.tar", [*numbered, ("0.json", as_json({"chat": chat}))]))
    assert found.proposal.sample == {"chat": "json.chat", "images": [f"{n}.jpg" for n in range(12)]}


def test_parquet_and_json_lines_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns = {
        "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(5)],
        "captions": [[words(n), words(n + 9)] for n in range(5)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = seen("a.parquet")
    assert found.proposal.sample == [{"image": "image"}, {"text": "captions.0"}]
    assert rows_of_the_card(found, tmp_path, monkeypatch) == 5

    turns = [{"user": "one two", "assistant": "red"}]
    rows = [{"talk": turns, "photo": base64.b64encode(picture(n)).decode()} for n in range(5)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = seen("b.jsonl")
    assert found.proposal.sample == {"chat": "talk", "images": "photo", "encoding": "base64", "place": "front"}
    assert rows_of_the_card(found, tmp_path, monkeypatch) == 5

    pages = [{"texts": ["one two", None, words(n)], "images": [None, {"bytes": picture(n)}, None]} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(pages), tmp_path / "c.parquet")
    found = seen("c.parquet")
    assert found.proposal.sample == {"texts": "texts", "images": "images"}
    assert rows_of_the_card(found, tmp_path, monkeypatch) == 5


def test_bad_samples_are_counted_by_reason_and_the_first_is_named(tmp_path: Path) -> None:
    members = pairs(20)
    members += [
        ("bad1.jpg", broken_picture(1)),
        ("bad1.txt", b"one"),
        ("bad2.jpg", broken_picture(2)),
        ("bad2.txt", b"x"),
    ]
    members += [("bad3.jpg", picture(3)), ("bad3.txt", b"\xff\xfe")]
    found = seen(write_tar(tmp_path / "a.tar", members))
    assert found.bad == {"broken media": 2, "text is not UTF-8": 1}
    assert found.first_bad["broken media"].startswith("a.tar: bad1, ")
    assert cells(found)["bad records"] == "3 (13.04%)"


def test_packs_and_gpu_hours_are_those_of_the_lengths(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_source(tmp_path, "pairs", 24).parent / "pairs-0.tar"
    found = seen(path, capacity=64, tokenizer=str(tokenizer_folder), image_tokens=20, parameters=1e12)
    card = found.card
    samples = [card.sample(scanned.record) for scanned in card.open(str(path)).scan() if scanned.record]
    expected = TextTokenizer.load(str(tokenizer_folder)).lengths(samples) + 20
    assert found.lengths == expected.tolist()
    fitting = expected[expected <= 64]
    packs = first_fit_decreasing(fitting, 64).number
    shown = cells(found)
    assert shown["packs"] == str(packs)
    assert shown["too long for a pack"].startswith(f"{len(expected) - len(fitting)} (")
    assert shown["fill"] == f"{fitting.sum() / (64 * packs):.1%}"
    seconds = 6 * 1e12 * packs * 64 / (0.4 * 312e12)
    assert shown["an epoch on one A100"] == f"{seconds:,.2g} seconds"


def test_an_estimate_is_labelled_as_one_and_a_tokenizer_is_not(tmp_path: Path, tokenizer_folder: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"one two three") for n in range(4)])
    assert seen(shard).text == [5] * 4  # 13 characters / 4, and the end
    for options, labelled in ((["--tokenizer", str(tokenizer_folder)], False), ([], True)):
        result = CliRunner().invoke(app, ["doctor", str(shard), *options])
        assert result.exit_code == 0, result.output
        assert ("ESTIMATED" in result.output) is labelled


def test_a_look_ends_at_its_limit_of_samples_and_says_what_share_it_saw(tmp_path: Path) -> None:
    for shard in range(40):
        write_tar(tmp_path / f"{shard:02d}.tar", pairs(10, first=10 * shard))
    found = seen(tmp_path / "{00..39}.tar", samples=80)
    assert found.seen == 80
    assert found.opened == 16
    assert found.share == pytest.approx(0.2, rel=0.25)  # the zeros at the end of a small tar count as data
    assert float(cells(found)["records in all"].removeprefix("about ")) == pytest.approx(400, rel=0.25)


def test_a_look_ends_when_its_time_is_up(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", [(f"{n}.{e}", d) for n in range(300) for e, d in (("txt", b"a b"), ("png", big))]
    )
    found = seen(shard, seconds=0.3)
    assert 0 < found.seen < 300
    assert found.share == pytest.approx(found.seen / 300, rel=0.1)


big = picture(1, 512, 512)


def test_shards_are_looked_at_in_an_order_that_is_spread_over_all() -> None:
    assert _spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert all(sorted(_spread(number)) == list(range(number)) for number in (1, 2, 3, 5, 16, 100))


def test_shards_behind_a_url_are_looked_at(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(6))
    with RangeServer(tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = seen(f"{server.url}/0.tar")
        server.shutdown()
    assert (found.seen, found.share) == (6, 1.0)
    assert yaml.safe_load(found.card_yaml())["splits"]["train"]["shards"] == [f"{server.url}/0.tar"]


def test_a_list_of_numbered_files_becomes_a_range_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [write_tar(tmp_path / f"a-{n:03d}.tar", pairs(1, n)).name for n in (*range(8, 13), 40)]
    found = seen(*names)
    assert found.written == ("a-{008..012}.tar", "a-040.tar")
    assert [Path(shard).name for shard in found.shards] == names


def test_what_cannot_be_looked_at_is_refused_with_a_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("2.wav", recording(1)), ("3.npy", cloud(1))])
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "c.txt").write_text("one")
    write_tar(tmp_path / "empty.tar", [])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "d.parquet")
    for shard, error, reason in (
        ("a.tar", LookError, "no field holds words"),
        ("b.tar.gz", LookError, "gunzip"),
        ("c.txt", LookError, "shards end in .tar"),
        ("empty.tar", LookError, "no record"),
        ("nothing-*.tar", LookError, "^no shard matches"),
        (".", LookError, "is a folder"),
    ):
        with pytest.raises(error, match=reason):
            seen(tmp_path / shard)
    with pytest.raises(LookError, match=r"the shards cannot be read: .*nowhere/a.tar"):
        seen("memory://nowhere/a.tar")
    with pytest.raises(LookError, match="several formats"):
        seen(tmp_path / "a.tar", tmp_path / "d.parquet")
    with pytest.raises(LookError, match="capacity is 0"):
        LookOptions(capacity=0)


def test_a_record_cannot_style_the_terminal_or_break_out_of_the_card(tmp_path: Path) -> None:
    evil = "x\x1b[2J\nname: other"
    members = [(f"{n}.json", as_json({evil: f"one two {n} [red]\x1b[31m"})) for n in range(4)]
    shard = write_tar(tmp_path / "a.tar", members)
    result = CliRunner().invoke(app, ["doctor", str(shard)])
    assert result.exit_code == 0, result.output
    assert "\x1b[2J" not in result.output
    assert "\x1b[31m" not in result.output
    card = yaml.safe_load(seen(shard).card_yaml())
    assert card["name"] == "a"
    assert card["sample"] == [{"text": f"json.{evil}"}]
