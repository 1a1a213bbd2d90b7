"""`mm data check`: damage, duplicates, splits, licence and statistics of a card."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from PIL import ImageDraw
from typer.testing import CliRunner

from mm.cli import app
from mm.data.card import Card, CardError
from mm.data.check import Finding, Report, check_card, licence_findings
from mm.data.duplicates import equal_groups, near_pairs
from mm.data.statistics import write_statistics
from mm.media import hamming
from mm.terminal import printable
from tests.shard_files import as_json, write_card, write_tar
from tests.small_world import FORMS, picture, recording, write_source

PAIRS = [{"image": ["jpg", "png"]}, {"text": "txt"}]


def drawing(seed: int, format: str = "PNG", scale: int = 1, **options: int) -> bytes:
    """Some coloured ellipses, which survive rescaling and compression as noise does not."""
    draw = np.random.default_rng(seed)
    image = PillowImage.new("RGB", (96, 96), tuple(draw.integers(0, 256, 3).tolist()))
    for _ in range(6):
        x, y, width, height = draw.integers(4, 60, 4).tolist()
        ImageDraw.Draw(image).ellipse((x, y, x + width, y + height), tuple(draw.integers(0, 256, 3).tolist()))
    stream = io.BytesIO()
    image.resize((96 * scale, 96 * scale)).save(stream, format, **options)
    return stream.getvalue()


def write_pairs(path: Path, pairs: dict[str, tuple[bytes, str]], extension: str = "png") -> str:
    members = []
    for key, (data, text) in pairs.items():
        members += [(f"{key}.{extension}", data), (f"{key}.txt", text.encode())]
    return write_tar(path, members).name


def two_splits(folder: Path, train: list[str], heldout: list[str], **more: object) -> Card:
    splits = {"train": {"shards": train}, "heldout": {"shards": heldout}}
    return Card.load(write_card(folder, "", PAIRS, **({"licence": "CC0-1.0", "splits": splits} | more)))


def wrong(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.wrong]


def test_a_sound_card_of_every_modality_is_sound_and_measured(tmp_path: Path) -> None:
    for source in FORMS:
        card = Card.load(write_source(tmp_path, source, rows=6))
        report = check_card(card, processes=0, progress=False)
        assert report.sound, (source, report.findings)
        assert report.counts["train"]["samples"] == 6
        assert report.refused == {"train": 0}
    speech = check_card(Card.load(tmp_path / "speech.yaml"), processes=0, progress=False)
    assert set(speech.statistics["train"]) == {"samples", "recordings", "seconds", "characters"}
    points = check_card(Card.load(tmp_path / "points.yaml"), processes=0, progress=False)
    assert points.statistics["train"]["points"] == sum(20 + (20_000 + row) % 9 for row in range(6))


def test_a_picture_that_only_fails_when_it_is_decoded_is_named_with_its_key(tmp_path: Path) -> None:
    report = check_card(Card.load(write_source(tmp_path, "pairs", 8, broken=[5])), processes=0, progress=False)
    (found,) = wrong(report)
    assert found.count == report.refused["train"] == 1
    assert "broken media" in found.what
    assert "pairs-1.tar: 000005" in found.examples[0]
    assert report.statistics["train"]["samples"] == 7


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    card = Card.load(write_source(tmp_path, "pages", 12, shards=4, broken=[2, 7]))
    alone, together = (check_card(card, processes=number, progress=False) for number in (0, 2))
    assert alone == together


def test_the_same_sample_picture_and_words_in_two_splits_are_told_apart(tmp_path: Path) -> None:
    train = {str(n): (picture(n), f"caption {n}") for n in range(4)}
    heldout = {
        "copy": train["0"],
        "other-words": (train["1"][0], "new words"),
        "other-picture": (picture(99), "caption 2"),
        "new": (picture(98), "caption 98"),
    }
    report = check_card(
        two_splits(tmp_path, [write_pairs(tmp_path / "a.tar", train)], [write_pairs(tmp_path / "b.tar", heldout)]),
        processes=0,
        progress=False,
    )
    samples, pictures = wrong(report)
    assert samples.what.startswith("the same sample")
    assert samples.examples == ("a.tar: 0 = b.tar: copy",)
    assert pictures.what.startswith("the same picture")
    assert pictures.examples == ("a.tar: 1 = b.tar: other-words",)
    (words,) = [finding for finding in report.findings if finding.what.startswith("the same words")]
    assert words.examples == ("a.tar: 2 = b.tar: other-picture",)
    assert not words.wrong


def test_a_recompressed_and_rescaled_copy_in_another_split_is_found(tmp_path: Path) -> None:
    train = {str(n): (drawing(n), f"caption {n}") for n in range(20)}
    heldout = {"again": (drawing(7, "JPEG", scale=3, quality=70), "other words"), "new": (drawing(77, "JPEG"), "new")}
    card = two_splits(
        tmp_path, [write_pairs(tmp_path / "a.tar", train)], [write_pairs(tmp_path / "b.tar", heldout, "jpg")]
    )
    (found,) = wrong(check_card(card, processes=0, progress=False))
    assert found.examples == ("a.tar: 7 ≈ b.tar: again",)
    assert check_card(card, "heldout", processes=0, progress=False).sound
    with pytest.raises(CardError, match="0 to 11"):
        check_card(card, near=12)


def test_repetition_within_a_split_is_told_but_is_not_wrong(tmp_path: Path) -> None:
    pairs = {"a": (picture(1), "one"), "b": (picture(1), "one"), "c": (picture(1), "two")}
    card = Card.load(write_card(tmp_path, [write_pairs(tmp_path / "a.tar", pairs)], PAIRS, licence="MIT"))
    report = check_card(card, processes=0, progress=False)
    assert report.sound
    assert [finding.count for finding in report.findings] == [1, 2]
    assert report.counts["train"]["pictures"] == 1


def test_a_shard_in_two_splits_an_empty_split_and_a_missing_shard_are_wrong(tmp_path: Path) -> None:
    shared = write_pairs(tmp_path / "a.tar", {"a": (picture(1), "one")})
    empty = write_tar(tmp_path / "empty.tar", []).name
    splits = {
        "train": {"shards": [shared]},
        "test": {"shards": [f"./{shared}"]},
        "dev": {"shards": [empty]},
        "gone": {"shards": ["gone-*.tar"]},
        "a split": {"shards": [write_pairs(tmp_path / "b.tar", {"b": (picture(2), "two")})]},
    }
    report = check_card(Card.load(write_card(tmp_path, "", PAIRS, splits=splits)), processes=0, progress=False)
    told = [f"{finding.where}: {finding.what}" for finding in wrong(report)]
    assert "train and test: the same shard in several splits" in told
    assert "dev: the split is empty: it holds no usable sample" in told
    assert any(line.startswith("gone: ") and "no shard matches 'gone-*.tar'" in line for line in told)
    assert any("name of a split" in line for line in told)


def test_a_cut_tar_and_a_damaged_parquet_file_are_wrong_and_what_is_left_is_counted(tmp_path: Path) -> None:
    pairs = {str(n): (picture(n), f"caption {n}") for n in range(4)}
    whole = (tmp_path / write_pairs(tmp_path / "a.tar", pairs)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    report = check_card(Card.load(write_card(tmp_path, ["cut.tar"], PAIRS)), processes=0, progress=False)
    assert any("truncated shard" in finding.what for finding in wrong(report))
    assert 0 < report.counts["train"]["samples"] < 4

    pq.write_table(pa.table({"png": [picture(1)], "txt": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    card = Card.load(write_card(tmp_path, ["a.parquet"], PAIRS, format="parquet", name="columns"))
    assert any("not a readable parquet file" in finding.what for finding in wrong(check_card(card, processes=0)))


def test_a_shard_that_cannot_be_opened_leaves_its_split_without_statistics(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.tar", {"a": (picture(1), "one")})
    card = Card.load(write_card(tmp_path, ["a.tar", "memory://nowhere/b.tar"], PAIRS))
    report = check_card(card, processes=0, progress=False)
    assert any("cannot be read" in finding.what and "b.tar" in finding.examples[0] for finding in wrong(report))
    assert report.statistics == {}
    assert report.counts["train"]["samples"] == 1


@pytest.mark.parametrize(
    ("licence", "said", "is_wrong"),
    [
        ("CC-BY-4.0", None, False),
        ("MIT OR Apache-2.0", None, False),
        ("LicenseRef-ours", None, False),
        ("cc0-1.0", None, False),
        ("CC-BY 4.0", "is CC-BY-4.0 meant?", False),
        ("ODC-By", "is ODC-By-1.0 meant?", False),
        ("see the release", "programs cannot tell", False),
        (" ", "says nothing", True),
        ("unknown", "says nothing", True),
        ("TODO", "says nothing", True),
    ],
)
def test_a_licence_is_known_doubted_or_missing(licence: str, said: str | None, is_wrong: bool) -> None:
    findings = list(licence_findings(licence))
    assert [finding.wrong for finding in findings] == ([is_wrong] if said else [])
    assert all(said in finding.what for finding in findings if said)


def test_writing_keeps_other_keys_order_and_comments_outside_of_the_statistics(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.tar", {"a": (picture(1), "one"), "b": (picture(2), "three")})
    path = tmp_path / "card.yaml"
    path.write_text(
        "# my card\nname: mine   # short\nlicence: CC0-1.0\norigin: here\n"
        "statistics:   # old\n  train: {samples: 7, hours: 3}\n  makers: {samples: 9}\n\n"
        "# where they are\nformat: webdataset\nsplits: {train: {shards: [a.tar]}}\n"
        "sample: [{image: png}, {text: txt}]\n"
    )
    result = CliRunner().invoke(app, ["data", "check", str(path), "--write", "--processes", "0"])
    assert result.exit_code == 0, result.output
    assert "comments that stood among the old ones are gone" in result.output
    assert "samples: 7, found 2" in result.output
    text = path.read_text()
    assert text.startswith("# my card\nname: mine   # short\n")
    assert "\n# where they are\nformat: webdataset\n" in text
    assert yaml.safe_load(text)["statistics"] == {
        "train": {"samples": 2, "hours": 3, "pictures": 2, "characters": 8},
        "makers": {"samples": 9},
    }
    again = CliRunner().invoke(app, ["data", "check", str(path), "--write", "--processes", "0"])
    assert "are gone" not in again.output
    assert path.read_text() == text
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.tar", path]


def test_statistics_are_added_to_a_card_that_has_none_and_refused_where_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("name: mine\nsample: 1 # last")
    assert not write_statistics(path, {"train": {"samples": 1}})
    assert path.read_text() == "name: mine\nsample: 1 # last\nstatistics:\n  train:\n    samples: 1\n"
    path.write_text("{name: mine, statistics: {a: 1}}")
    with pytest.raises(CardError, match="paste the printed block"):
        write_statistics(path, {"a": 2})
    assert path.read_text() == "{name: mine, statistics: {a: 1}}"


def test_the_command_prints_statistics_leaves_the_card_alone_and_exits_by_what_it_found(tmp_path: Path) -> None:
    sound = write_source(tmp_path, "chats", 4)
    before = sound.read_bytes()
    result = CliRunner().invoke(app, ["data", "check", str(sound), "--processes", "0"])
    assert result.exit_code == 0, result.output
    assert "statistics:\n  train:\n    samples: 4\n" in result.output
    assert "'CC0' is no SPDX identifier; is CC0-1.0 meant?" in " ".join(result.output.replace("│", "").split())
    assert sound.read_bytes() == before
    (tmp_path / "damaged").mkdir()
    damaged = write_source(tmp_path / "damaged", "pairs", 4, broken=[0])
    assert CliRunner().invoke(app, ["data", "check", str(damaged), "--processes", "0"]).exit_code == 1
    missing = CliRunner().invoke(app, ["data", "check", str(sound), "--split", "test"])
    assert isinstance(missing.exception, CardError)
    assert "the card has train" in str(missing.exception)


def test_the_embedded_corpus_is_sound() -> None:
    report = check_card(Card.load("data_cards/demo/card.yaml"), "validation", processes=0, progress=False)
    assert report.sound
    assert report.counts["validation"]["pictures"] == 190


def test_a_key_cannot_move_the_cursor_or_style_the_terminal(tmp_path: Path) -> None:
    assert printable("a\x1b[2Jb\n[red]c", 20) == "a�[2Jb�[red]c"
    chat = as_json([{"from": "nobody\x1b[31m", "value": "one"}])
    write_tar(tmp_path / "a.tar", [("k\x1b[2J.json", chat), ("w.json", chat), ("w.wav", recording(1))])
    card = write_card(tmp_path, ["a.tar"], FORMS["chats"])
    result = CliRunner().invoke(app, ["data", "check", str(card), "--processes", "0"])
    assert result.exit_code == 1
    assert "\x1b[2J" not in result.output
    assert "\x1b[31mone" not in result.output


# ------------------------------------------------------------------------------------------------- near-duplicates


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), number=st.integers(0, 120), bits=st.integers(0, 11), sparse=st.booleans())
def test_near_pairs_are_those_that_comparing_all_finds(seed: int, number: int, bits: int, sparse: bool) -> None:
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 2**64, number, dtype=np.uint64)
    if sparse:
        hashes &= draw.integers(0, 2**64, number, dtype=np.uint64) & draw.integers(0, 2**64, number, dtype=np.uint64)
    colours = draw.integers(0, 40, (number, 16, 16, 3), dtype=np.uint8) + draw.integers(0, 30, (number, 1, 1, 1))
    colours = colours.astype(np.uint8)
    expected = {
        (i, j)
        for i in range(number)
        for j in range(i + 1, number)
        if hamming(int(hashes[i]), int(hashes[j])) <= bits and np.abs(colours[i].astype(int) - colours[j]).mean() <= 14
    }
    found = near_pairs(hashes, colours, bits)
    assert found.complete
    assert {(i, j) for i, j in found.pairs.tolist()} == expected


def test_equal_groups_are_those_of_a_dictionary_and_leave_out_zero() -> None:
    digests = np.array([3, 0, 5, 3, 0, 5, 5, 9], np.uint64)
    assert [group.tolist() for group in equal_groups(digests)] == [[0, 3], [2, 5, 6]]
    assert equal_groups(np.empty(0, np.uint64)) == []


def test_a_copy_among_many_pictures_is_found_without_comparing_all() -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 20_000, dtype=np.uint64)
    hashes[19_999] = hashes[5] ^ np.uint64(0b1001_0000_0000_0000_0000_0011)
    found = near_pairs(hashes, np.zeros((20_000, 16, 16, 3), np.uint8))
    assert found.pairs.tolist() == [[5, 19_999]]
