"""A hang says where every process stands, a death ends the others with its reason, a bad gradient names its samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mm.train.stages import RunError
from tests import faulty_objectives
from tests.processes import wait_until
from tests.small_world import environment, losses, train_here, write_recipe

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def recipe(tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    return write_recipe(
        tmp_path, corpus, tokenizer_folder, ["text", "pairs"], steps=6, packing={"capacity": 128, "batch": 2}
    )


def objective(name: str) -> str:
    return f"objective._target_=tests.faulty_objectives.{name}"


def start(recipe: Path, processes: int, *changes: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, "-m", "mm", "train", str(recipe), *changes],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(stack: Path) -> str:
    return stack.read_text() if stack.exists() else ""


def test_a_hang_shows_where_every_process_stands(recipe: Path) -> None:
    started = start(recipe, 2, objective("Hanging"), "watchdog=0.1")
    stacks = [recipe.parent / "run" / "stacks" / f"rank-{rank}.txt" for rank in (0, 1)]
    try:
        # on a busy machine the first step may take longer than the watchdog waits, which then tells of that, too
        wait_until(lambda: "loop.py" in told(stacks[0]) and "faulty_objectives.py" in told(stacks[1]))
    finally:
        started.terminate()
        output, _ = started.communicate()
    waiting, culprit = (path.read_text() for path in stacks)
    assert "faulty_objectives.py" in culprit
    assert "faulty_objectives.py" not in waiting.replace("in loss", "")
    assert "rank 0: no step has ended for 0.1 minutes" in output
    assert "rank 1: no step has ended for 0.1 minutes" in output


def test_a_run_without_a_hang_leaves_no_stacks(recipe: Path) -> None:
    run = train_here(recipe)
    assert not (run / "stacks").exists()


def test_a_rank_that_dies_ends_the_others_and_its_reason_is_named(recipe: Path) -> None:
    output, _ = (started := start(recipe, 2, objective("Raising"))).communicate(timeout=240)
    assert started.returncode
    cause = output[output.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "ArithmeticError: the answer is not 42" in cause


def test_a_run_whose_gradient_is_never_finite_stops(recipe: Path) -> None:
    with pytest.raises(
        RunError, match=r"5 updates in a row were skipped, up to step 5: the gradient is not finite; lower optim\.lr"
    ):
        train_here(recipe, objective("NeverFinite"))
    events = (recipe.parent / "run" / "ledger.jsonl").read_text().splitlines()
    assert len(events) == 5


def test_a_step_that_is_skipped_names_its_samples(recipe: Path) -> None:
    faulty_objectives.calls.clear()
    run = train_here(recipe, objective("NotFinite"), "objective.call=3")
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    (event,) = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    assert event["event"] == "step 2: the gradient is not finite, the update was skipped"
    assert len(event["samples"]) > 2
    assert all(name.split(",")[0] in ("text", "pairs") and ".tar, row " in name for name in event["samples"])


def test_where_memory_runs_out_the_estimate_is_named(recipe: Path) -> None:
    """As torch raises it; there is no GPU whose memory could run out here."""
    faulty_objectives.calls.clear()
    with pytest.raises(RunError, match=r"Tried to allocate 2.00 GiB.\n`mm estimate RECIPE --gpus 1 "):
        train_here(recipe, objective("OutOfMemory"))
