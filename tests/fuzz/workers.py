"""Cases in worker processes, with limits of time and memory that hold whatever a case does."""

from __future__ import annotations

import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.small_world import environment

SECONDS = 20.0
"""What a case may take."""
MEGABYTES = 1000.0
"""Memory that a case may take on top of the process's."""
HARD_LIMIT = 4 * 1024**3
"""Bytes of address space on top of the process's, behind which allocations fail."""
PATIENCE = 60.0
"""Seconds without an answer after which a worker is taken for hanging: a start-up and a case that takes too long."""


Case = tuple[str, int]
"""Kind and seed."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case. `error` says what is wrong, None if nothing is."""

    kind: str
    seed: int
    seconds: float
    megabytes: float
    error: str | None


def _status(name: str) -> int:
    """Bytes that the kernel counts for this process under a name such as ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def run_case(kind: str, seed: int, folder: Path) -> Verdict:
    """Write the input of a case into a folder and use it."""
    case = folder / "case"
    case.mkdir(parents=True)
    draw = random.Random(f"{kind} {seed}")
    KINDS[kind].write(draw, case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _status("VmRSS"), time.monotonic()
    error = None
    try:
        with chdir(case):  # a recipe or a card may name a folder to write, relative to the working directory
            KINDS[kind].use(draw, case)
    except Exception:
        error = traceback.format_exc()
    seconds, megabytes = time.monotonic() - began, (_status("VmHWM") - before) / 1e6
    if error is None and seconds > SECONDS:
        error = f"took {seconds:.0f} s"
    if error is None and megabytes > MEGABYTES:
        error = f"took {megabytes:.0f} MB"
    return Verdict(kind, seed, seconds, megabytes, error)


def serve(cases: Sequence[Case]) -> None:
    """Run cases one after another and write each verdict as a line of JSON. For a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + HARD_LIMIT,) * 2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as folder:
        for kind, seed in cases:
            verdict = run_case(kind, seed, Path(folder))
            shutil.rmtree(Path(folder, "case"))
            print(json.dumps(asdict(verdict)), file=answers, flush=True)


def verdicts(cases: Sequence[Case]) -> Iterator[Verdict]:
    """Verdicts of cases that run in a worker. A worker that hangs or dies fails its case, and another one follows."""
    left = tuple(cases)
    while left:
        done = 0
        for verdict in _of_one_worker(left):
            done += 1
            yield verdict
        left = left[done:]


def _of_one_worker(cases: Sequence[Case]) -> Iterator[Verdict]:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write("\n".join(f"{kind} {seed}" for kind, seed in cases).encode())
        given.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", "-"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(worker, lines), daemon=True).start()
        for kind, seed in cases:
            try:
                line = lines.get(timeout=PATIENCE)
                fate = "" if line else f"the worker died with {worker.wait()}"
            except queue.Empty:
                line, fate = "", f"no answer within {PATIENCE:.0f} s"
            if not line:
                worker.kill()
                worker.wait()
                said.seek(0)
                tail = said.read()[-3000:].decode("utf-8", "replace")
                yield Verdict(kind, seed, PATIENCE, 0.0, f"{fate}\n{tail}")
                return
            yield Verdict(**json.loads(line))
        worker.wait()


def _forward(worker: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put("")
