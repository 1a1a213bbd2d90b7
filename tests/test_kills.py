"""Runs that are killed at any moment and go on with another number of processes end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import count, cycle
from pathlib import Path

import pytest

from tests.small_world import environment, losses, seen, train_here, write_recipe

WORLDS = (1, 2, 4, 2)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    """A recipe of two stages of 30 steps over all modalities, four packs a step, saved after every other step."""
    stages = [{"steps": 30}, {"steps": 30, "packing": {"capacity": 160}}]
    return write_recipe(
        tmp_path_factory.mktemp("staged"),
        corpus,
        tokenizer_folder,
        steps=None,
        stages=stages,
        save_every=2,
        keep=2,
    )


def start(recipe: Path, run: Path, processes: int, *changes: str) -> subprocess.Popen[bytes]:
    """A launcher with its processes, in a process group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, "-m", "mm", "train", str(recipe), f"run={run}", *changes],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and to all it started, each of which torchrun puts into a session of its own."""
    children = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    parents = {int(pid): int(parent) for pid, parent in map(str.split, children)}
    doomed = [launcher.pid]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in reversed(doomed):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()


def killed_until_done(recipe: Path, run: Path, kills: int, seed: int) -> int:
    """Runs and kills it `kills` times at random moments, then lets it end; returns how often it had made progress."""
    draw = random.Random(seed)
    progressed = 0
    for number, processes in zip(count(), cycle(WORLDS), strict=False):
        launcher = start(recipe, run, processes)
        if number == kills:
            assert launcher.wait(timeout=300) == 0
            return progressed
        before, begun = lines(run), time.monotonic()
        patience = draw.uniform(0, 6) if number % 4 == 3 else 120  # now and then while it is still starting
        while lines(run) <= before and launcher.poll() is None and time.monotonic() - begun < patience:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        assert launcher.poll() in (None, 0)
        kill(launcher)
        progressed += lines(run) != before
    raise AssertionError


def check(staged: Path, folder: Path, kills: int) -> None:
    unbroken = train_here(staged, f"run={folder / 'unbroken'}")
    progressed = killed_until_done(staged, folder / "killed", kills, seed=kills)
    assert progressed >= kills // 2
    assert seen(folder / "killed") == seen(unbroken)
    assert losses(folder / "killed") == pytest.approx(losses(unbroken), rel=1e-3)


@pytest.mark.timeout(600)
def test_a_run_killed_three_times_sees_what_an_unbroken_one_sees(staged: Path, tmp_path: Path) -> None:
    check(staged, tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_twenty_times_sees_what_an_unbroken_one_sees(staged: Path, tmp_path: Path) -> None:
    check(staged, tmp_path, kills=20)
