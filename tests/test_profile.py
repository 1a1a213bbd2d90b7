"""`--profile` shows the steps that were asked for, on every process, and changes nothing."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm.configure import RecipeError
from mm.train.loop import train
from mm.train.profile import Steps, exposed, length, merged
from mm.train.recipe import Recipe
from tests.small_world import environment, losses, seen, train_here, write_recipe

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def recipe(corpus: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, corpus, tokenizer_folder, ["text", "pairs"], steps=6, save_every=2)


def trace(run: Path, steps: str, rank: int = 0) -> list[dict]:
    return json.loads(gzip.open(run / "profile" / f"step-{steps}" / f"rank-{rank}.json.gz").read())["traceEvents"]


def names(events: list[dict]) -> list[str]:
    return [event["name"] for event in events if event.get("ph") == "X"]


def share(text: str, what: str) -> float:
    (found,) = re.findall(rf"([\d.]+)%  {what}", text)
    return float(found) / 100


# ---------------------------------------------------------------------------------------------------------- intervals


def test_time_that_several_cover_counts_once_and_only_what_nothing_covers_is_exposed():
    assert merged([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    collectives, computation = [(0.0, 4.0), (3.0, 6.0), (10.0, 12.0)], [(2.0, 5.0), (9.0, 13.0)]
    assert exposed(collectives, computation) == 2 + 1
    assert exposed([], computation) == 0
    assert exposed(collectives, []) == 8


# ------------------------------------------------------------------------------------------------------------- a run


def test_a_profile_holds_the_steps_that_were_asked_for_and_changes_nothing(recipe: Path, tmp_path: Path, capsys):
    plain = train_here(recipe, f"run={tmp_path / 'plain'}")
    profiled = tmp_path / "profiled"
    train(Recipe.load(recipe, [f"run={profiled}"]), Steps(3, 4))

    assert losses(profiled) == losses(plain)
    assert seen(profiled) == seen(plain)
    events = names(trace(profiled, "3-4"))
    assert [name for name in events if name.startswith("ProfilerStep")] == ["ProfilerStep#2", "ProfilerStep#3"]
    assert {name: events.count(name) for name in ("data", "forward", "backward", "optimizer")} == {
        "data": 2, "forward": 2 * 4, "backward": 2 * 4, "optimizer": 2,
    }  # fmt: skip
    text = (profiled / "profile" / "step-3-4" / "rank-0.txt").read_text()
    assert text in capsys.readouterr().out
    assert "aten::" in text
    assert 0 < share(text, "waiting for data") < 1
    assert share(text, "collectives") == 0
    assert (profiled / "recipe.yaml").read_text() == (plain / "recipe.yaml").read_text().replace(
        str(plain), str(profiled)
    )


def test_two_processes_leave_a_trace_each_with_their_collectives(recipe: Path, tmp_path: Path):
    run = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "mm", "train", str(recipe), f"run={run}", "--profile", "2-3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(run)) == 6
    for rank in (0, 1):
        events = names(trace(run, "2-3", rank))
        assert {"gloo:all_gather", "gloo:all_reduce", "sync"} <= set(events)
        text = (run / "profile" / "step-2-3" / f"rank-{rank}.txt").read_text()
        (hidden,) = re.findall(r"; ([\d.]+)% not hidden", text)
        assert 0 < float(hidden) / 100 <= share(text, "collectives") < 1
    assert done.stdout.count("collectives;") == 1


def test_steps_that_the_run_will_not_take_are_an_error_that_says_which_it_will(recipe: Path, tmp_path: Path):
    for steps in (Steps(5, 7), Steps(7, 8)):
        with pytest.raises(RecipeError, match=rf"--profile {steps}: .* has steps 1 to 6 left"):
            train(Recipe.load(recipe), steps)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train_here(recipe, "steps=4")
    with pytest.raises(RecipeError, match=r"--profile 4-5: .* has steps 5 to 6 left"):
        train(Recipe.load(recipe), Steps(4, 5))
    train(Recipe.load(recipe), Steps(5, 6))
    assert [n for n in names(trace(tmp_path / "run", "5-6")) if n.startswith("ProfilerStep")] == [
        "ProfilerStep#0", "ProfilerStep#1",
    ]  # fmt: skip


def test_steps_are_written_as_one_number_or_two():
    assert Steps.parse("10-12") == (10, 12)
    assert Steps.parse("7") == (7, 7)
    for wrong in ("", "10:12", "a-b", "-3", "10-"):
        with pytest.raises(RecipeError, match="such as 10-12"):
            Steps.parse(wrong)
    for wrong in ("12-10", "0-2"):
        with pytest.raises(RecipeError, match="count from 1"):
            Steps.parse(wrong)
