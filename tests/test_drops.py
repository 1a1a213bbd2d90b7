"""`mm data drop`: samples left out by decision, in a file beside the card that outlasts the index."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mm.cli import app
from mm.data.card import Card
from mm.data.drops import DropError, drop, dropped_rows, drops_file
from mm.data.index import Index, index_card
from tests.processes import without_privileges
from tests.shard_files import pairs, write_card, write_tar


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """12 samples in two shards, with keys from 000000 to 000009 and, again, 000000 and 000001."""
    write_tar(tmp_path / "0.tar", pairs(10))
    write_tar(tmp_path / "1.tar", pairs(2))
    return index_card(Card.load(write_card(tmp_path, ["0.tar", "1.tar"])), "train", tmp_path / "index")


def rows(index: Index) -> list[int]:
    return np.flatnonzero(dropped_rows(index)).tolist()


def test_samples_are_dropped_by_key_or_row_and_taken_back(index: Index) -> None:
    assert rows(index) == []
    assert drop(index, ["000003", "7", "row:11", "key:000009"]) == [3, 7, 9, 11]
    assert rows(index) == [3, 7, 9, 11]
    assert drop(index, ["3", "4"]) == [4]
    assert drop(index, ["3", "11", "2"], undo=True) == [3, 11]
    assert rows(index) == [4, 7, 9]
    drop(index, ["4", "7", "9"], undo=True)
    assert not drops_file(index.card).exists()


def test_drops_outlast_a_deleted_index_and_a_rebuilt_shard_and_move_with_the_card(index: Index, tmp_path: Path) -> None:
    drop(index, ["000003", "row:10"])
    shutil.rmtree(tmp_path / "index")
    write_tar(tmp_path / "0.tar", pairs(8, first=2))
    rebuilt = index_card(index.card, "train", tmp_path / "index")
    assert [rebuilt.key[row].as_py() for row in rows(rebuilt)] == ["000003", "000000"]
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    moved = Card.load(tmp_path / "elsewhere" / "pairs.yaml")
    assert rows(index_card(moved, "train", tmp_path / "elsewhere" / "index")) == rows(rebuilt)


def test_shards_and_index_stay_as_they_are(index: Index, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    drop(index, ["1"])
    assert {path: path.read_bytes() for path in files} == files
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and path not in files} - {
        ".pairs.drops.json.lock"
    } == {"pairs.drops.json"}


def test_splits_have_drops_of_their_own(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(3))
    splits = {"train": {"shards": ["0.tar"]}, "held_out": {"shards": ["0.tar"]}}
    card = Card.load(write_card(tmp_path, [], splits=splits))
    train, held_out = (index_card(card, split, tmp_path / "index") for split in splits)
    drop(train, ["1"])
    drop(held_out, ["2"])
    assert (rows(train), rows(held_out)) == ([1], [2])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("000000", "has 2 samples '000000': row:0 in 0.tar, row:10 in 1.tar; say which"),
        ("dog", "pairs/train has no sample 'dog'"),
        ("12", "12: pairs/train has rows 0 to 11"),
        ("row:-1", "rows 0 to 11"),
        ("row:x", "rows 0 to 11"),
        ("key:7", "no sample '7'"),
    ],
)
def test_a_sample_that_is_not_there_or_not_one_is_refused_and_nothing_is_dropped(
    index: Index, sample: str, message: str
) -> None:
    with pytest.raises(DropError, match=message):
        drop(index, ["000005", sample])
    assert rows(index) == []


def test_a_number_that_is_a_row_and_the_key_of_another_must_say_which(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.txt", b"one"), ("0.txt", b"zero"), ("2.txt", b"two")])
    card = Card.load(write_card(tmp_path, ["0.tar"], [{"text": "txt"}]))
    index = index_card(card, "train", tmp_path / "index")
    with pytest.raises(DropError, match="1 is a row of pairs/train and the key of row 0: say row:1 or key:1"):
        drop(index, ["1"])
    assert drop(index, ["key:1"]) == [0]
    assert drop(index, ["2"]) == [2]


@pytest.mark.parametrize("content", ["{", "[]", '{"train": ["000001"]}', '{"train": {"0.tar": [1]}}'])
def test_a_damaged_file_is_named(index: Index, content: str) -> None:
    drops_file(index.card).write_text(content)
    with pytest.raises(DropError, match=r"pairs\.drops\.json.*repair it, or delete it"):
        dropped_rows(index)


def test_a_card_in_a_folder_that_cannot_be_written_to_is_named(index: Index, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mm",
        "data",
        "drop",
        str(index.card.path),
        "1",
        "--folder",
        str(tmp_path / "index"),
    ]
    tmp_path.chmod(0o500)
    try:
        done = subprocess.run(without_privileges(command), capture_output=True, text=True, check=False)
    finally:
        tmp_path.chmod(0o700)
    assert done.returncode == 2
    assert "cannot be written; copy the card" in " ".join((done.stdout + done.stderr).split())


def test_processes_that_drop_at_once_lose_nothing(index: Index) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(drop, [index] * 10, [[str(row)] for row in range(10)]))
    assert rows(index) == list(range(10))


def test_the_command_drops_lists_and_takes_back(index: Index, tmp_path: Path) -> None:
    card, folder = str(tmp_path / "pairs.yaml"), ["--folder", str(tmp_path / "index")]

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["data", "drop", card, *arguments, *folder], catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.output.split())

    assert said("000003", "7").startswith("000003, row 3 000007, row 7 2 dropped; 2 of 12 are left out by")
    assert said().startswith("000003, row 3 000007, row 7 2 dropped so far")
    assert said("3", "--undo").startswith("000003, row 3 1 taken back in; 1 of 12 are left out")
    assert json.loads((tmp_path / "pairs.drops.json").read_text()) == {"train": {"0.tar": ["000007"]}}
