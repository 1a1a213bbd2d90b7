"""Saving in the background gives what saving in the foreground gives, and what goes wrong in it is told by all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mm.configure import RecipeError
from mm.train import checkpoint
from mm.train.checkpoint import CheckpointError
from mm.train.reading import Reader
from mm.train.recipe import Recipe
from tests.conftest import LONG
from tests.processes import wait_until, without_privileges
from tests.small_world import environment, free_port, losses, seen, train_here, train_together
from tests.test_checkpoint import largest_file
from tests.test_kills import kill, lines, start

pytestmark = pytest.mark.timeout(600)


def contents(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    entries = Reader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load_alone(state, path)
    return state


# -------------------------------------------------------------------------------------------------- in the background


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_saving_in_the_background_changes_no_bit(recipe: Path, tmp_path: Path, processes: int) -> None:
    runs = [tmp_path / "background", tmp_path / "foreground"]
    changes = ["steps=6", "save_every=1", "optim.average={}"]
    train_together(
        tmp_path,
        processes,
        [[str(recipe), f"run={run}", *changes, f"save_async={str(run is runs[0]).lower()}"] for run in runs],
    )
    assert losses(runs[0]) == losses(runs[1])
    names = [path.name for path in checkpoint.complete_checkpoints(runs[0] / "checkpoints")]
    assert names == [f"step-{step:08d}" for step in range(1, 7)]
    for name in names:
        first, second = (contents(run / "checkpoints" / name) for run in runs)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
        positions = [checkpoint.read_position(run / "checkpoints" / name) for run in runs]
        assert positions[0] == positions[1]


@pytest.mark.slow
def test_all_processes_killed_while_saving_leave_only_complete_checkpoints(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(recipe, run, 2, "steps=2000", "save_every=1", "keep=1")
    wait_until(lambda: lines(run) > 2 and list((run / "checkpoints").glob(".step-*.partial/*.distcp")), 120)
    kill(launcher)

    step = checkpoint.read_position(checkpoint.find(run)).step
    unbroken = train_here(recipe, f"run={tmp_path / 'unbroken'}", f"steps={step + 2}")
    train_here(recipe, f"run={run}", f"steps={step + 2}")
    assert seen(run) == seen(unbroken)
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-3)
    assert not list((run / "checkpoints").glob(".*"))


# ------------------------------------------------------------------------------------------------------- what is kept


def test_checkpoints_of_every_so_many_steps_are_kept_beside_the_newest(recipe: Path, tmp_path: Path) -> None:
    train_here(recipe, f"run={tmp_path}", "steps=7", "save_every=1", "keep=2", "keep_every=3")
    kept = [int(path.name[-8:]) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == [3, 6, 7]


@pytest.mark.parametrize("changes", [["save_every=0", "keep_every=10"], ["save_every=4", "keep_every=10"]])
def test_steps_that_are_never_saved_cannot_be_kept(recipe: Path, changes: Sequence[str]) -> None:
    with pytest.raises(RecipeError, match="keep_every is 10"):
        Recipe.load(recipe, changes)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_failed_save_ends_the_run_soon(recipe: Path, tmp_path: Path, background: str) -> None:
    changes = ["steps=2000", "save_every=2", f"save_async={background}"]
    train_here(recipe, f"run={tmp_path}", *changes, "steps=2")
    with largest_file(100_000), pytest.raises(CheckpointError, match=r"could not save .*step-00000004: .*Earlier"):
        train_here(recipe, f"run={tmp_path}", *changes)
    assert checkpoint.find(tmp_path).name == "step-00000002"
    assert max(losses(tmp_path)) <= 6  # by the next save it is known


def run_apart(command: Sequence[str]) -> str:
    """Output of a process that ends with exit status 2, without a traceback: so do mistakes that are told."""
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    return " ".join(done.stdout.split())


TRAIN = (sys.executable, "-m", "mm", "train")
SMALL_DISK = "mount -t tmpfs -o size=$0 tmpfs $1 && shift && exec $@"
can_mount = subprocess.run(
    ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
)


def on_a_small_disk(size: str, folder: Path, command: Sequence[str]) -> list[str]:
    """The command with a file system of so many bytes at the folder."""
    folder.mkdir()
    return ["unshare", "-rm", "sh", "-c", SMALL_DISK, size, str(folder), *command]


@pytest.mark.skipif(can_mount.returncode != 0, reason="may not mount a file system")
def test_a_disk_too_small_for_a_checkpoint_is_met_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_apart(on_a_small_disk("700k", run, [*TRAIN, str(recipe), f"run={run}"]))
    assert "a checkpoint takes about" in output
    assert "MB are free. Earlier checkpoints are intact" in output
    assert "step 1/" not in output


@pytest.mark.skipif(can_mount.returncode != 0, reason="may not mount a file system")
def test_a_disk_that_becomes_full_is_told_by_all_processes(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mm"]
    changes = ["steps=2000", "save_every=1", "keep=100"]
    done = subprocess.run(
        on_a_small_disk("8m", run, [*launcher, "train", str(recipe), f"run={run}", *changes]),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout.count("CheckpointError could not save") == 2, done.stdout
    assert re.search(r"takes about [\d.]+ MB and [\d.]+ MB are free. Earlier checkpoints are intact", done.stdout)


def test_a_run_folder_that_cannot_be_written_is_a_clear_error(recipe: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    output = run_apart(without_privileges([*TRAIN, str(recipe), f"run={tmp_path / 'run'}"]))
    tmp_path.chmod(0o755)
    assert f"RunError could not write to {tmp_path / 'run'}: Permission denied" in output


def test_checkpoints_that_cannot_be_written_are_met_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0o555)
    output = run_apart(without_privileges([*TRAIN, str(recipe), f"run={tmp_path}"]))
    assert f"could not save {tmp_path / 'checkpoints'}: PermissionError" in output
    assert lines(tmp_path) == 0


@pytest.mark.slow
def test_checkpoints_that_become_read_only_end_the_run(recipe: Path, tmp_path: Path) -> None:
    command = without_privileges([*TRAIN, str(recipe), f"run={tmp_path}", "steps=2000", "save_every=1"])
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: lines(tmp_path) > 2, 120)
    (tmp_path / "checkpoints").chmod(0o555)
    output, _ = process.communicate(timeout=60)
    (tmp_path / "checkpoints").chmod(0o755)
    assert process.returncode == 2, output
    assert "CheckpointError could not save" in output
    assert "Permission denied" in output
    step = checkpoint.read_position(checkpoint.find(tmp_path)).step
    assert train_here(recipe, f"run={tmp_path}", f"steps={step + 1}")


# -------------------------------------------------------------------------------------------------- missing processes

WAIT = """
from datetime import timedelta
from mm.train.parallel import join_world
with join_world(timedelta(seconds=3)): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_in_vain_for_another_says_so(rank: int) -> None:
    launch = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", WAIT], env=environment() | launch, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 1
    assert f"MissingProcess: rank {rank} has waited 3 s in vain for all 2 processes" in done.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(recipe, run, 2, "steps=2000", "save_every=1", "keep=1")
    wait_until(lambda: lines(run) > 2 and list((run / "checkpoints").glob(".step-*.partial/*.distcp")), 120)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), 9)
    began = time.monotonic()
    assert launcher.wait(timeout=90) != 0
    assert time.monotonic() - began < 60
    step = checkpoint.read_position(checkpoint.find(run)).step
    train_here(recipe, f"run={run}", f"steps={step + 2}")
    assert list(losses(run)) == list(range(1, step + 3))


def test_a_file_of_a_rank_that_is_missing_is_named(one: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    (run / "checkpoints/step-00000200/__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: FileNotFoundError: .*__0_0\.distcp"):
        train_here(recipe, f"run={run}", *LONG, "steps=210")
