"""A sweep over runs: what is wanted and not yet there is run, some at once, and what came out is a line of a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

Job = TypeVar("Job")

TIMED = """
import resource, sys
from mm.train.loop import train
from mm.train.recipe import Recipe
train(Recipe.load(sys.argv[1]))
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("CPU seconds", sum(one.ru_utime + one.ru_stime for one in used))
"""
"""Trains a recipe and says what it took, workers included."""


def cpu_seconds(log: str) -> int:
    """What `TIMED` said."""
    return round(float(log.rpartition("CPU seconds ")[2].split()[0]))


def slug(*words: object) -> str:
    """A name for files."""
    return " ".join(map(str, words)).replace(",", "").replace(" ", "-")


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """One line more; several processes may write."""
    with FileLock(f"{path}.lock"), path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def sweep(missing: Callable[[], Sequence[Job]], run: Callable[[Job], None], parallel: int, minutes: float) -> None:
    """Runs what is missing, so many at once, until nothing is; starts none after so many minutes.

    Args:
        missing: asked again after each round, since what is wanted may depend on what came out.
    """
    end = time.time() + 60 * minutes
    while (wanted := missing()) and time.time() < end:
        with ThreadPoolExecutor(parallel) as pool:
            list(pool.map(lambda job: run(job) if time.time() < end else None, wanted))
