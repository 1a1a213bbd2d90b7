"""Checkpoints survive kills, full disks and other numbers of processes; what does not belong is refused, unexecuted."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from mm.configure import RecipeError
from mm.train import checkpoint
from mm.train.checkpoint import CheckpointError
from mm.train.loop import RunError
from tests.conftest import LONG, Runs
from tests.small_world import fork_run, losses, tiny_model, train_apart, train_here

pytestmark = pytest.mark.timeout(900)  # the runs that the tests share take longest, and the first test waits for them

# ----------------------------------------------------------------------------------------- resuming goes on exactly


def test_one_process_resumes_with_the_same_bits(one: Path, recipe: Path, tmp_path: Path) -> None:
    run = fork_run(one, tmp_path / "run", step=100)
    train_here(recipe, f"run={run}", *LONG, "steps=110")
    expected = losses(one)
    assert losses(run) == {step: expected[step] for step in range(1, 111)}


@pytest.mark.parametrize(("resumed", "original"), [("grown", "one"), ("shrunk", "two")])
def test_another_number_of_processes_goes_on_with_the_same_losses(runs: Runs, resumed: str, original: str) -> None:
    found, expected = losses(getattr(runs, resumed)), losses(getattr(runs, original))
    assert list(found) == list(range(1, 111))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-4)
    assert any(found[step] != expected[step] for step in range(101, 111))  # the steps were taken anew


def started(run: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a process has saved its third step."""
    end = time.monotonic() + seconds
    while not list((run / "checkpoints").glob("step-*3")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def kill_while_saving(run: Path, process: subprocess.Popen[str]) -> None:
    """SIGKILL as soon as there is a half-written checkpoint."""
    while not list((run / "checkpoints").glob(".*.partial/*.distcp")):
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(one: Path, recipe: Path, tmp_path: Path) -> None:
    changes = [f"run={tmp_path}", *LONG, "save_every=1", "data.workers=1"]
    process = train_apart(recipe, *changes)
    started(tmp_path, process)
    with pytest.raises(RunError, match="another process is training"):
        train_here(recipe, *changes)
    kill_while_saving(tmp_path, process)

    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[0].endswith(".partial")
    step = checkpoint.read_position(checkpoint.find(tmp_path)).step
    train_here(recipe, *changes, f"steps={step + 3}")
    expected = losses(one)
    assert losses(tmp_path) == {number: expected[number] for number in range(1, step + 4)}
    assert not list((tmp_path / "checkpoints").glob(".*"))


# --------------------------------------------------------------------------------------------------------- failures


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than this many bytes into a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_checkpoints(recipe: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here(recipe, f"run={run}", *LONG, "steps=2")
    with largest_file(100_000), pytest.raises(CheckpointError, match=r"could not save .*step-00000004: .*Earlier"):
        train_here(recipe, f"run={run}", *LONG, "steps=4")
    assert checkpoint.find(run).name == "step-00000002"
    train_here(recipe, f"run={run}", *LONG, "steps=4")
    expected = losses(one)
    assert losses(run) == {step: expected[step] for step in range(1, 5)}


def test_a_full_disk_is_a_clear_error_for_exports_too(tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(CheckpointError, match=r"could not write .*model\.safetensors"):
        checkpoint.export_weights(tmp_path / "export", tiny_model())
    assert not list((tmp_path / "export").iterdir())


def test_only_the_newest_checkpoints_are_kept(recipe: Path, tmp_path: Path) -> None:
    train_here(recipe, f"run={tmp_path}", "steps=4", "save_every=1", "keep=2")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]


def test_a_run_keeps_at_least_one_checkpoint(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="`keep` is 0; expected a whole number from 1"):
        train_here(recipe, "keep=0")


# ---------------------------------------------------------------------------------------------- other architectures


def test_another_architecture_is_refused_with_the_names_of_parameters(one: Path, recipe: Path, tmp_path: Path) -> None:
    run = fork_run(one, tmp_path / "run", step=100)
    with pytest.raises(CheckpointError) as error:
        train_here(recipe, f"run={run}", *LONG, "model.decoder.config.layers=3", "model.decoder.config.ffn=96")
    message = str(error.value)
    assert "step-00000100 is of another architecture" in message
    assert "missing in the checkpoint: decoder.layers.2.attention.key.weight (16, 32)" in message
    with pytest.raises(CheckpointError, match=r"feed_forward\.down\.weight: \(32, 64\) in the checkpoint, \(32, 96\)"):
        train_here(recipe, f"run={run}", *LONG, "model.decoder.config.ffn=96")


def test_a_folder_without_checkpoints_is_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no weights in {tmp_path}"):
        train_here(recipe, f"run={tmp_path / 'run'}", "steps=1", f"init_from={tmp_path}")


def test_a_checkpoint_without_its_position_is_invisible(one: Path, tmp_path: Path) -> None:
    run = fork_run(one, tmp_path / "run", step=200)
    (run / "checkpoints/step-00000200/position.json").unlink()
    assert checkpoint.find(run).name == "step-00000100"


def test_exporting_and_loading_is_the_identity(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint.export_weights(tmp_path, model)
    with torch.no_grad():
        loaded = tiny_model()
        for parameter in loaded.parameters():
            parameter.zero_()
    checkpoint.load_weights(tmp_path, loaded)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------- 7. nothing untrusted runs


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def copied(one: Path, folder: Path) -> Path:
    return Path(shutil.copytree(one / "checkpoints/step-00000100", folder / "copied"))


def test_a_description_that_calls_functions_is_refused(one: Path, tmp_path: Path) -> None:
    path, trap = copied(one, tmp_path), tmp_path / "trap"
    (path / ".metadata").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        checkpoint.load_weights(path, tiny_model())
    assert not trap.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04."])
def test_a_damaged_description_is_refused(one: Path, tmp_path: Path, content: bytes) -> None:
    path = copied(one, tmp_path)
    (path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(path, tiny_model())


def test_optimizer_options_that_call_functions_are_refused(recipe: Path, tmp_path: Path) -> None:
    run, trap = train_here(recipe, f"run={tmp_path / 'run'}", "steps=1"), tmp_path / "trap"
    path = checkpoint.find(run)
    metadata = FileSystemReader(path).read_metadata()
    (place,) = [
        place for index, place in metadata.storage_data.items() if index.fqn.endswith("decoder.norm.weight.betas")
    ]
    torch.save(Trap(trap), tmp_path / "spoiled")
    sound, spoiled = (path / place.relative_path).read_bytes(), (tmp_path / "spoiled").read_bytes()
    place.offset, place.length = len(sound), len(spoiled)
    (path / place.relative_path).write_bytes(sound + spoiled)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not fit"):
        train_here(recipe, f"run={run}", "steps=2")
    assert not trap.exists()


def test_weights_are_read_without_unpickling(tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    torch.save(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged or no safetensors"):
        checkpoint.load_weights(tmp_path, tiny_model())
