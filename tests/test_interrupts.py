"""A run that is asked to stop, by a signal to any process or by the clock, saves first and goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.configure import RecipeError
from mm.train import checkpoint
from mm.train.interrupts import Interrupts, Stopped, seconds_of
from mm.train.recipe import Recipe
from tests.conftest import LONG
from tests.processes import wait_until
from tests.small_world import environment, losses, seen, train_apart, train_here
from tests.test_kills import kill, lines

pytestmark = pytest.mark.timeout(600)

HOURS = ("steps=100000", "data.workers=1", "validate_every=0")


def saved(run: Path) -> int:
    return checkpoint.read_position(checkpoint.find(run)).step


# ------------------------------------------------------------------------------------------------------------ signals


def test_sigterm_saves_and_ends_well(one: Path, recipe: Path, tmp_path: Path) -> None:
    changes = [f"run={tmp_path}", *LONG, *HOURS, "save_every=0"]
    process = train_apart(recipe, *changes)
    wait_until(lambda: lines(tmp_path) > 2, 120)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"stopped, as it was asked to; repeat the command to go on from {tmp_path}" in " ".join(output.split())

    step = saved(tmp_path)
    assert max(losses(tmp_path)) == step
    train_here(recipe, *changes, f"steps={step + 3}")
    expected = losses(one)
    assert losses(tmp_path) == {number: expected[number] for number in range(1, step + 4)}


TOLD = 'trap : TERM; "$@" & wait $!; while kill -0 $! 2>/dev/null; do wait $!; done; wait $!; echo $? > $STATUS.$RANK'
"""Runs a command that takes the signals of its process group, and writes down its exit status."""


def start(recipe: Path, run: Path, processes: int, *changes: str) -> subprocess.Popen[bytes]:
    """torchrun with processes whose exit statuses are written to ``RUN.0``, ``RUN.1`` …"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", "mm", "train", str(recipe), f"run={run}", *changes]
    return subprocess.Popen(
        [*launcher, "--no-python", "bash", "-c", TOLD, "bash", *command],
        env=environment() | {"STATUS": str(run)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def trainers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The process of each rank, below the shell that waits for it."""

    def children(parent: int) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(parent)], stdout=subprocess.PIPE, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    return [child for shell in children(launcher.pid) for child in children(shell)]


def statuses(run: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(run.parent.glob(f"{run.name}.?"))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sigterm_to_the_launcher_saves_once_and_ends_all_ranks_well(
    recipe: Path, tmp_path: Path, processes: int
) -> None:
    run = tmp_path / "run"
    launcher = start(recipe, run, processes, *HOURS)
    wait_until(lambda: lines(run) > 2, 180)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=60)
    assert statuses(run) == ["0"] * processes
    step = saved(run)
    assert max(losses(run)) == step

    unbroken = train_here(recipe, f"run={tmp_path / 'unbroken'}", *HOURS, f"steps={step + 3}")
    train_here(recipe, f"run={run}", *HOURS, f"steps={step + 3}")
    assert seen(run) == seen(unbroken)
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-3)


def test_a_signal_to_one_rank_is_acted_on_by_all(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(recipe, run, 2, *HOURS)
    try:
        wait_until(lambda: lines(run) > 2, 180)
        last = trainers(launcher)[-1]
        os.kill(last, signal.SIGUSR1)
        wait_until(lambda: checkpoint.complete_checkpoints(run / "checkpoints"), 60)
        step = saved(run)
        wait_until(lambda: lines(run) > step + 2, 60)  # it goes on
        assert saved(run) == step
        os.kill(last, signal.SIGTERM)
        assert launcher.wait(timeout=60) == 0
    finally:
        if launcher.poll() is None:
            kill(launcher)
    assert statuses(run) == ["0", "0"]
    assert saved(run) == max(losses(run)) > step


def test_the_signals_are_as_before_when_the_run_is_over(recipe: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    train_here(recipe, f"run={tmp_path}", "steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


# -------------------------------------------------------------------------------------------------------------- clock


def test_a_run_stops_within_its_time_and_goes_on(one: Path, recipe: Path, tmp_path: Path) -> None:
    changes = [f"run={tmp_path}", *LONG, "steps=100000", "save_every=20", "validate_every=0"]
    began = time.time()
    with pytest.raises(Stopped) as stopped:
        train_here(recipe, *changes, "time_limit=14s")
    # The last step leaves 5 s for saving and leaving, which other work on the machine may stretch.
    assert (tmp_path / "seen" / "rank-0.jsonl").stat().st_mtime - began < 14
    assert stopped.value.code == 0
    step = saved(tmp_path)
    assert max(losses(tmp_path)) == step
    train_here(recipe, *changes, f"steps={step + 3}")
    common = losses(one).keys() & losses(tmp_path).keys()
    assert {number: losses(tmp_path)[number] for number in common} == {number: losses(one)[number] for number in common}


def test_a_stop_in_a_stage_begins_no_other(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("steps: 10\n", "stages: [{steps: 100000}, {steps: 3}]\n")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(Stopped):
        train_here(tmp_path / "recipe.yaml", f"run={tmp_path / 'run'}", "time_limit=5s")
    assert checkpoint.read_position(checkpoint.find(tmp_path / "run")).finished == ()


def test_the_time_of_a_save_and_of_two_steps_is_kept_free() -> None:
    began = time.monotonic()
    limit = Interrupts(limit=60.0)
    assert limit.votes(saving=30.0) == (0.0, 0.0)
    assert limit.votes(saving=61.0) == (1.0, 0.0)
    time.sleep(0.5)
    limit.votes(saving=0.0)
    assert limit.votes(saving=53.9) == (1.0, 0.0)  # 0.5 s have gone and the longest step takes as long; 5 s for leaving
    spent = time.monotonic() - began  # at least what has gone and the longest step; more than 0.5 s where others work
    assert limit.votes(saving=60 - 5 - 3 * spent - 2) == (0.0, 0.0)
    assert Interrupts().votes(saving=1e9) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("11h30m", 41400), ("90s", 90), ("2d", 172800), ("1d2h3m4s", 93784), (" 5m ", 300)]
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "11", "11:30", "30m11h", "-1h", "1.5h", "0s", "1 h"])
def test_other_durations_are_refused(recipe: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"time_limit is .*write days, hours, minutes and seconds such as 11h30m"):
        Recipe.load(recipe, [f"time_limit='{text}'"])
