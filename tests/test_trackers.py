"""Weights & Biases and trackio get what `metrics.jsonl` gets, and a resumed run goes on as the same one there.

Neither is among the packages of the suite's tests, which skip without them: pip install wandb trackio
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mm.configure import RecipeError
from mm.train.recipe import Recipe
from mm.train.trackers import tracker_id
from tests.small_world import environment, train_here, write_recipe

pytestmark = pytest.mark.timeout(300)

FIGURES = ("loss", "tokens", "time/forward", "memory/peak", "validation_loss")


@pytest.fixture
def recipe(corpus: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, corpus, tokenizer_folder, ["text"], steps=3, save_every=2, validate_every=2)


def reports(run: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: picked(line) for line in lines}


def picked(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figures[name] for name in FIGURES if name in figures}


def train_twice(recipe: Path, name: str, environment: dict[str, str]) -> Path:
    """Three steps, and then a process of its own that goes on to the fifth."""
    for steps in (3, 5):
        command = [sys.executable, "-m", "mm", "train", str(recipe), f"log_to=[{name}]", f"steps={steps}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return recipe.parent / "run"


BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def records(file: Path) -> Iterator[bytes]:
    """The records of a run file of W&B: LevelDB's log format behind a header of seven bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, place, record = file.read_bytes(), HEADER.size, b""
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(data, place)
        place += HEADER.size + size
        piece = data[place - size : place]
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            yield record


def test_wandb_has_every_report_under_one_id(recipe: Path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = train_twice(recipe, "wandb", environment() | {"WANDB_MODE": "offline"})
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    ids, found = set(), {}
    for record in map(Record.FromString, (record for file in files for record in records(file))):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            assert record.run.display_name == "tiny"
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[items["step"]] = picked(items)
    assert ids == {tracker_id(run)}
    assert found == reports(run)
    assert not (run / "tensorboard").exists()


def test_trackio_has_every_report_under_one_name(recipe: Path, tmp_path: Path):
    pytest.importorskip("trackio")
    run = train_twice(recipe, "trackio", environment() | {"TRACKIO_DIR": str(tmp_path / "trackio")})
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s\n"
        "print(json.dumps({name: s.get_logs('mm', name) for name in s.get_runs('mm')}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        env=environment() | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    logs = json.loads(output.splitlines()[-1])
    assert list(logs) == [f"tiny {tracker_id(run)}"]
    assert {log["step"]: picked(log) for log in next(iter(logs.values()))} == reports(run)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_missing_is_told_before_anything_starts(recipe: Path):
    with pytest.raises(RecipeError, match=r"log_to names wandb, .* pip install wandb"):
        train_here(recipe, "log_to=[tensorboard,wandb]")
    assert not (recipe.parent / "run").exists()


def test_what_is_no_tracker_is_refused_with_those_that_are(recipe: Path):
    with pytest.raises(RecipeError, match=r"'tensorbord'; expected one of 'tensorboard', 'wandb', 'trackio'"):
        Recipe.load(recipe, ["log_to=[tensorbord]"])


def test_a_run_may_log_to_no_tracker(recipe: Path):
    run = train_here(recipe, "log_to=[]")
    assert len(reports(run)) == 3
    assert not (run / "tensorboard").exists()
    assert not (run / "tracker-id").exists()
