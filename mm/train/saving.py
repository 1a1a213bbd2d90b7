"""Saving while the run trains on.

    state ─copy in memory─┬─▶ the next steps
                          └─▶ a thread: each rank its file ─all are on disk─▶ position.json ─▶ rename ─▶ old ones go

The thread talks to the other processes in a group of its own: collectives of two threads in one group would meet in
another order on each rank, and wait for each other for ever. One save is in flight at most.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from mm.train.checkpoint import (
    POSITION,
    CheckpointError,
    Position,
    complete_checkpoints,
    latest,
    read_position,
    root_cause,
)
from mm.train.parallel import Engine, World
from mm.train.recipe import Recipe

T = TypeVar("T")

GUESSED_SPEED = 100e6
"""Bytes a second of a rank, until a save was timed."""


class Saved(NamedTuple):
    """A complete checkpoint, and how long it took from the call until it was on disk."""

    path: Path
    seconds: float


class Saver:
    """Writes the checkpoints of a run. Every process has one and calls it at the same steps.

    Args:
        keep, keep_every: see `keep_only`.
        background: write from a copy in memory while training goes on; else every save is waited for.
    """

    def __init__(self, folder: Path, world: World, keep: int, keep_every: int, *, background: bool) -> None:
        self.last = latest(folder)
        self._folder, self._world = folder, world
        self._keep, self._keep_every = keep, keep_every
        self._background = background
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Saved] | None = None
        self._seconds = 0.0
        self._bytes = 0

    def prepare(self, engine: Engine) -> None:
        """Remove what a killed run left half-written, and see that a checkpoint of this state could be saved.

        Raises:
            CheckpointError: the folder is not writable or has no space for one.
        """
        self._bytes, here = _state_bytes(engine)
        self._seconds = self._seconds or here / GUESSED_SPEED

        def look() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(".*.partial"):
                shutil.rmtree(stale)
            probe = self._folder / ".probe.partial"
            probe.mkdir()
            _write_durably(probe / POSITION, "{}")
            shutil.rmtree(probe)
            if lack := self._lack():
                raise OSError(lack)

        with self._told(self._folder):
            self._on_first(look)

    def save(self, engine: Engine, position: Position) -> None:
        """Begin a checkpoint, when the one before is done. The state may change as soon as this returns.

        Raises:
            CheckpointError: the one before failed, or this one if it is waited for.
        """
        self.wait()
        began = time.monotonic()
        final = self._folder / f"step-{position.step:08d}"
        partial = self._folder / f".{final.name}.partial"
        weights, moments = engine.state_dict()
        state: dict[str, Any] = {"model": weights, "optimizer": moments}

        def complete(write: Callable[[], Any]) -> Saved:
            with self._told(final):
                write()
                self._on_first(lambda: self._publish(partial, final, position))
            return Saved(final, time.monotonic() - began)

        if not self._background:
            self._take(complete(lambda: dcp.save(state, checkpoint_id=partial, process_group=self._group)))
            return
        writing = dcp.async_save(state, checkpoint_id=partial, process_group=self._group)
        assert isinstance(writing, Future)
        self._saving = self._thread.submit(complete, writing.result)

    def wait(self) -> Path | None:
        """The newest complete checkpoint, when the one in flight is done.

        Raises:
            CheckpointError: it failed. All processes raise it, with the same message.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            self._take(saving.result())
        return self.last

    def _take(self, saved: Saved) -> None:
        self.last, self._seconds = saved

    @property
    def failed(self) -> bool:
        """Whether the save in flight is known to have failed. One process may know it before another."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    @property
    def reserve(self) -> float:
        """Seconds until another save would be done, as long as the last one took."""
        return self._seconds * (2 if self._saving is not None else 1)

    def rewind(self, last_good: int, here: Position) -> bool:
        """Let the run go on from an earlier checkpoint of its stage, with the packs that come next now.

        Later checkpoints go, and `last` is the one that stays. Whether there was one; if not, nothing changes.

        Args:
            last_good: the newest that counts is that of this step, or the one before.
            here: where the run stands.
        """
        self.wait()

        def go_back() -> Path | None:
            complete = complete_checkpoints(self._folder)
            good = [path for path in complete if _is_before(read_position(path), last_good, here)]
            if not good:
                return None
            for path in complete[complete.index(good[-1]) + 1 :]:
                _delete(path)
            then = read_position(good[-1])
            passed_over = then.passed_over + here.packs - then.packs
            there = replace(then, packs=here.packs, passed_over=passed_over, rewinds=here.rewinds + 1)
            _write_durably(good[-1] / f".{POSITION}", json.dumps(asdict(there)))
            (good[-1] / f".{POSITION}").replace(good[-1] / POSITION)
            _flush_folder(good[-1])
            return good[-1]

        with self._told(self._folder):
            chosen = self._on_first(go_back)
        self.last = chosen or self.last
        return chosen is not None

    def close(self) -> None:
        """Wait for the save in flight, however it ends, and leave its group."""
        self._thread.shutdown()
        dist.destroy_process_group(self._group)
        del self._group

    def _publish(self, partial: Path, final: Path, position: Position) -> None:
        """Give a checkpoint its name, once the files of all ranks are on disk."""
        _write_durably(partial / POSITION, json.dumps(asdict(position)))
        _flush_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush_folder(self._folder)
        keep_only(self._folder, self._keep, self._keep_every)

    def _lack(self) -> str:
        """What the disk lacks for a checkpoint, in words; empty where it lacks nothing, or says nothing."""
        if not self._folder.exists():
            return ""
        disk = shutil.disk_usage(self._folder)
        if not disk.total or disk.free >= self._bytes:  # some remote file systems say nothing, which reads as 0
            return ""
        return f"a checkpoint takes about {self._bytes / 1e6:,.1f} MB and {disk.free / 1e6:,.1f} MB are free"

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Turns what can go wrong while saving into a `CheckpointError`."""
        try:
            yield
        except (OSError, dcp.CheckpointException) as error:
            # torch.save tells of a full disk as "unexpected pos 704 vs 598", so look
            why = self._lack() or root_cause(error)
            raise CheckpointError(
                f"could not save {path}: {why}. Earlier checkpoints are intact; free some space or set `run:` to "
                "another disk, and repeat the command to go on from the last one"
            ) from error
        except RuntimeError as error:  # of a collective
            raise CheckpointError(
                f"could not save {path}: a process of the run is gone ({root_cause(error)}). Earlier checkpoints are "
                "intact; see above for what ended it, and repeat the command to go on from the last one"
            ) from error

    def _on_first(self, act: Callable[[], T]) -> T:
        """Act on the first process. The others wait for it, and all return what it does or raise what its disk does."""
        outcome: list[T | OSError | None] = [None]
        if self._world.is_first:
            try:
                outcome = [act()]
            except OSError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return cast(T, outcome[0])


@contextmanager
def saving(recipe: Recipe, world: World) -> Iterator[Saver]:
    """The saver of a run; what is in flight is waited for at the end, also of a run that fails."""
    saver = Saver(recipe.folder / "checkpoints", world, recipe.keep, recipe.keep_every, background=recipe.save_async)
    try:
        yield saver
    finally:
        saver.close()


def keep_only(folder: Path, newest: int, every: int = 0) -> None:
    """Delete all complete checkpoints but the newest ones, and those of every so many steps (0: only the newest)."""
    complete = complete_checkpoints(folder)
    for path in complete[: max(len(complete) - newest, 0)]:
        if every and int(path.name.removeprefix("step-")) % every == 0:
            continue
        _delete(path)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.partial")  # half-deleted is as invisible as half-written
    path.rename(doomed)
    shutil.rmtree(doomed)


def _is_before(there: Position, step: int, here: Position) -> bool:
    """Whether a checkpoint is of the same stage as `here`, up to a step, so that their packs have the same numbers."""
    return there.step <= step and (there.plan, len(there.finished)) == (here.plan, len(here.finished))


def _state_bytes(engine: Engine) -> tuple[int, int]:
    """Bytes of weights and optimizer state: of all ranks together, and of this one."""
    tensors = [value for part in engine.state_dict() for value in part.values() if torch.is_tensor(value)]
    return (
        sum(tensor.nbytes for tensor in tensors),
        sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors),
    )


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
