"""Passes over shards: in parallel, with progress, and with results that are on disk whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TimeRemainingColumn

from mm.terminal import Progress

S = TypeVar("S")
T = TypeVar("T")


class PassError(RuntimeError):
    """A pass over shards that could not be finished. What was finished is kept."""


WORTH_IT = 20.0
"""Seconds of work in one process from which on starting several (some seconds each) pays."""
MOST = 16


def each_shard(
    work: Callable[[S], T], shards: Sequence[S], processes: int | None, label: str, progress: bool
) -> dict[S, T]:
    """Results of `work` for every shard, in parallel processes, with a bar once it takes more than a second.

    Args:
        processes: 0 for this one only; None: as many as there are cores if the first shard says that it is long work.

    Raises:
        PassError: a process was killed.
    """
    if processes is None and shards:
        begun = time.monotonic()
        first = {shards[0]: work(shards[0])}
        is_long = (time.monotonic() - begun) * (len(shards) - 1) > WORTH_IT
        return first | each_shard(work, shards[1:], min(os.cpu_count() or 1, MOST) if is_long else 0, label, progress)
    if not processes or len(shards) < 2:
        results = ((shard, work(shard)) for shard in shards)
        return dict(_with_bar(results, len(shards), label) if progress else results)
    spawn = multiprocessing.get_context("spawn")  # forking a process with threads, as torch has, may deadlock
    with ProcessPoolExecutor(min(processes, len(shards)), spawn, end_with_parent) as pool:
        futures = {pool.submit(work, shard): shard for shard in shards}
        results = ((futures[future], future.result()) for future in as_completed(futures))
        try:
            return dict(_with_bar(results, len(shards), label) if progress else results)
        except BrokenProcessPool as error:
            raise PassError(f"{label}: a process was killed, perhaps for memory; try fewer processes") from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Lets this process end when the one that started it is gone. A pool's worker would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _with_bar(results: Iterator[T], total: int, label: str) -> Iterator[T]:
    with bar(label, total) as show:
        for done, result in enumerate(results, 1):
            show(done)
            yield result


@contextmanager
def bar(label: str, total: float, wanted: bool = True) -> Iterator[Callable[[float], None]]:
    """A function that shows how much of `total` is done, once it takes more than a second and if that is wanted."""
    started = time.monotonic()
    shown: Progress | None = None

    def show(done: float) -> None:
        nonlocal shown
        if shown is None and wanted and time.monotonic() - started > 1:
            numbers = MofNCompleteColumn() if total > 1 else TaskProgressColumn()
            columns = ("{task.description}", BarColumn(), numbers, TimeRemainingColumn())
            shown = stack.enter_context(Progress(*columns))
            shown.add_task(label, total=total)
        if shown is not None:
            shown.update(shown.task_ids[0], completed=min(done, total))

    with ExitStack() as stack:
        yield show


def write_table(table: pa.Table, file: Path, key: bytes, stamp: Any, group: int | None = None) -> None:
    """Writes a parquet file with a JSON stamp under a key of its metadata. The caller holds the file's lock.

    Args:
        group: rows of a row group, for files that are read in shuffled order.
    """
    unfinished, stamped = file.with_suffix(".unfinished"), table.replace_schema_metadata({key: json.dumps(stamp)})
    try:
        pq.write_table(stamped, unfinished, compression="zstd", row_group_size=group)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_stamp(file: Path, key: bytes) -> Any:
    """The stamp that `write_table` left in a file, None where there is no file."""
    try:
        with pa.OSFile(str(file)) as opened:  # without its schema and a search for a file system: once a shard
            return json.loads(pq.ParquetFile(opened).metadata.metadata[key])
    except FileNotFoundError:
        return None
